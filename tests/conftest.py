import os
from pathlib import Path

import numpy as np
import pytest
import torch

from anystep.networks import NetworkConfig
from anystep.networks.dit import DiTConfig
from anystep.networks.mlp import MLPConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported: no test goes to the network

FIXTURES = Path(__file__).parent / "fixtures" / "official_small.npz"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def official():
    """Numbers of the authors' own code, channels-first where they are images."""
    with np.load(FIXTURES) as arrays:
        return {
            name: torch.from_numpy(a).movedim(-1, 1) if a.ndim == 4 and "/" not in name else a
            for name, a in arrays.items()
        }


SMALL: dict[str, tuple[NetworkConfig, tuple[int, ...]]] = {
    "dit": (DiTConfig(patch=2, width=32, depth=2, heads=2), (3, 4, 6)),
    "mlp": (MLPConfig(width=32, depth=2), (5,)),
}


def small_net(kind: str, num_classes: int = 4, seed: int = 0):
    """A small network no layer of which is zero, and the shape of its samples."""
    config, shape = SMALL[kind]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = config.build(shape, num_classes)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net, shape
