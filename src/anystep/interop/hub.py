"""Models on the Hugging Face hub: their names, fetching them, putting them there.

huggingface_hub is imported when a model of the hub is first asked for, and nowhere else.
"""

import re
from pathlib import Path
from typing import Any

from anystep.errors import UserError

NAME = re.compile(r"(?P<owner>\w[\w.-]*)/\w[\w.-]*(?P<revision>@\S+)?")
# What a model needs; config.json is asked for because the hub counts downloads by it.
FILES = ("model.json", "model.safetensors", "config.json", "quality.json", "vae/*")
LOGIN = "log in with: hf auth login"
REASONS = {  # the first that fits
    "GatedRepoError": f"ask for access on its page, and {LOGIN}",
    "RepositoryNotFoundError": f"there is no such model, or it is private ({LOGIN})",
    "RevisionNotFoundError": "it has no such revision",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub cannot be reached",
    "OfflineModeIsEnabled": "the hub is not to be asked: HF_HUB_OFFLINE is set",
    "LocalTokenNotFoundError": LOGIN,
}


def is_name(path: Path) -> bool:
    """Whether `path` names a model on the hub: owner/name, or owner/name@revision.

    What is here wins. A name without a revision whose owner is a folder here is a slip of the
    pen in a local path, as in runs/digits-shortct, and nobody is asked about it.
    """
    found = NAME.fullmatch(path.as_posix())
    if found is None or path.exists():
        return False
    return bool(found["revision"]) or not Path(found["owner"]).is_dir()


def fetch(name: str) -> Path:
    """The folder of a model of the hub, downloaded or from the cache.

    Args:
        name: owner/name or owner/name@revision, the revision a branch, a tag or a commit.

    Raises:
        UserError: huggingface_hub is not installed, or the model cannot be had.
    """
    repo, _, revision = name.partition("@")
    library = _library()
    try:
        folder = library.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(FILES)
        )
    except Exception as error:  # the network, the hub and the cache fail each in their own way
        raise UserError(
            f"{name} is no folder here, nor to be had from the Hugging Face hub: {reason(error)}"
        ) from None
    return Path(folder)


def push(folder: Path, repo: str, *, private: bool | None = None) -> str:
    """Put a folder on the hub, making the repository if there is none; returns its address.

    Args:
        folder: what to put there.
        repo: owner/name.
        private: of a new repository; None is the owner's default.

    Raises:
        UserError: huggingface_hub is not installed, or the hub refuses.
    """
    library = _library()
    try:
        address = str(library.create_repo(repo, private=private, exist_ok=True))
        library.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload with anystep"
        )
    except Exception as error:  # as in `fetch`
        raise UserError(f"cannot push to {repo}: {reason(error)}") from None
    return address


def check_repo(repo: str) -> None:
    """Raise `UserError` unless `repo` is owner/name."""
    found = NAME.fullmatch(repo)
    if found is None or found["revision"]:
        raise UserError(f"{repo!r} is no name on the hub: write owner/name")


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    known = [line for kind, line in REASONS.items() if kind in kinds]
    return known[0] if known else " ".join(str(error).split()) or type(error).__name__


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"the hub needs huggingface_hub ({error}): pip install 'anystep[share]'"
        ) from None
    return huggingface_hub
