"""Networks `net(x, t, d, cond) -> u`, one file each, found by file name.

A network config is a frozen dataclass whose `build` makes the module for the shape and classes
of the data. A network knows its `null_label` (None when it is unconditional); `cond=None` means
the null label for every row. What it repeats is in its `blocks`, an `nn.ModuleList`, and what it
was built from in its `config`. It can `forget_steps`: answer every d as it answered d = 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from anystep.errors import UserError
from anystep.spec import Model, ModelSpec


@dataclass(frozen=True)
class NetworkConfig(ABC):
    """Base of every network config."""

    PACKAGE: ClassVar[str] = "anystep.networks"

    @abstractmethod
    def build(self, shape: tuple[int, ...], num_classes: int = 0, finest: int = 128) -> nn.Module:
        """The network for samples of `shape`, with `num_classes` classes (0: unconditional).

        Args:
            shape: shape of one sample.
            num_classes: class ids 0..num_classes - 1; the null label is num_classes.
            finest: M; steps of 1/M and less share one level.

        Raises:
            UserError: the network cannot take this shape.
        """


BASE = NetworkConfig


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network, which may be sharded, or computed again, one at a time."""
    assert isinstance(net.blocks, nn.ModuleList)
    return list(net.blocks)


def forget_steps(net: nn.Module) -> None:
    """Make u(x, t, d) what u(x, t, 0) was, for every d, until training changes it.

    A flow model is asked d = 0 alone; its answer to any other d is an accident.

    Raises:
        UserError: the network cannot.
    """
    if not callable(forget := getattr(net, "forget_steps", None)):
        raise UserError(f"a {type(net).__name__} cannot forget the size of a step")
    forget()


def config_of(net: nn.Module) -> NetworkConfig:
    """The config that a network was built from.

    Raises:
        UserError: the network does not know it.
    """
    config = getattr(net, "config", None)
    if not isinstance(config, NetworkConfig):
        raise UserError(
            f"a {type(net).__name__} does not know its NetworkConfig: keep it as its `config`"
        )
    return config


def build_model(network: NetworkConfig, spec: ModelSpec) -> Model:
    """A freshly initialised model for `spec`."""
    return Model(network.build(spec.shape, spec.num_classes, spec.finest), spec)
