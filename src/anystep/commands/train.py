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
    """Usage: anystep train PRESET [--method M] [--teacher RUN | --start RUN] [--FIELD VALUE].

    PRESET is a dataset (below) or the config.json of a run. Every field of the config can be
    set, as in --steps 500 or --objective.target-ema 0.99; `anystep train PRESET --help` lists
    them, and --dry-run shows their values and trains nothing. --start begins with the weights of
    a model, such as a flow that is to become a shortcut model. The same command again goes on
    where the run stopped.
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
    method = take(words, "--method")
    givers = {role: take(words, f"--{role}") for role in ("teacher", "start")}
    if name.endswith(".json"):
        if method:
            raise UserError(f"{name} names its method itself; leave --method out")
        base = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        base = preset(name, method)
    for role, path in givers.items():
        if path:
            info = checkpoint.read_info(checkpoint.find_model(Path(path)))
            network = from_json(NetworkConfig, info["network"])
            base = replace(base, network=network, **{role: Path(path)})
            if role == "start":  # not the folder of a run that starts from nothing
                out = base.out.with_name(f"{base.out.name}-from-{Path(path).name}")
                base = replace(base, out=out)
    config: TrainConfig = parse(TrainConfig, words, f"{command} {name}", base)
    return config


def train_help() -> str:
    """Help of `anystep train` with the presets and methods."""
    lines = [str(run.__doc__).replace("\n    ", "\n"), "presets:"]
    lines += [f"  {name:<17}{str(make.__doc__).splitlines()[0]}" for name, make in PRESETS.items()]
    lines += ["", "methods (default shortcut; a variant is named as shortcut/paper):"]
    return "\n".join(lines + [f"  {name}" for name in names(Objective.PACKAGE)])
