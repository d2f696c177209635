"""anystep info: what a model is and what it may be asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from anystep import checkpoint
from anystep.arguments import Where, parse
from anystep.registry import to_json


@dataclass(frozen=True)
class InfoArgs:
    """Show what a model is and what it may be asked, as JSON.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
    """

    model: Where


def run(args: Sequence[str]) -> int:
    """Show what a model is and what it may be asked."""
    request = parse(InfoArgs, args, "anystep info")
    folder = checkpoint.find_model(request.model)
    model = checkpoint.load_model(folder)
    info = checkpoint.read_info(folder)
    about = {
        "model": str(folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "spec": to_json(model.spec),
        "network": info["network"],
        "training": info["training"],
    }
    print(json.dumps(about, indent=2))
    return 0
