"""Save and share a model in the Hugging Face manner.

A *shared folder* is a model folder, `model.safetensors` and `model.json`, with what a stranger
wants beside it: a model card with a picture, the scores of `anystep eval` if there are any, the
config of the run, and the autoencoder of a latent model that lies on this machine alone. It names
no folder of this machine.
"""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystep import checkpoint
from anystep.card import write_card
from anystep.errors import UserError
from anystep.evaluate import REAL
from anystep.interop import hub
from anystep.interop.vae import VAE, recorded
from anystep.networks import NetworkConfig, build_model, config_of
from anystep.registry import to_json
from anystep.sampling import draw
from anystep.spec import Model, ModelSpec

CONFIG, QUALITY = "config.json", "quality.json"


@dataclass(frozen=True)
class Source:
    """A model to be shared, and what is known of it.

    Attributes:
        model: the model, on the CPU if it was read from a file.
        info: the content of its `model.json`, naming no folder of this machine.
        path: where it was read; None for a model that was not.
        folder: its model folder; None likewise.
    """

    model: Model
    info: dict[str, Any]
    path: Path | None = None
    folder: Path | None = None


def save_pretrained(
    model: Model | Path | str,
    folder: Path | str,
    *,
    half: bool = False,
    name: str | None = None,
    quality: Path | None = None,
    vae: Path | None = None,
) -> Path:
    """Write a shared folder.

    Args:
        model: a run, a checkpoint, a model folder, a name on the hub, or a `Model`, of whose
            training the card then says nothing.
        folder: where; a new or an empty folder.
        half: store the weights as float16; loading casts them back.
        name: what the card calls the model, and says it is loaded by; the folder's by default.
        quality: folder of a report of `anystep eval`; the run's own by default.
        vae: where the VAE of a latent model lies now; where it was found by default.

    Returns:
        The folder.

    Raises:
        UserError: there is no such model, VAE or report, the folder is not empty, or weights are
            too large for half precision.
    """
    folder = new_folder(folder)
    source = read_source(model)
    name = name or folder.name
    scores = scores_of(source, name, quality)
    autoencoder = own_vae(source.model.spec, vae)
    state: Mapping[str, Tensor] = source.model.net.state_dict()
    info = source.info if autoencoder is None else beside(source.info)
    documents = {checkpoint.MODEL: info}
    if info["training"].get("config"):
        documents[CONFIG] = info["training"]["config"]
    if scores is not None:
        documents[QUALITY] = scores
    with checkpoint.replacing(folder) as new:
        weights = {checkpoint.WEIGHTS: halved(state) if half else state}
        checkpoint.write_files(new, weights, documents)
        if autoencoder is not None:
            save_vae(autoencoder, new / checkpoint.VAE)
        write_card(new, name, source.model, info, scores)
    return folder


def from_pretrained(
    name: Path | str, *, revision: str | None = None, device: torch.device | str = "cpu"
) -> Model:
    """The model of a folder, a run, a checkpoint, or a name on the hub, ready to sample.

    Args:
        name: a folder, or owner/name.
        revision: of a name on the hub, a branch, a tag or a commit; its newest by default.
        device: where the model goes.

    Raises:
        UserError: there is no such model.
    """
    return checkpoint.load_model(f"{name}@{revision}" if revision else name, device)


def push_to_hub(
    model: Model | Path | str,
    repo: str,
    *,
    private: bool | None = None,
    half: bool = False,
    quality: Path | None = None,
    vae: Path | None = None,
) -> str:
    """Share a model as owner/name on the hub; returns the address.

    Args:
        model: as for `save_pretrained`.
        repo: owner/name; made if there is none.
        private: of a new repository; None is the owner's default.
        half: as for `save_pretrained`.
        quality: likewise.
        vae: likewise.

    Raises:
        UserError: as for `save_pretrained`, or the hub refuses.
    """
    hub.check_repo(repo)
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(
            model, Path(place) / "model", half=half, name=repo, quality=quality, vae=vae
        )
        return hub.push(folder, repo, private=private)


def read_source(model: Model | Path | str) -> Source:
    """The model, and what may be said of it to others.

    Raises:
        UserError: there is no such model.
    """
    if isinstance(model, Model):
        network = config_of(model.net)
        check_rebuilt(model, network)
        return Source(model, portable(checkpoint.model_info(network, model.spec)))
    path = Path(model)
    folder = checkpoint.find_model(path)
    info, loaded = checkpoint.read_info(folder), checkpoint.load_model(folder)
    info["spec"] = to_json(loaded.spec)
    return Source(loaded, portable(info), path, folder)


@torch.no_grad()
def check_rebuilt(model: Model, network: NetworkConfig) -> None:
    """Raise `UserError` unless config, spec and weights make the same function again."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        twin = build_model(network, model.spec)
    try:
        twin.net.load_state_dict(model.net.state_dict())
    except RuntimeError as error:
        raise UserError(f"the weights do not fit: {' '.join(str(error).split())}") from None
    weight = next(model.parameters())  # says where and in what precision
    x0, cond = draw(model.spec, 4, torch.Generator().manual_seed(0))
    x, t = x0.to(weight), torch.full((4,), 0.5).to(weight)
    cond = None if cond is None else cond.to(weight.device)
    nets, training = (model.net.eval(), twin.net.to(weight).eval()), model.training
    sizes = (torch.zeros_like(t), t)
    ours, theirs = (torch.stack([net(x, t, d, cond) for d in sizes]) for net in nets)
    model.net.train(training)
    if not torch.allclose(ours, theirs, atol=1e-4, equal_nan=True):
        raise UserError(
            "this network is not the one its config and spec make: build it with "
            "config.build(spec.shape, spec.num_classes, spec.finest)"
        )


def portable(value: Any) -> Any:
    """JSON data in which a path from the root of this machine is its last name alone."""
    if isinstance(value, Mapping):
        return {key: portable(v) for key, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def new_folder(folder: Path | str) -> Path:
    """The folder, as an absolute path.

    Raises:
        UserError: there is something in it, or it is a file.
    """
    folder = Path(folder).absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    return folder


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with their floats as float16, which keeps more of their digits than bfloat16.

    Raises:
        UserError: one of them is too large for it.
    """
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    for name, value in half.items():
        if not value.isfinite().all():
            raise UserError(f"{name} does not fit half precision; leave half out")
    return half


def own_vae(spec: ModelSpec, path: Path | None) -> VAE | None:
    """The VAE to share with a model; None where the hub has it, or there is none.

    Raises:
        UserError: it lies on this machine and cannot be loaded, or is another one.
    """
    if spec.vae is None:
        if path is not None:
            raise UserError("this is no latent model: it takes no VAE")
        return None
    if path is None and not Path(spec.vae.name).is_absolute():
        return None
    return recorded(spec.vae, path)


def beside(info: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `model.json` whose VAE lies beside it."""
    vae = {**info["spec"]["vae"], "name": ".", "revision": None, "subfolder": checkpoint.VAE}
    return {**info, "spec": {**info["spec"], "vae": vae}}


def save_vae(vae: VAE, folder: Path) -> None:
    """Write the autoencoder, without the path it was read from."""
    vae.net.register_to_config(_name_or_path="")
    vae.net.save_pretrained(folder)


def scores_of(source: Source, name: str, quality: Path | None) -> dict[str, Any] | None:
    """What a report of `anystep eval` says of a model, under the name it is shared by.

    Args:
        source: the model.
        name: what it is called from now on.
        quality: folder of the report. By default it is looked for in the run and in the model
            folder, and one that is older than the weights is left out with a warning.

    Raises:
        UserError: there is no report in `quality`, or none of this model.
    """
    report = find_report(source, quality)
    if report is None:
        return None
    content = checkpoint.read_json(report)
    try:
        names = list(dict.fromkeys(r["model"] for r in content["rows"] if r["model"] != REAL))
        ours = called(names, source, alone=quality is None or source.path is None)
        rows = [r for r in content["rows"] if r["model"] in (ours, REAL)]
        gap = content["semigroup_gap"].get(ours)
        scores = {
            "rows": [r | {"model": name} if r["model"] == ours else r for r in rows],
            "semigroup_gap": {} if gap is None else {name: gap},
            "notes": list(content["notes"]),
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{report} is no report of anystep eval") from None
    if ours is not None:
        return scores
    line = f"{report} says nothing of {source.path} (it judges {', '.join(names)})"
    if quality is not None:
        raise UserError(line)
    warnings.warn(f"{line}: name its report with --quality", stacklevel=3)
    return None


def find_report(source: Source, quality: Path | None) -> Path | None:
    """The file of the report; None where there is none that is of these weights."""
    if quality is not None:
        return quality / QUALITY  # that it is missing is said when it is read
    if source.path is None or source.folder is None:
        return None
    found = [p / QUALITY for p in (source.path, source.folder) if (p / QUALITY).is_file()]
    if not found:
        return None
    if found[0].parent != source.folder and older(found[0], source.folder / checkpoint.MODEL):
        warnings.warn(
            f"{found[0]} is older than the model and is left out: anystep eval judges it again",
            stacklevel=4,
        )
        return None
    return found[0]


def older(path: Path, other: Path) -> bool:
    """Whether a file was written before another."""
    return path.stat().st_mtime < other.stat().st_mtime


def called(names: list[str], source: Source, *, alone: bool) -> str | None:
    """The name under which a report judges a model; None when it does not.

    Args:
        names: of the models that the report judges.
        source: the model.
        alone: a single one is this model, whatever its name.
    """
    if alone and len(names) == 1:
        return names[0]
    if source.path is None:
        return None
    same = [n for n in names if Path(n).resolve() == source.path.resolve()]
    alike = same or [n for n in names if Path(n).name == source.path.name]
    return alike[0] if len(alike) == 1 else None
