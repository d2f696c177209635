"""anystep train: train a model."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anystep import checkpoint, parallel
from anystep.arguments import parse, take
from anystep.config import TrainConfig, config_json
from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.objectives import Objective
from anystep.presets import PRESETS, preset
from anystep.registry import from_json, names
from anystep.train import INTERRUPTED, train


def run(args: Sequence[str]) -> int:
    """Usage: anystep train PRESET [--method METHOD] [--teacher RUN] [--dry-run] [--FIELD VALUE].

    PRESET is a dataset (below) or the config.json of a run. Every field of the config can be
    set, as in --steps 500 or --objective.target-ema 0.99; `anystep train PRESET --help` lists
    them. The same command again goes on where the run stopped.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(train_help())
        return 0 if words else 2
    dry = "--dry-run" in words
    config = configured("anystep train", [word for word in words if word != "--dry-run"])
    if dry:
        print(json.dumps(config_json(config), indent=2))
        return 0
    clock = time.perf_counter()
    finished = train(config)
    if parallel.rank() != 0:
        return 0 if finished else INTERRUPTED
    if not finished:
        print(f"interrupted; the run is saved: the same command goes on with it ({config.out})")
        return INTERRUPTED
    print(f"trained {config.out} in {time.perf_counter() - clock:.0f} s")
    print(f"next: anystep sample {config.out} --steps 1    anystep eval {config.out}")
    return 0


def configured(command: str, words: Sequence[str]) -> TrainConfig:
    """The config that a preset, or a config.json, and options name.

    Args:
        command: what messages are to call the command.
        words: the preset or file, then options.
    """
    name, *words = words or ["-"]
    if name.startswith("-"):
        raise UserError(f"name a preset first: {command} {'|'.join(PRESETS)}")
    method, teacher = take(words, "--method"), take(words, "--teacher")
    if name.endswith(".json"):
        if method:
            raise UserError(f"{name} names its method itself; leave --method out")
        start = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        start = preset(name, method or "shortcut")
    if teacher:
        network = checkpoint.read_info(checkpoint.find_model(Path(teacher)))["network"]
        start = replace(start, teacher=Path(teacher), network=from_json(NetworkConfig, network))
    config: TrainConfig = parse(TrainConfig, words, f"{command} {name}", start)
    return config


def train_help() -> str:
    """Help of `anystep train` with the presets and methods."""
    lines = [str(run.__doc__).replace("\n    ", "\n"), "presets:"]
    lines += [f"  {name:<15}{str(make.__doc__).splitlines()[0]}" for name, make in PRESETS.items()]
    lines += ["", "methods (default shortcut; a variant is named as shortcut/paper):"]
    return "\n".join(lines + [f"  {name}" for name in names(Objective.PACKAGE)])
