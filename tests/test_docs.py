"""What the pages show is run, and what they name exists."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import test_objectives as contract
from anystep import objectives, registry
from anystep.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def objective_of_the_page(tmp_path, monkeypatch):
    """The file that docs/add-an-objective.md shows, where a new file would stand."""
    page = (ROOT / "docs" / "add-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "from_the_page.py").write_text(code)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    return "from_the_page"


def test_the_objective_of_the_page_keeps_the_contract(objective_of_the_page):
    method = objective_of_the_page
    assert method in registry.names("anystep.objectives")
    tests = contract.TestContract()
    checks = [getattr(tests, name) for name in dir(tests) if name.startswith("test_")]
    assert len(checks) >= 7
    for check in checks:
        for kind in contract.SMALL:
            check(method, kind)
    contract.test_the_exact_u_is_a_fixed_point(method)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_results_named_on_a_page_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"\b(results/[\w./-]*\w)", text)
    for target in links:
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for target in named:
        assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_readme_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"torch": torch})


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "results").glob("*/*/model.json")), ids=lambda p: p.parent.name
)
def test_weights_that_are_in_the_checkout_sample(folder, tmp_path):
    out = tmp_path / "samples.npz"
    assert (
        main(["sample", str(folder.parent), "--n", "20", "--steps", "1", "--out", str(out)]) == 0
    )
    samples = np.load(out)["samples"]
    assert samples.shape[0] == 20 and np.abs(samples).max() < 2
    assert samples.std(0).mean() > 0.2  # garments, not one blur
