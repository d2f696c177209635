"""anystep export: a model in a format that others read."""

import importlib
from collections.abc import Sequence

from anystep.arguments import parse
from anystep.errors import UserError
from anystep.export import Export
from anystep.registry import find, names


def run(args: Sequence[str]) -> int:
    """Usage: anystep export FORMAT RUN OUT [--OPTION VALUE ...].

    RUN is a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub; OUT is
    what to write. `anystep export FORMAT --help` lists the options.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(export_help())
        return 0 if words else 2
    name = words.pop(0)
    if name.startswith("-"):
        raise UserError(f"name a format first: anystep export {'|'.join(names(Export.PACKAGE))}")
    request = parse(find(Export.PACKAGE, name), words, f"anystep export {name}")
    next_step = request.write()
    print(request.out)
    print(next_step)
    return 0


def export_help() -> str:
    """Help of `anystep export` with the formats."""
    lines = [str(run.__doc__).replace("\n    ", "\n"), "formats:"]
    for name in names(Export.PACKAGE):
        about = importlib.import_module(f"{Export.PACKAGE}.{name}").__doc__
        lines.append(f"  {name:<11}{str(about).splitlines()[0]}")
    return "\n".join(lines)
