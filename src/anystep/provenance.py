"""What a result must say of itself: command, commit, machine, versions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import anystep


def provenance() -> dict[str, str | int]:
    """Where and how a result is being made."""
    program = Path(sys.argv[0]).name
    start = [] if program == "anystep" else ["python"]
    for folder in ("benchmarks", "examples"):
        if start and (Path.cwd() / folder / program).is_file():
            program = f"{folder}/{program}"
    return {
        "command": " ".join([*start, program, *sys.argv[1:]]),
        "version": anystep.__version__,
        "commit": _commit() or "not a checkout",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def as_markdown(facts: dict[str, str | int]) -> str:
    """The facts as a list."""
    return "".join(f"* {key}: `{value}`\n" for key, value in facts.items())


def _commit() -> str:
    """The commit of the checkout that holds this file; "+changes" if its code differs."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, status = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "."))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("+changes" if status else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.machine()
