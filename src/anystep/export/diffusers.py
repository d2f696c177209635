"""A pipeline folder for diffusers, which samples it in any number of steps."""

from dataclasses import dataclass
from pathlib import Path

from anystep import checkpoint
from anystep.card import sampling_with_diffusers, write_card
from anystep.errors import UserError
from anystep.export import Export
from anystep.interop.vae import recorded
from anystep.share import QUALITY, beside, new_folder, read_source, scores_of


@dataclass(frozen=True)
class Diffusers(Export):
    """A pipeline that diffusers loads where anystep is installed.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
        out: a new folder.
        quality: folder of a report of `anystep eval` for the card; the run's own by default.
        vae: the folder where the VAE of a latent model lies now; where it was found by default.
    """

    quality: Path | None = None
    vae: Path | None = None

    def write(self) -> str:
        """Write the pipeline and its model card."""
        try:
            from anystep.interop.diffusers import pipeline
        except ImportError as error:
            raise UserError(
                f"this needs diffusers 0.39 or later ({error}): pip install 'anystep[diffusers]'"
            ) from None
        out = new_folder(self.out)
        source = read_source(self.model)
        spec = source.model.spec
        if spec.vae is None and self.vae is not None:
            raise UserError("this is no latent model: it takes no --vae")
        vae = None if spec.vae is None else recorded(spec.vae, self.vae)
        info = source.info if vae is None else beside(source.info)
        made = pipeline(source.model, info, vae)
        scores = scores_of(source, out.name, self.quality)
        with checkpoint.replacing(out) as new:
            made.save_pretrained(new)
            if scores is not None:
                checkpoint.write_json(new / QUALITY, scores)
            usage = sampling_with_diffusers(out.name, spec)
            write_card(new, out.name, source.model, info, scores, usage)
        return (
            f"next: AnyStepPipeline.from_pretrained({str(self.out)!r}), see {self.out}/README.md"
        )
