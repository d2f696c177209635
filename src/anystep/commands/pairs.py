"""anystep pairs: make the pairs on which reflow trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anystep.arguments import Where, check_folder, parse
from anystep.config import pick_device
from anystep.pairs import make_pairs


@dataclass(frozen=True)
class PairsArgs:
    """Make pairs of noise and sample, on which reflow trains; the same command goes on with them.

    Attributes:
        model: the teacher: a run, a checkpoint, a model folder, or owner/name on the hub.
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


def run(args: Sequence[str]) -> int:
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
        f"--teacher {request.model} --out {request.out}-reflow"
    )
    return 0
