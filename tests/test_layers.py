"""Each layer imports only from those above it (docs/conventions.md)."""

import ast
from pathlib import Path

import anystep

SOURCE = Path(anystep.__file__).parent
LAYERS = [
    {"errors", "registry"},
    {"path", "spec", "guidance", "oracle", "compute"},
    {"networks"},
    {"sampling"},
    {"objectives"},
    {"data", "metrics", "ema", "checkpoint", "interop", "figures", "trackers", "log"},
    {
        "parallel",
        "config",
        "presets",
        "pairs",
        "encode",
        "start",
        "state",
        "train",
        "evaluate",
        "report",
        "interpolation",
    },
    {"provenance"},
    {"card"},
    {"share"},
    {"compare", "doctor"},
    {"arguments"},
    {"export"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path):
    """The anystep modules that a file imports, by their first name inside the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "anystep":
                yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "anystep" and len(parts) > 1:
                    yield parts[1]


def test_no_import_points_down():
    files = [p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        mine = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for theirs in imports(path):
            assert mine == theirs or RANK[theirs] <= RANK[mine], f"{path} imports {theirs}"


def test_every_module_has_a_layer():
    found = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__"} == set(RANK)


def test_objectives_do_not_import_each_other():
    names = {p.stem for p in (SOURCE / "objectives").glob("[!_]*.py")}
    for name in names:
        text = (SOURCE / "objectives" / f"{name}.py").read_text()
        assert not any(f"anystep.objectives.{other}" in text for other in names)
