"""anystep: generative models whose number of sampling steps is chosen after training."""

from anystep.checkpoint import load_model, save_model
from anystep.errors import UserError
from anystep.sampling import sample
from anystep.spec import Model, ModelSpec

__version__ = "0.1.0"

__all__ = ["Model", "ModelSpec", "UserError", "load_model", "sample", "save_model"]
