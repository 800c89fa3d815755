"""Programs of stages, run by a small interpreter that shares no code with the kernels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.catalogue import EXPRESSIONS
from tvmstruct import ops, stages
from tvmstruct.families import FAMILIES
from tvmstruct.rounding import EACH, Round
from tvmstruct.stages import Copy, Hadamard, MatMul, Program, X, Y, Zero, lower, merge, split
from tvmstruct.testing import tolerance

LANES = (4, 8, 16)


def interpret(program: Program, x: np.ndarray) -> np.ndarray:
    """Run a program on one row, element by element; unwritten features are NaN."""
    buffers = [np.full(size, np.nan) for size in program.sizes]
    buffers[X] = x.astype(np.float64)
    for stage in program.stages:
        assert stage.dst != X, "a program must not write its input"
        STEPS[type(stage)](stage, buffers, program.weights)
    return buffers[Y]


def _matmul(s: MatMul, buffers, weights) -> None:
    w = weights[s.weight].astype(np.float64)
    for g, q in itertools.product(range(s.groups), range(s.q)):
        total, each = 0.0, EACH.get(s.form, 1)
        for p, index in enumerate(itertools.product(*(range(e) for e, _ in s.depth))):
            at = s.src_offset + g * s.src_group
            at += sum(i * stride for i, (_, stride) in zip(index, s.depth, strict=True))
            for i in range(each):
                total += buffers[s.src][at + i] * w[_packed(s, g, p, q) * each + i]
        place = s.dst_offset + g * s.dst_group + q * s.dst_q
        buffers[s.dst][place] = total + (buffers[s.dst][place] if s.accumulate else 0.0)


def _packed(s: MatMul, g: int, p: int, q: int) -> int:
    """Return where entry (g, p, q) lies, from the layout in the docstring of `MatMul`."""
    if s.vector == "column":
        width = s.lanes * s.tile
        g = 0 if s.shared else g
        return ((g * (s.q // width) + q // width) * s.words + p) * width + q % width
    chunk, t = divmod(q, s.tile)
    if s.shared:
        return (chunk * s.words + p) * s.tile + t
    block, lane = divmod(g, s.lanes)
    return (((block * (s.q // s.tile) + chunk) * s.words + p) * s.tile + t) * s.lanes + lane


def _round(s: Round, buffers, weights) -> None:
    """Move the features without rounding; what lies around them must not matter."""
    each, (groups, stride) = EACH[s.form], s.source.groups
    *outer, (run, step) = s.source.depth
    buffers[s.dst][:] = 1e3
    buffers[s.scale][:] = 1.0
    words = -(-run // each)
    for g, turn, p in itertools.product(
        range(groups), range(math.prod([e for e, _ in outer])), range(run)
    ):
        at = g * stride + p * step + sum(turn * distance for _, distance in outer)
        place = at
        if s.gathered:
            place = ((turn * words + p // each) * groups + g) * each + p % each
        buffers[s.dst][place] = buffers[s.src][s.source.offset + at]


def _copy(s: Copy, buffers, weights) -> None:
    dims = s.dims or ((1, 1),)
    for place, index in enumerate(itertools.product(*(range(e) for e, _ in dims))):
        at = s.src_offset + sum(i * stride for i, (_, stride) in zip(index, dims, strict=True))
        value = buffers[s.src][at]
        if s.weight is not None:
            value *= weights[s.weight][place]
        old = buffers[s.dst][s.dst_offset + place] if s.accumulate else 0.0
        buffers[s.dst][s.dst_offset + place] = value + old


def _hadamard(s: Hadamard, buffers, weights) -> None:
    src, dst = buffers[s.src].copy(), buffers[s.dst]
    offset = s.src_offset if s.in_place else 0
    for index in itertools.product(*(range(e) for e, _, _ in s.loops), range(s.n)):
        *at, i = index
        start = s.src_offset + sum(v * f for v, (_, f, _) in zip(at, s.loops, strict=True))
        place = offset + sum(v * t for v, (_, _, t) in zip(at, s.loops, strict=True))
        place += i * s.axis[1]
        signs = [(-1) ** (i & j).bit_count() for j in range(s.n)]
        total = s.scale * sum(sign * src[start + j * s.axis[0]] for j, sign in enumerate(signs))
        dst[place] = total + (dst[place] if s.accumulate else 0.0)
    if s.owned and not s.in_place:
        buffers[s.src][:] = np.nan  # a kernel may leave anything there


def _zero(s: Zero, buffers, weights) -> None:
    buffers[s.dst][s.start : s.stop] = 0.0


STEPS = {MatMul: _matmul, Round: _round, Copy: _copy, Hadamard: _hadamard, Zero: _zero}


@pytest.mark.parametrize("form", ["float", "pairs", "bytes"])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_program_computes_its_expression(name, lanes, form, rng, monkeypatch):
    monkeypatch.setattr(stages, "pays", lambda form, p, q: p > 1)
    op = EXPRESSIONS[name]
    x = rng.normal(size=op.n_in)
    program = lower(op, lanes, "float64", form=form)
    assert all(s.tile % 2 == 0 for s in program.products if form == "pairs")
    found = interpret(program, x)
    scale = max(1.0, float(np.abs(op.apply(np.abs(x))).max()))
    np.testing.assert_allclose(found, op.apply(x), **tolerance("float64", op.n_in, scale=scale))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_lowering_never_makes_a_matrix_dense(name, monkeypatch):
    def refuse(op):
        raise AssertionError(f"to_dense() of {op!r}")

    for node in {ops.Op, *ops.Op.__subclasses__()}:
        monkeypatch.setattr(node, "to_dense", refuse)
    op = EXPRESSIONS[name]
    stored = sum(np.count_nonzero(w) for w in lower(op, 16).weights)
    constants = 256 * repr(op).count("WalshHadamard")  # a matrix of signs side by side
    assert 0 <= stored - sum(np.count_nonzero(a) for a in op.leaf_arrays()) <= constants
    assert lower(op, 16).key == lower(op, 16).key


SIZES = [  # the families at sizes that are multiples of the lanes
    ("vvma", (768, 3072), {"k": 32}),
    ("vvma", (384, 384), {"k": 48, "transposed": False}),
    ("kronecker", (512, 512), {"r": 3, "a": (16, 32), "b": (32, 16)}),
    ("lgp_shuffle", (384, 1536), {"g": 8}),
    ("low_rank", (384, 1536), {"r": 16}),
    ("block_diagonal", (384, 1536), {"g": 16}),
]


@pytest.mark.parametrize(("family", "shape", "parameters"), SIZES)
def test_packed_weights_take_no_more_than_the_parameters(family, shape, parameters, rng):
    op = FAMILIES[family].nearest(rng.normal(size=shape), **parameters).op
    assert sum(w.size for w in lower(op, 16).weights) == op.params


def test_permutations_at_the_end_and_beginning_cost_one_copy_at_most(rng):
    w = rng.normal(size=(4, 6, 6))
    program = lower(ops.swap(6, 4) @ ops.BlockDiag(w) @ ops.swap(4, 6), 4)
    assert [type(s) for s in program.stages] in ([MatMul], [MatMul, Copy])


def test_a_sum_of_products_accumulates_in_place(rng):
    op = ops.Dense(rng.normal(size=(6, 8))) + ops.Dense(rng.normal(size=(6, 8)))
    program = lower(op, 8)
    assert [(type(s), s.dst, s.accumulate) for s in program.stages] == [
        (MatMul, Y, False),
        (MatMul, Y, True),
    ]
    assert sum(program.sizes[Y + 1 :]) == 0


def test_merge_joins_runs_of_memory():
    assert merge(((2, 12), (3, 4), (4, 1))) == ((24, 1),)
    assert merge(((2, 1), (1, 7), (3, 2))) == ((2, 1), (3, 2))
    assert merge(((1, 5),)) == ()


def test_split_refuses_cuts_through_a_stride():
    assert split(((6, 1),), (2, 3)) == [((2, 3),), ((3, 1),)]
    assert split(((4, 1), (3, 4)), (4, 3)) == [((4, 1),), ((3, 4),)]
    assert split(((4, 1), (3, 4)), (3, 4)) is None


def test_an_unknown_node_says_where_its_stages_belong():
    class Strange(ops.Op):
        n_in = n_out = 3

    with pytest.raises(TypeError, match=r"Strange has no stages.*stages\.py"):
        lower(Strange(), 8)
