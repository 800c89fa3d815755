"""Training structured models with PyTorch: modules, distillation, checkpoints, export.

>>> from tvmstruct import training
>>> student, rows = training.convert(teacher, plan, project=False)
>>> loss = training.DistillationLoss(coefficients)
>>> source = training.export(student.eval())  # the parameters bit for bit

Needs the extra ``torch``; importing this module without it raises MissingDependencyError.
"""

from tvmstruct.errors import MissingDependencyError

try:
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ImportError as error:
    raise MissingDependencyError(
        "tvmstruct.training needs PyTorch: pip install tvmstruct[torch]"
    ) from error

from tvmstruct.training.checkpoint import load_checkpoint, save_checkpoint
from tvmstruct.training.convert import Converted, convert, plan_recurrent
from tvmstruct.training.distillation import (
    DistillationLoss,
    Terms,
    balance,
    choose_coefficients,
    clip_gradients,
    clip_limits,
)
from tvmstruct.training.embedding import StructuredEmbedding
from tvmstruct.training.export import export
from tvmstruct.training.initialise import initialise
from tvmstruct.training.language_model import LanguageModel
from tvmstruct.training.linear import StructuredLinear
from tvmstruct.training.lookup import StructuredLookup
from tvmstruct.training.recurrent import StructuredGRU, StructuredLSTM

__all__ = [
    "Converted",
    "DistillationLoss",
    "LanguageModel",
    "StructuredEmbedding",
    "StructuredGRU",
    "StructuredLSTM",
    "StructuredLinear",
    "StructuredLookup",
    "Terms",
    "balance",
    "choose_coefficients",
    "clip_gradients",
    "clip_limits",
    "convert",
    "export",
    "initialise",
    "load_checkpoint",
    "plan_recurrent",
    "save_checkpoint",
]
