"""The DiT of diffusers, given a step size: a velocity network of theirs as one of ours.

A step embedding that starts at zero is added to what each of its time embeddings answers, so that
the network computes what it did before, at every d, until it is trained. Times and velocities are
translated on the way in and out.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.networks._embed import ScalarEmbedding, step_level
from anystep.spec import finest_level


@dataclass(frozen=True)
class DiffusersDiTConfig(NetworkConfig):
    """A `DiTTransformer2DModel` that predicts a velocity.

    Attributes:
        config: its own config, as JSON.
        noise_at: the time, 0 or 1, at which its samples are noise; its velocity is data minus
            noise at 0, noise minus data at 1.
        time_scale: factor on its time where it is fed; 1000 for timesteps.
    """

    config: str = "{}"
    noise_at: int = 1
    time_scale: float = 1000.0

    def build(
        self, shape: tuple[int, ...], num_classes: int = 0, finest: int = 128
    ) -> "DiffusersDiT":
        """The network for images (C, H, H), freshly initialised."""
        if self.noise_at not in (0, 1):
            raise UserError(f"noise is at time 0 or 1, not {self.noise_at}")
        theirs = _make(self.config)
        known = (theirs.config.in_channels, *[theirs.config.sample_size] * 2)
        if shape != known or num_classes != theirs.config.num_embeds_ada_norm:
            raise UserError(
                f"this network is for samples {known} of {theirs.config.num_embeds_ada_norm} "
                f"classes, not {shape} of {num_classes}"
            )
        return DiffusersDiT(self, theirs, finest)


class DiffusersDiT(nn.Module):
    """`net(x, t, d, cond) -> u` around a `DiTTransformer2DModel`.

    Args:
        config: how it speaks of time and velocity.
        theirs: the module; its random dropping of labels is switched off, since here objectives
            drop them.
        finest: M.
    """

    def __init__(self, config: DiffusersDiTConfig, theirs: Any, finest: int) -> None:
        from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding

        super().__init__()
        self.config, self.theirs, self.finest = config, theirs, finest
        self.shape = (theirs.config.in_channels, *[theirs.config.sample_size] * 2)
        self.null_label = int(theirs.config.num_embeds_ada_norm)
        self.level = ScalarEmbedding(theirs.inner_dim)
        self.level.silence()
        self.step: Tensor | None = None  # the embedding of the call in hand
        for module in theirs.modules():
            if isinstance(module, TimestepEmbedding):
                module.register_forward_hook(self._with_step)
            elif isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    @property
    def blocks(self) -> nn.ModuleList:
        """What it repeats."""
        blocks: nn.ModuleList = self.theirs.transformer_blocks
        return blocks

    def forget_steps(self) -> None:
        """Answer every d as d = 0 was answered, until training changes it."""
        self.level.hold(finest_level(self.finest))

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, C, H, H) for x (B, C, H, H), t (B,), d (B,), class ids (B,) or None."""
        if x.shape[1:] != self.shape:
            raise UserError(f"this network takes {self.shape}, not {tuple(x.shape[1:])}")
        if cond is None:
            cond = torch.full_like(t, self.null_label, dtype=torch.long)
        self.step = self.level(step_level(d, self.finest))
        reverse = self.config.noise_at == 1
        time = (1 - t if reverse else t) * self.config.time_scale
        v: Tensor = self.theirs(x, time, class_labels=cond, return_dict=False)[0]
        v = v[:, : len(x[0])]  # what may follow is a variance
        return (-v if reverse else v).to(x.dtype)

    def _with_step(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        assert self.step is not None
        return embedded + self.step.to(embedded.dtype)


def _make(config: str) -> Any:
    """A `DiTTransformer2DModel` of a config."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise UserError(
            f"this network needs diffusers ({error}): pip install 'anystep[latents]'"
        ) from None
    try:
        return DiTTransformer2DModel(**json.loads(config))
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"this is no config of a DiTTransformer2DModel ({line})") from None
