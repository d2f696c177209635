"""anystep doctor: find the silent mistakes of a run."""

from collections.abc import Sequence
from pathlib import Path

from anystep import checkpoint
from anystep.commands.train import configured
from anystep.config import TrainConfig
from anystep.doctor import RULES, Case, examine, open_case
from anystep.errors import UserError
from anystep.log import read_metrics
from anystep.presets import PRESETS
from anystep.registry import from_json
from anystep.train import CONFIG, METRICS


def run(args: Sequence[str]) -> int:
    """Usage: anystep doctor RUN | anystep doctor PRESET [options of anystep train].

    Says what is silently wrong with a run, one line each, and what to do about it. RUN is a run's
    folder. Before training, put doctor where train stands: PRESET is a dataset or a config.json.
    The exit code is 0 when nothing is found and 1 when something is.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(str(run.__doc__).replace("\n    ", "\n"))
        return 0 if words else 2
    findings = examine(case_of(words))
    for name, line in findings:
        print(f"{name}: {line}")
    count = len(findings)
    some = f"{count} finding{'s' if count > 1 else ''}"
    print(some if findings else f"{len(RULES)} rules found nothing")
    return 1 if findings else 0


def case_of(words: Sequence[str]) -> Case:
    """The case that the words of the command line name."""
    folder = Path(words[0])
    if not (folder / CONFIG).is_file():
        if folder.is_dir() and words[0] not in PRESETS:
            raise UserError(f"{folder} is no run: it holds no {CONFIG}")
        return open_case(configured("anystep doctor", words))
    if words[1:]:
        raise UserError(f"unexpected argument {words[1]!r}: {folder} says all about itself")
    config = from_json(TrainConfig, checkpoint.read_json(folder / CONFIG))
    return open_case(config, read_metrics(folder / METRICS))
