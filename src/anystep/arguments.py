"""Dotted command-line options for dataclasses, with mistakes answered in one line."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from anystep.errors import UserError
from anystep.registry import unknown

Where = Annotated[Path, tyro.conf.Positional]


def parse(cls: Any, args: Sequence[str], prog: str, default: Any = None) -> Any:
    """Parse dotted options; anything wrong is a one-line `UserError`."""
    if "" in args or any(word.endswith("=") for word in args):
        raise UserError("an option has an empty value (an unset shell variable?)")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            value, rest = tyro.cli(
                cls, prog=prog, args=list(args), default=default, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(stderr.getvalue()) or f"see {prog} --help") from None
    if rest:
        known = options(value)
        word = rest[0].split("=")[0]
        raise UserError(
            unknown("option", word.replace("_", "-"), known)
            if word.startswith("-")
            else f"unexpected argument {word!r}; see {prog} --help"
        )
    return value


def one_line(box: str) -> str:
    """The first paragraph of an error message drawn as a box, as one line."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if text and set(text) <= set("─-"):  # a rule; dashes where the terminal is ASCII
            if words:
                break
            continue
        words.append(text.strip("─ "))
    return " ".join(" ".join(words).split())


def options(config: Any, prefix: str = "--") -> list[str]:
    """The dotted options of a dataclass, such as --objective.target-ema."""
    found = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += options(value, f"{name}.")
        else:
            found.append(name)
            if isinstance(value, bool):
                head, dot, last = name.rpartition(".")
                found.append(f"{head}{dot}no-{last}" if dot else f"--no-{last[2:]}")
    return found


def take(words: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `words` and return the value."""
    for k, word in enumerate(words):
        if word == option:
            if k + 1 == len(words):
                raise UserError(f"{option} needs a value")
            return [words.pop(k), words.pop(k)][1]
        if word.startswith(f"{option}="):
            return words.pop(k).partition("=")[2]
    return None


def check_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
