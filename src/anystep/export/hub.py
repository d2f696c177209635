"""A folder for the Hugging Face hub: weights, metadata, a model card."""

from dataclasses import dataclass
from pathlib import Path

from anystep.errors import UserError
from anystep.export import Export
from anystep.interop import hub
from anystep.share import save_pretrained


@dataclass(frozen=True)
class Hub(Export):
    """A folder to share: weights, metadata and a model card; on the hub too with --push.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
        out: a new folder.
        half: store the weights in half precision.
        quality: folder of a report of `anystep eval` for the card; the run's own by default.
        vae: the folder where the VAE of a latent model lies now; where it was found by default.
        push: owner/name to put the folder on the hub as.
        private: make a new repository on the hub private.
    """

    half: bool = False
    quality: Path | None = None
    vae: Path | None = None
    push: str | None = None
    private: bool = False

    def write(self) -> str:
        """Write the folder, and push it if it is to be pushed."""
        if self.push is not None:
            hub.check_repo(self.push)
        elif self.private:
            raise UserError("--private is for a repository on the hub: name it with --push")
        folder = save_pretrained(
            self.model,
            self.out,
            half=self.half,
            name=self.push,
            quality=self.quality,
            vae=self.vae,
        )
        if self.push is None:
            return f"next: anystep sample {self.out} --steps 4"
        address = hub.push(folder, self.push, private=self.private or None)
        return f"{address}\nnext: anystep sample {self.push} --steps 4"
