"""anystep eval: judge models at each step count."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from anystep import checkpoint
from anystep.arguments import check_folder, parse
from anystep.config import pick_device
from anystep.data import DataConfig, Splits
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.metrics import TorchScriptFeatures
from anystep.metrics.fidelity import Fidelity
from anystep.metrics.quoted import Quoted
from anystep.metrics.reference import read_reference
from anystep.registry import from_json
from anystep.report import write_report


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
        reference: FILE.npz of published statistics in those features (mu and sigma), or of
            pictures (arr_0): the Fréchet distance to it is added.
        fidelity: add FID, KID and IS by torch-fidelity, against the training pictures.
        data: where the dataset's files are, if they have moved.
        device: auto, cpu or cuda.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    steps: tuple[int, ...] = ()
    n: int = 2048
    out: Path | None = None
    seed: int = 0
    features: Path | None = None
    reference: Path | None = None
    fidelity: bool = False
    data: Path | None = None
    device: str = "auto"


def run(args: Sequence[str]) -> int:
    """Judge models at each step count."""
    request = parse(EvalArgs, args, "anystep eval")
    if not request.models:
        raise UserError("name at least one run, checkpoint or model folder")
    if any(n < 1 for n in request.steps):
        raise UserError(f"steps must be at least 1, not {min(request.steps)}")
    if request.reference and not request.features:
        raise UserError("--reference needs --features FILE: the network whose statistics it holds")
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
    reference = data.reference(splits)
    quoted = quoted_scores(request, reference, features, device)
    judge = Judge(reference, features, device=device, quoted=quoted)
    files = write_report(out, models, judge, steps=steps, n=request.n, seed=request.seed)
    print(files["table"].read_text())
    for what, path in files.items():
        print(f"{what}: {path}")
    return 0


def quoted_scores(
    request: EvalArgs,
    splits: Splits,
    features: TorchScriptFeatures | None,
    device: torch.device,
) -> list[Quoted]:
    """The scores asked for that are quoted against other people's."""
    found: list[Quoted] = []
    if request.reference and features:
        example = splits.train.batch(slice(0, 1))[0][0]
        found.append(read_reference(request.reference, features, example))
    if request.fidelity:
        found.append(Fidelity(splits.train, device))
    return found
