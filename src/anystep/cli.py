"""The command line: which command is asked for, and how mistakes are shown."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import anystep
from anystep.commands import (
    compare,
    doctor,
    encode,
    evaluate,
    export,
    importing,
    info,
    pairs,
    sample,
    train,
)
from anystep.errors import UserError
from anystep.registry import unknown
from anystep.train import INTERRUPTED

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train.run,
    "encode": encode.run,
    "pairs": pairs.run,
    "sample": sample.run,
    "eval": evaluate.run,
    "compare": compare.run,
    "import": importing.run,
    "info": info.run,
    "export": export.run,
    "doctor": doctor.run,
}

HELP = """usage: anystep COMMAND ...

Generative models whose number of sampling steps is chosen after training.

commands (anystep COMMAND --help says more):
  train     train a model:          anystep train digits
  encode    latents or pixels:      anystep encode pictures --vae FOLDER --out latents
  pairs     pairs for reflow:       anystep pairs runs/digits-flow-matching --out pairs
  sample    draw samples:           anystep sample runs/digits-shortcut --steps 4
  eval      judge at every N:       anystep eval runs/digits-shortcut
  compare   methods, equal compute: anystep compare digits
  import    a model of other code:  anystep import kvfrans FILE --out FOLDER
  info      what a model is:        anystep info runs/digits-shortcut
  export    for others to use:      anystep export hub runs/digits-shortcut shared
  doctor    silent mistakes:        anystep doctor runs/digits-shortcut
"""


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show each warning as one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 after a user's mistake."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"anystep {anystep.__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(unknown("command", args[0], COMMANDS))
        with one_line_warnings():
            return COMMANDS[args[0]](args[1:])
    except UserError as error:
        print(f"anystep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        print(f"anystep: {named}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
