"""The wheel, installed alone in a clean environment outside the source tree, samples a model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anystep import checkpoint
from anystep.networks.dit import DiTConfig
from anystep.objectives.shortcut import Shortcut
from anystep.spec import ModelSpec

ROOT = Path(__file__).parents[1]


def call(*args, cwd):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(a) for a in args], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_samples_in_a_clean_environment(tmp_path):
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path / "dist",
        ROOT,
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("anystep-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    call(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
        wheel,
        cwd=tmp_path,
    )
    where = call(python, "-c", "import anystep; print(anystep.__file__)", cwd=tmp_path)
    assert str(tmp_path / "venv") in where

    config = DiTConfig(patch=2, width=16, depth=1, heads=2)
    spec = Shortcut().spec(ModelSpec(shape=(1, 8, 8), num_classes=10))
    net = config.build(spec.shape, 10)
    checkpoint.save_model(tmp_path / "model", net, checkpoint.model_info(config, spec))
    anystep = tmp_path / "venv" / "bin" / "anystep"
    call(anystep, "sample", "model", "--steps", 2, "--n", 6, "--out", "s.npz", cwd=tmp_path)
    call(anystep, "sample", "model", "--steps", 128, "--n", 6, "--out", "s.png", cwd=tmp_path)
    with np.load(tmp_path / "s.npz") as made:
        assert made["samples"].shape == (6, 1, 8, 8) and made["cond"].shape == (6,)
    for preset in ("digits", "fashion-mnist", "mixture"):
        call(anystep, "train", preset, "--dry-run", cwd=tmp_path)
    # The datasets that need an extra say so in one line.
    done = subprocess.run(
        [anystep, "train", "digits"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "pip install 'anystep[digits]'" in done.stderr
