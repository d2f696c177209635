"""The command line: train, pairs, sample, eval, compare, info."""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import anystep
from anystep import checkpoint, figures
from anystep.arguments import parse, take
from anystep.compare import CompareConfig, Comparison
from anystep.compare_report import write
from anystep.config import TrainConfig, config_json, pick_device
from anystep.data import DataConfig
from anystep.errors import UserError
from anystep.evaluate import Judge, generate
from anystep.interpolation import largest_jump, mix, strip
from anystep.metrics import TorchScriptFeatures
from anystep.networks import NetworkConfig
from anystep.objectives import Objective
from anystep.pairs import make_pairs
from anystep.presets import PRESETS, preset
from anystep.registry import from_json, names, to_json, unknown
from anystep.report import write_report
from anystep.spec import Model, Sampler
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
        interpolate: draw a strip of n samples of one class along the arc between two noises; in
            FILE.png a mix of its ends, pixel by pixel, stands below it.
        label: one class for all; uniformly random by default.
        guidance: classifier-free guidance strength; 1 is none.
        force_guidance: apply guidance even where it was not trained or is baked in already.
        sampler: euler, consistency, ddim or ancestral; the one the model is meant for by default.
        seed: of noise and labels.
        batch: samples a network call; a strip is drawn in one.
        device: auto, cpu or cuda.
    """

    model: Where
    steps: int = 1
    n: int = 64
    out: Path = Path("samples.png")
    interpolate: bool = False
    label: int | None = None
    guidance: float = 1.0
    force_guidance: bool = False
    sampler: Sampler | None = None
    seed: int = 0
    batch: int = 256
    device: str = "auto"


@dataclass(frozen=True)
class PairsArgs:
    """Make pairs of noise and sample, on which reflow trains; the same command goes on with them.

    Attributes:
        model: the teacher: a run, a checkpoint or a model folder.
        out: folder of the pairs.
        n: how many pairs.
        steps: sampling steps of the teacher.
        guidance: classifier-free guidance strength; 1 is none.
        seed: of noise and labels.
        device: auto, cpu or cuda.
    """

    model: Where
    out: Path
    n: int = 10_000
    steps: int = 32
    guidance: float = 1.0
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class EvalArgs:
    """Judge models at each step count: a table, a plot and a grid of the same noise.

    Attributes:
        models: runs, checkpoints or model folders; the first one's dataset is used.
        steps: step counts; powers of two up to 128, or the model's finest, by default.
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
    """Usage: anystep train PRESET [--method METHOD] [--teacher RUN] [--dry-run] [--FIELD VALUE].

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
    method, teacher = take(words, "--method"), take(words, "--teacher")
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if name.endswith(".json"):
        if method:
            raise UserError(f"{name} names its method itself; leave --method out")
        start = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        start = preset(name, method or "shortcut")
    if teacher:
        network = checkpoint.read_info(checkpoint.find_model(Path(teacher)))["network"]
        start = replace(start, teacher=Path(teacher), network=from_json(NetworkConfig, network))
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


def run_pairs(args: Sequence[str]) -> int:
    """Make pairs for reflow."""
    request = parse(PairsArgs, args, "anystep pairs")
    check_folder(request.out)
    forwards = make_pairs(
        request.model,
        request.out,
        n=request.n,
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        device=pick_device(request.device),
    )
    print(f"{request.n} pairs in {request.out}, {forwards:,} forwards")
    print(
        f"next: anystep train pairs --data.path {request.out} --method reflow "
        f"--teacher {request.model}"
    )
    return 0


def run_sample(args: Sequence[str]) -> int:
    """Draw samples from a model."""
    request = parse(SampleArgs, args, "anystep sample")
    if request.n < 1 or request.batch < 1:
        raise UserError("n and batch must be at least 1")
    if request.interpolate and request.n < 2:
        raise UserError(f"--interpolate needs --n of at least 2, not {request.n}")
    model = checkpoint.load_model(request.model, pick_device(request.device))
    if request.label is not None and not 0 <= request.label < max(model.spec.num_classes, 1):
        raise UserError(
            f"label {request.label} is out of range: classes are 0..{model.spec.num_classes - 1}"
            if model.spec.num_classes
            else "this model is unconditional: it takes no --label"
        )
    check_output(request.out, len(model.spec.shape))
    x, cond = interpolate(model, request) if request.interpolate else draw(model, request)
    if not x.isfinite().all():
        raise UserError("the model made NaN or Inf: its weights are broken")
    if request.interpolate:
        pixels = mix(x[0], x[-1], len(x))
        print(f"largest jump: {largest_jump(x):.3f}, of pixels mixed {largest_jump(pixels):.3f}")
    if request.interpolate and request.out.suffix == ".png":
        labels = [f"{request.steps} step{'s' if request.steps > 1 else ''}", "pixels mixed"]
        figures.save_rows(request.out, [x, pixels], labels)
    else:
        write_samples(request.out, x, cond)
    print(request.out)
    return 0


def draw(model: Model, request: SampleArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The samples asked for, and their class ids."""
    with tqdm(total=request.n, unit="sample", desc="sampling", delay=1) as bar:
        return generate(
            model,
            request.n,
            steps=request.steps,
            seed=request.seed,
            label=request.label,
            guidance=request.guidance,
            force_guidance=request.force_guidance,
            sampler=request.sampler,
            batch=request.batch,
            bar=bar.update,
        )


def interpolate(model: Model, request: SampleArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The strip asked for, and its class."""
    return strip(
        model,
        request.n,
        request.steps,
        request.seed,
        request.label,
        guidance=request.guidance,
        force_guidance=request.force_guidance,
        sampler=request.sampler,
    )


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
    data = from_json(DataConfig, training["config"]["data"] | moved)
    splits = data.load()
    if splits.train.digest() != training["data"]:
        warnings.warn(f"the data have changed since {first} was trained", stacklevel=1)
    for name, model in models.items():
        if model.spec.shape != splits.train.shape:
            raise UserError(f"{name} makes samples {model.spec.shape}, not {splits.train.shape}")
    features = request.features and TorchScriptFeatures(request.features, device=device)
    finest = max(model.spec.finest for model in models.values())
    steps = request.steps or tuple(2**k for k in range(max(finest, 128).bit_length()))
    judge = Judge(data.reference(splits), features, device=device)
    files = write_report(out, models, judge, steps=steps, n=request.n, seed=request.seed)
    print(files["table"].read_text())
    for what, path in files.items():
        print(f"{what}: {path}")
    return 0


def run_compare(args: Sequence[str]) -> int:
    """Usage: anystep compare PRESET [--methods A B ...] [--seeds 0 1 2] [--budget N] ....

    PRESET is a dataset, as for `anystep train`, or the config.json of a run, whose network, data,
    batch and optimizer then are everybody's. Trains and judges each method at equal compute and
    writes one report; what is finished is not done again. `anystep compare PRESET --help` lists
    the fields.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(str(run_compare.__doc__).replace("\n    ", "\n"))
        return 0 if words else 2
    name = words.pop(0)
    if name.startswith("-"):
        raise UserError(f"name a preset first: anystep compare {'|'.join(PRESETS)}")
    start = CompareConfig(out=Path("runs") / f"compare-{Path(name).stem}")
    config = parse(CompareConfig, words, f"anystep compare {name}", start)
    if name.endswith(".json"):
        base = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        base = preset(name)
    check_folder(config.out)
    comparison = Comparison(base, config)
    files = write(comparison, comparison.run())
    print(files["report"].read_text())
    for what, path in files.items():
        print(f"{what}: {path}")
    return 1 if comparison.failures else 0


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
    "pairs": run_pairs,
    "sample": run_sample,
    "eval": run_eval,
    "compare": run_compare,
    "info": run_info,
}

HELP = """usage: anystep COMMAND ...

Generative models whose number of sampling steps is chosen after training.

commands (anystep COMMAND --help says more):
  train     train a model:          anystep train digits
  pairs     pairs for reflow:       anystep pairs runs/digits-flow-matching --out pairs
  sample    draw samples:           anystep sample runs/digits-shortcut --steps 4
  eval      judge at every N:       anystep eval runs/digits-shortcut
  compare   methods, equal compute: anystep compare digits
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
