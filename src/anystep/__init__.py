"""anystep: generative models whose number of sampling steps is chosen after training."""

from anystep.checkpoint import load_model, save_model
from anystep.errors import UserError
from anystep.sampling import sample
from anystep.share import from_pretrained, push_to_hub, save_pretrained
from anystep.spec import Model, ModelSpec

__version__ = "0.1.0"

__all__ = [
    "Model",
    "ModelSpec",
    "UserError",
    "from_pretrained",
    "load_model",
    "push_to_hub",
    "sample",
    "save_model",
    "save_pretrained",
]
