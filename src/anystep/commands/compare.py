"""anystep compare: every method at equal compute."""

from collections.abc import Sequence
from pathlib import Path

from anystep import checkpoint
from anystep.arguments import check_folder, parse
from anystep.compare import CompareConfig, Comparison, write_report
from anystep.config import TrainConfig
from anystep.errors import UserError
from anystep.presets import PRESETS, preset
from anystep.registry import from_json


def run(args: Sequence[str]) -> int:
    """Usage: anystep compare PRESET [--methods A B ...] [--seeds 0 1 2] [--budget N] ....

    PRESET is a dataset, as for `anystep train`, or the config.json of a run, whose network, data,
    batch and optimizer then are everybody's. Trains and judges each method at equal compute and
    writes one report; what is finished is not done again. `anystep compare PRESET --help` lists
    the fields.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(str(run.__doc__).replace("\n    ", "\n"))
        return 0 if words else 2
    name = words.pop(0)
    if name.startswith("-"):
        raise UserError(f"name a preset first: anystep compare {'|'.join(PRESETS)}")
    called = Path(name).resolve().parent.name if name.endswith(".json") else name
    start = CompareConfig(out=Path("runs") / f"compare-{called}")
    config = parse(CompareConfig, words, f"anystep compare {name}", start)
    if name.endswith(".json"):
        base = from_json(TrainConfig, checkpoint.read_json(Path(name)))
    else:
        base = preset(name)
    if not isinstance(getattr(base.data, "path", Path()), Path):
        raise UserError(
            f"{name} needs a path: anystep train {name} --data.path PATH --dry-run > config.json, "
            "then anystep compare config.json"
        )
    check_folder(config.out)
    comparison = Comparison(base, config)
    files = write_report(comparison, comparison.run())
    print(files["report"].read_text())
    for what, path in files.items():
        print(f"{what}: {path}")
    return 1 if comparison.failures else 0
