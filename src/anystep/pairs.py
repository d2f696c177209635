"""Make the pairs of noise and sample that reflow trains on; stopped, it goes on where it was."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from anystep import checkpoint
from anystep.compute import ForwardCounter
from anystep.data import seeded
from anystep.data.pairs import CHUNK, INFO, Pairs, chunk_path, read_chunk
from anystep.errors import UserError
from anystep.registry import differences, to_json
from anystep.sampling import STOCHASTIC, draw, may_guide, sample, schedule
from anystep.spec import Model, ModelSpec


def make_pairs(
    teacher: Path,
    out: Path,
    *,
    n: int,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    bar: bool = True,
) -> int:
    """Write n pairs (x0, the teacher's sample from x0) to `out`, or the ones still missing.

    Args:
        teacher: a run, checkpoint or model folder.
        out: the folder of pairs; see `anystep.data.pairs`.
        n: how many pairs; may differ from one call to the next.
        steps: sampling steps of the teacher.
        guidance: strength of guidance at sampling; 1 is none.
        seed: of noise and labels.
        device: where the teacher runs.
        bar: show a progress bar.

    Returns:
        Forwards that all pairs in the folder took.

    Raises:
        UserError: a bad number, a model of which there are no such pairs, or pairs made
            otherwise stand there already.
    """
    if n < 1:
        raise UserError(f"n must be at least 1 pair, not {n}")
    folder = checkpoint.find_model(teacher)
    training = checkpoint.read_info(folder)["training"]
    if "config" not in training:
        raise UserError(f"{teacher} does not say what data it was trained on")
    model = checkpoint.load_model(folder, device)
    check_request(model.spec, steps, guidance)
    info = {
        "teacher": str(teacher),
        "weights": hashlib.sha256((folder / checkpoint.WEIGHTS).read_bytes()).hexdigest()[:16],
        "data": training["config"]["data"],
        "num_classes": model.spec.num_classes,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "n": n,
    }
    if model.spec.vae is not None:
        info["vae"] = to_json(model.spec.vae)
    check_same(out, info)
    counter = ForwardCounter(model.net)
    total = 0
    with tqdm(
        total=n, unit="pair", desc=out.name, disable=not bar, dynamic_ncols=True, delay=1
    ) as progress:
        for index in range(-(-n // CHUNK)):
            rows = min(CHUNK, n - index * CHUNK)
            found = read_chunk(out, index)
            if len(found.get("x0", ())) < rows:
                counter.rows = 0
                found = chunk(model, rows, steps, guidance, seeded(seed, index, stream=2))
                found["forwards"] = torch.tensor([counter.rows])
                write_chunk(out, index, found, info)
            total += int(found["forwards"].sum())
            progress.update(rows)
    checkpoint.write_json(out / INFO, info)
    return total


def check_request(spec: ModelSpec, steps: int, guidance: float) -> None:
    """Raise `UserError` unless x0 determines the sample, with guidance at every step."""
    guided = [may_guide(spec, d) for _, d in schedule(steps, spec)]
    if guidance != 1 and not all(guided):
        remedy = (
            f"take {spec.finest} steps or more"
            if may_guide(spec, 1 / spec.finest)
            else "its null label was not trained, or guidance is baked in"
        )
        raise UserError(f"guidance {guidance} does not reach all {steps} steps: {remedy}")
    if spec.sampler in STOCHASTIC and steps > 1:
        raise UserError(
            f"in {steps} steps this model's sampler, {spec.sampler}, adds noise of its own, so "
            "that x0 has no one sample to be paired with: take 1 step"
        )


def check_same(out: Path, info: dict[str, Any]) -> None:
    """Make the folder, or check that the pairs there differ in nothing but their count."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INFO).exists():
        return
    same = {key: info[key] for key in ("teacher", "n")}  # the weights say which teacher it is
    changed = differences(Pairs(out).info() | same, info)
    if changed:
        raise UserError(
            f"{out} holds pairs made otherwise ({'; '.join(changed)}): choose another --out"
        )


def write_chunk(out: Path, index: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a chunk, whole or not at all, and what it was made by first."""
    checkpoint.write_json(out / INFO, info)
    path = chunk_path(out, index)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def chunk(
    model: Model, rows: int, steps: int, guidance: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The first `rows` noises of a chunk, the model's samples from them, and their class ids."""
    device = next(model.parameters()).device
    x0, cond = draw(model.spec, CHUNK, generator)
    x0, cond = x0[:rows], None if cond is None else cond[:rows]
    x1 = sample(
        model,
        x0.to(device),
        steps=steps,
        cond=None if cond is None else cond.to(device),
        guidance=guidance,
    ).cpu()
    if not x1.isfinite().all():
        raise UserError("the model made NaN or Inf: its weights are broken")
    if model.spec.data == "[-1, 1]":
        x1 = x1.clamp(-1, 1)
    return {"x0": x0, "x1": x1} | ({} if cond is None else {"cond": cond})
