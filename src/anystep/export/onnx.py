"""ONNX and torch.export files, which run without this library."""

from dataclasses import dataclass

from anystep.export import Export
from anystep.interop.onnx import export
from anystep.share import read_source


@dataclass(frozen=True)
class Onnx(Export):
    """The network, and sampling in one step, as graphs.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
        out: a new folder.
    """

    def write(self) -> str:
        """Write the graphs and run them against the model."""
        export(read_source(self.model).model, self.out)
        return (
            f"next: onnxruntime.InferenceSession('{self.out}/one_step.onnx'), see docs/deploy.md"
        )
