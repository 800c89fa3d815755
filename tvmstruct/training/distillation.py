"""AntMan's loss of three terms, its rule for their coefficients, and clipping of shared matrices.

``loss = C_target CE(student, targets) + C_mse MSE(student, teacher) + C_kl KL(teacher || student)``
(Rajbhandari et al. 2019, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvmstruct.errors import InputError
from tvmstruct.training.linear import StructuredOperator


@dataclass(frozen=True)
class Terms:
    """One number for each of the three terms: losses, or their coefficients."""

    target: float = 0.0
    mse: float = 0.0
    kl: float = 0.0


ALONE = (Terms(target=1.0), Terms(mse=1.0), Terms(kl=1.0))


def balance(converged: Terms) -> Terms:
    """Return the coefficients that make all terms as large as the target's; that one's is 1.

    ``converged`` holds each loss as it is after training with it alone (section 4). Raises
    InputError where one is not a positive number: such a term says nothing.

    >>> balance(Terms(4.110, 0.133, 0.004))  # the paper's: 1, 30 and 1000
    Terms(target=1.0, mse=30.902255639097744, kl=1027.5)
    """
    losses = astuple(converged)
    if not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise InputError(f"coefficients: the losses {converged}; want three positive numbers")
    return Terms(*(converged.target / loss for loss in losses))


def choose_coefficients(train: Callable[[Terms], Terms]) -> Terms:
    """Return coefficients from three short runs of ``train``, one with each term alone.

    ``train(coefficients)`` trains a student from its initial weights and returns the losses on
    held-out data.
    """
    alone = [astuple(train(coefficients))[k] for k, coefficients in enumerate(ALONE)]
    return balance(Terms(*alone))


class DistillationLoss(nn.Module):
    """The weighted sum of the three terms; a term whose coefficient is 0 is not computed.

    MSE is the mean over logits; cross entropy and KL are nats per position.
    """

    def __init__(self, coefficients: Terms) -> None:
        super().__init__()
        if not all(math.isfinite(c) and c >= 0 for c in astuple(coefficients)):
            raise InputError(f"distillation: coefficients {coefficients}; want none below 0")
        self.coefficients = coefficients

    def terms(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three terms of logits (..., vocabulary) and targets (...), unweighted."""
        c, zero = self.coefficients, student.new_zeros(())
        if teacher is None and (c.mse or c.kl):
            raise InputError(f"distillation: {c} needs the teacher's logits")
        student = student.flatten(0, -2)
        target = F.cross_entropy(student, targets.flatten()) if c.target else zero
        if teacher is None:
            return target, zero, zero
        teacher = teacher.detach().flatten(0, -2)
        mse = F.mse_loss(student, teacher) if c.mse else zero
        return target, mse, _divergence(student, teacher) if c.kl else zero

    def forward(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Return the weighted sum; logits (..., vocabulary), targets (...) of integers."""
        terms = self.terms(student, teacher, targets)
        weighted = [c * t for c, t in zip(astuple(self.coefficients), terms, strict=True) if c]
        return torch.stack(weighted).sum() if weighted else student.new_zeros(())


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats, averaged over rows."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def clip_limits(module: nn.Module, max_norm: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield each shared parameter with the largest gradient norm that it should take.

    A block that stands k times in its matrix (VVMA's M, Kronecker factors) gets the sum of k
    gradients, and a step of it moves the matrix by the square root of k times its own norm. With
    ``max_norm / sqrt(k)`` the matrix moves as far as one whose entries are all free.
    """
    for part in module.modules():
        if isinstance(part, StructuredOperator):
            for parameter, uses in part.uses():
                if uses > 1:
                    yield parameter, max_norm / math.sqrt(uses)


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Clip shared parameters by `clip_limits`, then all to ``max_norm``; return the norm before."""
    for parameter, limit in clip_limits(module, max_norm):
        nn.utils.clip_grad_norm_(parameter, limit)
    return nn.utils.clip_grad_norm_(module.parameters(), max_norm)
