"""What a committed result must say of itself: command, commit, machine, versions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str | int]:
    """Where and how a result was made."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    status = subprocess.run(
        [*git, "status", "--porcelain", "src", "benchmarks"], capture_output=True, text=True
    )
    command = ["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "commit": commit.stdout.strip() + ("+changes" if status.stdout else ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.machine()


def as_markdown(facts: dict[str, str | int]) -> str:
    """The facts as a list."""
    return "".join(f"* {key}: `{value}`\n" for key, value in facts.items())
