"""Training from a store on the disk against training from memory: speed and peak memory.

    python benchmarks/stream.py [--times 10] [--steps 60] [--repeats 3] [--out results/stream]

A store of random pictures is written, `--times` as large as the memory resident in the process
that trains from it. Runs from the store and from 2,000 of its pictures in memory take turns, each
in a process of its own, the store's files put out of the page cache before each. Rates are
medians over steps, then over repeats; memory is the peak of the resident set.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from anystep.checkpoint import read_json, write_json
from anystep.config import LogConfig, TrainConfig, config_json
from anystep.data.arrays import Arrays
from anystep.data.shards import INDEX, Entry, Index, Shards, Source, shard_path
from anystep.log import read_metrics
from anystep.networks.dit import DiTConfig
from anystep.objectives.shortcut import Shortcut
from anystep.presets import shards
from anystep.provenance import as_markdown, provenance
from anystep.registry import from_json, to_json
from anystep.train import METRICS, train

SHAPE = (3, 64, 64)
PER_SHARD = 16_384  # 201 MB
IN_MEMORY = 2_000


def write_store(folder: Path, count: int) -> None:
    """A store of `count` full shards of random pictures, and 2,000 of them as an array."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (PER_SHARD, *SHAPE), dtype=torch.uint8, generator=generator)
    np.save(folder / "memory.npy", x[:IN_MEMORY].numpy())
    for k in range(count):
        x[:, 0, 0, 0] = k
        save_file({"x": x}, shard_path(folder, k))
        with shard_path(folder, k).open("rb") as file:
            os.fsync(file.fileno())
    index = Index(
        Source("random"),
        n=count * PER_SHARD,
        size=SHAPE[1:],
        channels=SHAPE[0],
        class_names=(),
        vae=None,
        flip=False,
        shape=SHAPE,
        dtype="uint8",
        per_shard=PER_SHARD,
        shards=tuple(Entry(PER_SHARD, f"random {k}") for k in range(count)),
    )
    write_json(folder / INDEX, to_json(index))


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.glob("shard-*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def config(folder: Path, kind: str, steps: int) -> TrainConfig:
    """A run from the store or from memory."""
    data = Shards(folder) if kind == "disk" else Arrays(folder / "memory.npy")
    return replace(
        shards(Shortcut()),
        data=data,
        network=DiTConfig(patch=8, width=96, depth=4, heads=4),
        log=LogConfig(every=1, save_every=10**9, trackers=()),
        steps=steps,
        batch=64,
        device="cpu",
        out=folder / f"run-{kind}",
    )


def measure(path: Path) -> dict[str, float]:
    """Train the run of a config in this process; its rate and the peak of its memory."""
    run: TrainConfig = from_json(TrainConfig, read_json(path))
    train(run, bar=False)
    rates = [line["examples_per_second"] for line in read_metrics(run.out / METRICS)]
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+)", status)
    assert peak is not None
    return {
        "examples_per_second": statistics.median(rates[5:]),
        "peak_mb": int(peak[1]) / 1000,
        "data_mb": len(run.data.load().train) * int(np.prod(SHAPE)) / 1e6,
    }


def in_process(folder: Path, kind: str, steps: int) -> dict[str, float]:
    """`measure` in a new process, from a cold page cache."""
    run = config(folder, kind, steps)
    path = folder / f"{kind}.json"
    write_json(path, config_json(run))
    subprocess.run(["rm", "-rf", str(run.out)], check=True)
    forget(folder)
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(path)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(folder: Path, times: float, steps: int, repeats: int) -> dict[str, Any]:
    """Rates and memory of both kinds, and their ratio."""
    write_store(folder / "small", 1)
    resident = in_process(folder / "small", "disk", 10)["peak_mb"]
    shard_mb = PER_SHARD * np.prod(SHAPE) / 1e6
    write_store(folder / "large", int(-(-times * 1.15 * resident // (0.9 * shard_mb))))
    found: dict[str, list[dict[str, float]]] = {"disk": [], "memory": []}
    for _ in range(repeats):
        for kind, results in found.items():
            results.append(in_process(folder / "large", kind, steps))
    table = {
        kind: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for kind, results in found.items()
    }
    disk, memory = table["disk"], table["memory"]
    return {
        "data_over_peak_memory": disk["data_mb"] / disk["peak_mb"],
        "rate_over_memory": disk["examples_per_second"] / memory["examples_per_second"],
        **table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the store is written; some GB")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = compare(Path(folder), args.times, args.steps, args.repeats)
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "stream.json", found | {"provenance": provenance()})
        (args.out / "README.md").write_text(
            "# Training from a store larger than memory\n\n"
            "| | examples/s | peak resident MB | data MB |\n|---|---|---|---|\n"
            + "".join(
                f"| from {kind} | {found[kind]['examples_per_second']:.0f} | "
                f"{found[kind]['peak_mb']:.0f} | {found[kind]['data_mb']:.0f} |\n"
                for kind in ("disk", "memory")
            )
            + f"\nThe data are {found['data_over_peak_memory']:.1f} times the peak of the "
            f"resident memory; the rate is {found['rate_over_memory']:.3f} of that from memory."
            "\n\n" + as_markdown(provenance())
        )


if __name__ == "__main__":
    main()
