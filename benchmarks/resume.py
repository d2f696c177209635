"""Kill a run with SIGKILL at random moments, resume it, and compare with the undisturbed run.

    python benchmarks/resume.py [--kills 20]

The run saves a checkpoint every second step. Every other kill waits until one is being written.
Passes when weights, EMAs and optimizer moments agree bit for bit; to results/resume.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from anystep import checkpoint
from anystep.provenance import as_markdown, provenance

ROOT = Path(__file__).resolve().parents[1]

COMMAND = [
    *(sys.executable, "-m", "anystep.cli", "train", "digits", "--steps", "240", "--batch", "32"),
    *("--log.save-every", "2", "--log.every", "10", "--log.look-every", "0", "--device", "cpu"),
]


def launch(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, "--out", str(out)], stderr=subprocess.DEVNULL)


def last_step(out: Path) -> int:
    found = checkpoint.checkpoints(out)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def tensors(out: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.checkpoints(out)[-1]
    names = (checkpoint.WEIGHTS, checkpoint.TRAINING)
    return {f"{name}/{k}": v for name in names for k, v in load_file(folder / name).items()}


def kill_once(out: Path, chance: random.Random, target: int, write: bool) -> dict[str, object]:
    """Resume, and kill a random moment after step `target`, or after a write then begins."""
    folder = out / checkpoint.CHECKPOINTS
    process = launch(out)
    while last_step(out) < target and process.poll() is None:
        time.sleep(0.002)
    while write and not any(folder.glob(".step-*.new")) and process.poll() is None:
        pass
    time.sleep(chance.uniform(0, 0.02 if write else 0.1))
    process.kill()
    process.wait()
    left = sorted(p.name for p in folder.glob(".step-*"))
    return {"killed_after_step": last_step(out), "left_behind": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "resume")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    work = Path(tempfile.mkdtemp())
    kills = []
    for k in range(args.kills):
        target = round(230 * (k + 1) / (args.kills + 1))
        kills.append(kill_once(work / "killed", chance, target, write=k % 2 == 1))
        print(f"kill {k + 1}: {kills[-1]}", flush=True)
    for name in ("killed", "whole"):
        assert launch(work / name).wait() == 0
    killed, whole = tensors(work / "killed"), tensors(work / "whole")
    same = killed.keys() == whole.keys() and all(torch.equal(killed[k], whole[k]) for k in whole)
    report = {
        "bit_for_bit": same,
        "tensors": len(whole),
        "kills": kills,
        "kills_during_a_write": sum(bool(k["left_behind"]) for k in kills),
        "provenance": provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    text = (
        f"# Resume after SIGKILL\n\n{args.kills} kills, {report['kills_during_a_write']} of them "
        f"while a checkpoint was being written; {len(whole)} tensors (weights, both EMAs, "
        f"optimizer moments) of the final state compared with the undisturbed run: "
        f"**{'equal, bit for bit' if same else 'DIFFERENT'}**.\n\n{as_markdown(provenance())}"
    )
    (args.out / "README.md").write_text(text)
    print(text)
    shutil.rmtree(work)
    sys.exit(not same)


if __name__ == "__main__":
    main()
