"""Time of a training step against peers installable from PyPI, on the same DiT size and batch.

    pip install diffusers rectified-flow-pytorch
    python benchmarks/peers.py [--size digits] [--repeats 15] [--out results/step/peers.json]

* Flow matching with diffusers' `DiTTransformer2DModel` and EMA in a plain loop, as its training
  examples are written, against our flow matching.
* `SplitMeanFlow` of rectified-flow-pytorch, the nearest method there (a target of two steps
  for one), around our own network, with the same optimizer and EMA, against our shortcut. It
  makes targets in half of its steps, at random, for the whole batch, so means are compared.

All take turns in one process. A peer that is not installed is left out.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from step import METHODS, SHARE, Size, sizes, timed, training
from torch import Tensor, nn

from anystep.config import pick_device
from anystep.provenance import provenance

Step = Callable[[], None]


def plain_loop(size: Size, net: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A training step as diffusers' examples write it: loss, clipping, AdamW, EMA."""
    from diffusers.training_utils import EMAModel

    device = next(net.parameters()).device
    x, cond = size.splits.train.batch(slice(None))
    assert cond is not None
    x, cond = x.to(device), cond.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), size.optimizer.lr)
    ema = EMAModel(net.parameters(), decay=0.999)

    def step() -> None:
        loss_of(x, cond).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    return step


def diffusers_flow(size: Size, device: torch.device) -> Step:
    """Flow matching with the DiT of diffusers."""
    from diffusers import DiTTransformer2DModel

    config, (channels, side, _) = size.network, size.shape
    net = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.depth,
        sample_size=side,
        patch_size=config.patch,
        num_embeds_ada_norm=10,
    ).to(device)

    def loss_of(x1: Tensor, cond: Tensor) -> Tensor:
        x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
        x_t = torch.lerp(x0, x1, t[:, None, None, None])
        return F.mse_loss(net(x_t, t * 1000, cond).sample, x1 - x0)

    return plain_loop(size, net, loss_of)


def split_mean_flow(size: Size, device: torch.device) -> Step:
    """SplitMeanFlow of rectified-flow-pytorch around our network."""
    module = load_file_of("rectified_flow_pytorch", "split_mean_flow.py")
    net = size.network.build(size.shape, 10).to(device)
    method = module.SplitMeanFlow(net, data_shape=size.shape, accept_cond=True)
    return plain_loop(size, net, lambda x, cond: method(x, cond=cond))


def load_file_of(package: str, name: str) -> ModuleType:
    """One file of an installed package, without what the package imports besides."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0]) / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="digits")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, size = pick_device(args.device), sizes(quick=False)[args.size]
    contestants = {
        f"anystep {method}, {path}": training(size, METHODS[method], path, device)
        for method in ("flow_matching", "shortcut")
        for path in ("plain", "compiled", "fast")
    }
    for name, make in (("diffusers", diffusers_flow), ("SplitMeanFlow", split_mean_flow)):
        try:
            contestants[name] = make(size, device)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    seconds = timed(contestants, args.repeats, device, statistics.mean)
    report: dict[str, Any] = {
        "size": args.size,
        "bootstrap_share": SHARE,
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "ratios": {
            f"{name} over {peer}": seconds[name] / seconds[peer]
            for peer, method in (("diffusers", "flow_matching"), ("SplitMeanFlow", "shortcut"))
            for name in seconds
            if peer in seconds and method in name
        },
        "provenance": provenance(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
