"""The command line: train, sample, eval, info."""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import anystep
from anystep import checkpoint, figures
from anystep.arguments import parse, take
from anystep.config import TrainConfig, config_json, pick_device
from anystep.data import DataConfig
from anystep.errors import UserError
from anystep.evaluate import Judge, generate
from anystep.metrics import TorchScriptFeatures
from anystep.objectives import Objective
from anystep.presets import PRESETS, preset
from anystep.registry import from_json, names, to_json, unknown
from anystep.report import write_report
from anystep.train import INTERRUPTED, train

Where = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class SampleArgs:
    """Draw samples from a model.

    Attributes:
        model: a run, a checkpoint or a model folder.
        steps: sampling steps; any whole number from 1.
        n: how many samples.
        out: FILE.npz for arrays, FILE.png for a grid, or a folder for one PNG each.
        label: one class for all; uniformly random by default.
        guidance: classifier-free guidance strength; 1 is none.
        force_guidance: apply guidance even where it was not trained or is baked in already.
        seed: of noise and labels.
        batch: samples a network call.
        device: auto, cpu or cuda.
    """

    model: Where
    steps: int = 1
    n: int = 64
    out: Path = Path("samples.png")
    label: int | None = None
    guidance: float = 1.0
    force_guidance: bool = False
    seed: int = 0
    batch: int = 256
    device: str = "auto"


@dataclass(frozen=True)
class EvalArgs:
    """Judge models at each step count: a table, a plot and a grid of the same noise.

    Attributes:
        models: runs, checkpoints or model folders; the first one's dataset is used.
        steps: step counts; powers of two up to the model's finest by default.
        n: samples at each step count.
        out: folder of the report; the first model's by default.
        seed: of noise and labels.
        features: a TorchScript program (it is run!) for features instead of the dataset's
            own classifier.
        data: where the dataset's files are, if they have moved.
        device: auto, cpu or cuda.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    steps: tuple[int, ...] = ()
    n: int = 2048
    out: Path | None = None
    seed: int = 0
    features: Path | None = None
    data: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class InfoArgs:
    """Show what a model is and what it may be asked, as JSON.

    Attributes:
        model: a run, a checkpoint or a model folder.
    """

    model: Where


def run_train(args: Sequence[str]) -> int:
    """Usage: anystep train PRESET [--method METHOD] [--dry-run] [--field value ...].

    PRESET is a dataset (below) or the config.json of a run. Every field of the config can be
    set, as in --steps 500 or --objective.target-ema 0.99; `anystep train PRESET --help` lists
    them. The same command again goes on where the run stopped.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(train_help())
        return 0 if words else 2
    name = words.pop(0)
    if name.startswith("-"):
        raise UserError(f"name a preset first: anystep train {'|'.join(PRESETS)}")
    method = take(words, "--method")
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if name.endswith(".json"):
        if method:
            raise UserError(f"{name} names its method itself; leave --method out")
        start = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        start = preset(name, method or "shortcut")
    config = parse(TrainConfig, words, f"anystep train {name}", start)
    if dry:
        print(json.dumps(config_json(config), indent=2))
        return 0
    clock = time.perf_counter()
    if not train(config):
        print(f"interrupted; the run is saved: the same command goes on with it ({config.out})")
        return INTERRUPTED
    print(f"trained {config.out} in {time.perf_counter() - clock:.0f} s")
    print(f"next: anystep sample {config.out} --steps 1    anystep eval {config.out}")
    return 0


def train_help() -> str:
    """Help of `anystep train` with the presets and methods."""
    lines = [str(run_train.__doc__).replace("\n    ", "\n"), "presets:"]
    lines += [f"  {name:<15}{str(make.__doc__).splitlines()[0]}" for name, make in PRESETS.items()]
    lines += ["", "methods (default shortcut; a variant is named as shortcut/paper):"]
    return "\n".join(lines + [f"  {name}" for name in names(Objective.PACKAGE)])


def run_sample(args: Sequence[str]) -> int:
    """Draw samples from a model."""
    request = parse(SampleArgs, args, "anystep sample")
    if request.n < 1 or request.batch < 1:
        raise UserError("n and batch must be at least 1")
    model = checkpoint.load_model(request.model, pick_device(request.device))
    if request.label is not None and not 0 <= request.label < max(model.spec.num_classes, 1):
        raise UserError(
            f"label {request.label} is out of range: classes are 0..{model.spec.num_classes - 1}"
            if model.spec.num_classes
            else "this model is unconditional: it takes no --label"
        )
    check_output(request.out, len(model.spec.shape))
    with tqdm(total=request.n, unit="sample", desc="sampling", delay=1) as bar:
        x, cond = generate(
            model,
            request.n,
            steps=request.steps,
            seed=request.seed,
            label=request.label,
            guidance=request.guidance,
            force_guidance=request.force_guidance,
            batch=request.batch,
            bar=bar.update,
        )
    if not x.isfinite().all():
        raise UserError("the model made NaN or Inf: its weights are broken")
    write_samples(request.out, x, cond)
    print(request.out)
    return 0


def check_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def check_output(out: Path, rank: int) -> None:
    """Refuse an output that cannot be written before the work is done, not after."""
    if out.suffix not in ("", ".npz", ".png"):
        raise UserError(f"{out}: write to FILE.npz, FILE.png or a folder without a suffix")
    if not out.suffix and rank != 3:
        raise UserError(f"{out}: these samples are no images; write to FILE.npz or FILE.png")
    if out.suffix and out.is_dir():
        raise UserError(f"{out} is a folder; name a file")
    check_folder(out.parent if out.suffix else out)
    if not out.suffix and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder")


def write_samples(out: Path, x: torch.Tensor, cond: torch.Tensor | None) -> None:
    """Write samples as arrays, as one grid, or as a folder of pictures."""
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {"samples": x.numpy().astype(np.float32)}
        np.savez(out, **arrays | ({} if cond is None else {"cond": cond.numpy()}))
    elif out.suffix == ".png":
        figures.save_rows(out, figures.near_square(x) if x.ndim == 4 else [x])
    else:
        for k, picture in enumerate(x):
            suffix = "" if cond is None else f"-class{int(cond[k])}"
            figures.to_picture(picture).save(out / f"{k:06d}{suffix}.png")


def run_eval(args: Sequence[str]) -> int:
    """Judge models at each step count."""
    request = parse(EvalArgs, args, "anystep eval")
    if not request.models:
        raise UserError("name at least one run, checkpoint or model folder")
    if any(n < 1 for n in request.steps):
        raise UserError(f"steps must be at least 1, not {min(request.steps)}")
    if request.n < 10:
        raise UserError("judging needs n of at least 10 samples")
    device = pick_device(request.device)
    models = {str(p): checkpoint.load_model(p, device) for p in request.models}
    first = request.models[0]
    training = checkpoint.read_info(checkpoint.find_model(first))["training"]
    if "config" not in training:
        raise UserError(f"{first} does not say what data it was trained on")
    moved = {} if request.data is None else {"path": str(request.data)}
    out = request.out or first
    check_folder(out)
    splits = from_json(DataConfig, training["config"]["data"] | moved).load()
    if splits.train.digest() != training["data"]:
        warnings.warn(f"the data have changed since {first} was trained", stacklevel=1)
    for name, model in models.items():
        if model.spec.shape != splits.train.shape:
            raise UserError(f"{name} makes samples {model.spec.shape}, not {splits.train.shape}")
    features = request.features and TorchScriptFeatures(request.features, device=device)
    finest = max(model.spec.finest for model in models.values())
    steps = request.steps or tuple(2**k for k in range(finest.bit_length()))
    judge = Judge(splits, features, device=device)
    files = write_report(out, models, judge, steps=steps, n=request.n, seed=request.seed)
    print(files["table"].read_text())
    for what, path in files.items():
        print(f"{what}: {path}")
    return 0


def run_info(args: Sequence[str]) -> int:
    """Show what a model is and what it may be asked."""
    request = parse(InfoArgs, args, "anystep info")
    folder = checkpoint.find_model(request.model)
    model = checkpoint.load_model(folder)
    info = checkpoint.read_info(folder)
    about = {
        "model": str(folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "spec": to_json(model.spec),
        "network": info["network"],
        "training": info["training"],
    }
    print(json.dumps(about, indent=2))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": run_train,
    "sample": run_sample,
    "eval": run_eval,
    "info": run_info,
}

HELP = """usage: anystep COMMAND ...

Generative models whose number of sampling steps is chosen after training.

commands (anystep COMMAND --help says more):
  train     train a model:          anystep train digits
  sample    draw samples:           anystep sample runs/digits-shortcut --steps 4
  eval      judge at every N:       anystep eval runs/digits-shortcut
  info      what a model is:        anystep info runs/digits-shortcut
"""


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show each warning as one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 after a user's mistake."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"anystep {anystep.__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(unknown("command", args[0], COMMANDS))
        with one_line_warnings():
            return COMMANDS[args[0]](args[1:])
    except UserError as error:
        print(f"anystep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        print(f"anystep: {named}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
