"""The loss of three terms, the rule for its coefficients, clipping of shared matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvmstruct.errors import InputError

pytest.importorskip("torch")

import torch

from tvmstruct.training import (
    DistillationLoss,
    LanguageModel,
    StructuredLinear,
    Terms,
    balance,
    choose_coefficients,
    clip_gradients,
    clip_limits,
)

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 4, 5))
TARGETS = RNG.integers(5, size=(3, 4))


def loss(coefficients: Terms) -> float:
    tensors = map(torch.from_numpy, (STUDENT, TEACHER, TARGETS))
    return DistillationLoss(coefficients)(*tensors).item()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_terms_are_those_of_the_paper() -> None:
    own, other = log_softmax(STUDENT), log_softmax(TEACHER)
    labels = -np.take_along_axis(own, TARGETS[..., None], -1).mean()
    mse = ((STUDENT - TEACHER) ** 2).mean()
    kl = (np.exp(other) * (other - own)).sum(-1).mean()
    assert loss(Terms(target=1)) == pytest.approx(labels)
    assert loss(Terms(mse=1)) == pytest.approx(mse)
    assert loss(Terms(kl=1)) == pytest.approx(kl)
    assert loss(Terms(1, 30, 1000)) == pytest.approx(labels + 30 * mse + 1000 * kl)


def test_nothing_flows_to_the_teacher() -> None:
    student, teacher = (torch.from_numpy(a).requires_grad_() for a in (STUDENT, TEACHER))
    DistillationLoss(Terms(1, 1, 1))(student, teacher, torch.from_numpy(TARGETS)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_teacher_of_the_same_logits_leaves_the_labels_only() -> None:
    student = torch.from_numpy(STUDENT)
    both = DistillationLoss(Terms(1, 5, 7))(student, student, torch.from_numpy(TARGETS))
    assert both.item() == pytest.approx(loss(Terms(target=1)))


def test_without_a_teacher_only_labels_count() -> None:
    student, targets = torch.from_numpy(STUDENT), torch.from_numpy(TARGETS)
    found = DistillationLoss(Terms(target=2.0))(student, None, targets).item()
    assert found == pytest.approx(2 * loss(Terms(target=1)))
    with pytest.raises(InputError, match="needs the teacher"):
        DistillationLoss(Terms(1, 0, 1))(student, None, targets)


@pytest.mark.parametrize("bad", [Terms(-1.0), Terms(1, math.nan), Terms(1, 0, math.inf)])
def test_refused_coefficients(bad: Terms) -> None:
    with pytest.raises(InputError, match="none below 0"):
        DistillationLoss(bad)


def test_the_rule_gives_the_papers_coefficients() -> None:
    """Section 4: losses 4.110, 0.133 and 0.004 led to 1, 30 and 1000, by hand."""
    found = balance(Terms(4.110, 0.133, 0.004))
    assert found.target == 1
    assert found.mse == pytest.approx(30, rel=0.05)
    assert found.kl == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("bad", [Terms(4, 0, 1), Terms(4, 1, math.nan), Terms(math.inf, 1, 1)])
def test_losses_that_say_nothing_are_refused(bad: Terms) -> None:
    with pytest.raises(InputError, match="three positive numbers"):
        balance(bad)


def test_three_runs_with_one_term_each_choose_the_coefficients() -> None:
    """With the coefficients found, the three terms of a student trained alone weigh the same."""
    torch.manual_seed(0)
    teacher = StructuredLinear.of("low_rank", 6, 5, r=5)
    x, targets = torch.randn(64, 6), torch.randint(5, (64,))
    logits = teacher(x).detach()
    asked: list[Terms] = []

    def train(coefficients: Terms) -> Terms:
        asked.append(coefficients)
        torch.manual_seed(1)
        student = StructuredLinear.of("low_rank", 6, 5, r=1)
        optimiser, criterion = torch.optim.Adam(student.parameters(), 0.05), None
        criterion = DistillationLoss(coefficients)
        for _ in range(60):
            optimiser.zero_grad()
            criterion(student(x), logits, targets).backward()
            optimiser.step()
        with torch.no_grad():
            found = DistillationLoss(Terms(1, 1, 1)).terms(student(x), logits, targets)
        return Terms(*(t.item() for t in found))

    found = choose_coefficients(train)
    assert asked == [Terms(1, 0, 0), Terms(0, 1, 0), Terms(0, 0, 1)]
    target, mse, kl = (train(c) for c in list(asked))
    weighted = found.target * target.target, found.mse * mse.mse, found.kl * kl.kl
    assert weighted == pytest.approx([weighted[0]] * 3)


def test_shared_matrices_get_smaller_limits() -> None:
    vvma = StructuredLinear.of("vvma", 24, 36, k=6)
    limits = {id(p): limit for p, limit in clip_limits(vvma, 1.0)}
    shared = next(a for a in vvma.arrays() if tuple(a.shape) == (6, 6))
    assert limits == {id(shared): 1 / math.sqrt(4)}  # transposed form: once per input block
    kronecker = StructuredLinear.of("kronecker", 24, 36, r=2, a=(4, 9), b=(6, 4))
    uses = [uses for _, uses in kronecker.uses()]
    assert sorted(limit for _, limit in clip_limits(kronecker, 2.0)) == pytest.approx(
        sorted(2 / math.sqrt(n) for n in uses)
    )
    assert not list(clip_limits(StructuredLinear.of("lgp_shuffle", 24, 36, g=3), 1.0))


def test_a_step_at_the_limit_moves_the_matrix_as_far_as_a_free_one() -> None:
    layer = StructuredLinear.of("kronecker", 24, 36, r=1, a=(24, 36), b=(1, 1), bias=False)
    identity = StructuredLinear.of("vvma", 24, 24, k=4, transposed=True, bias=False)
    for module in (layer, identity):
        for parameter, limit in clip_limits(module, 1.0):
            uses = dict((id(p), n) for p, n in module.uses())[id(parameter)]
            step = torch.randn_like(parameter)
            step *= limit / step.norm()
            blocks = torch.block_diag(*[step.reshape(step.shape[-2:])] * uses)
            assert blocks.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_clipping_bounds_every_shared_parameter_and_the_whole() -> None:
    torch.manual_seed(0)
    layer = StructuredLinear.of("vvma", 24, 36, k=6)
    (1e3 * layer(torch.randn(8, 24))).square().sum().backward()
    norm = clip_gradients(layer, 0.5)
    assert norm > 0.5
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(0.5, rel=1e-4)
    for parameter, limit in clip_limits(layer, 0.5):
        assert parameter.grad is not None
        assert parameter.grad.norm() <= limit * 1.0001


def test_small_gradients_are_left_as_they_are() -> None:
    model = LanguageModel.of(11, 6, 1)
    logits, _ = model(torch.zeros(3, 2, dtype=torch.long))
    (1e-4 * logits.sum()).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    clip_gradients(model, 1.0)
    assert all(torch.equal(before[n], p.grad) for n, p in model.named_parameters() if n in before)
