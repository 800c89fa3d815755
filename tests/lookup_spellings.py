"""One LookupFFN layer, many spellings: what exporters and people make of it in ONNX.

Features ``z = x @ R + b`` fall into H groups of TAU; every spelling ends in (B, S, N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from tests import models
from tests.attention_spellings import Builder

B, S, D, H, TAU, N = 2, 5, 7, 3, 4, 6
ROWS = 1 << TAU
PLACES = 2 ** np.arange(TAU - 1, -1, -1)


@dataclass(frozen=True)
class Spelling:
    """A model, and what the node that it becomes must be."""

    name: str
    build: Callable[[Builder], str]
    scaled: bool = True
    flips: int = 0
    bias: bool = False

    def model(self) -> tuple[ModelProto, dict[str, np.ndarray]]:
        """Return the model and its inputs."""
        builder = Builder()
        return builder.build(self.build(builder)), builder.inputs


SPELLINGS: list[Spelling] = []
REFUSED: dict[str, tuple[Callable[[Builder], str], str]] = {}


def spelling(**expected):
    """Register a function of a builder under its name."""

    def register(build):
        SPELLINGS.append(Spelling(build.__name__, build, **expected))
        return build

    return register


def refused(why: str):
    """Register a function of a builder that must be refused for this reason."""

    def register(build):
        REFUSED[build.__name__] = (build, why)
        return build

    return register


def project(b: Builder, x: str = "") -> str:
    """Return features (B, S, H TAU) of an input."""
    x = x or b.random(B, S, D)
    seed = len(b.arrays)
    y = b.op("MatMul", x, b.const(1.5 * models.weight(D, H * TAU, seed=seed)))
    return b.op("Add", y, b.const(models.weight(H * TAU, seed=seed + 50) / 3))


def grouped(b: Builder, *lead: int) -> str:
    """Return features in their groups, (lead, H, TAU)."""
    return b.reshape(project(b), *(lead or (B, S)), H, TAU)


def table(b: Builder, *shape: int) -> str:
    """Return tables of H 2^TAU rows."""
    return b.const(models.weight(H * ROWS, N, seed=9).reshape(shape))


def sum_over(b: Builder, x: str, *axes: int, keep: int = 0) -> str:
    """Sum over axes."""
    return b.op("ReduceSum", x, b.const(axes, "int64"), keepdims=keep)


def code(b: Builder, z: str, places=PLACES) -> str:
    """Return int64 codes (.., H): bits z > 0 times powers of two, summed."""
    bits = b.op("Cast", b.op("Greater", z, b.const(0.0)), to=models.FLOAT)
    total = sum_over(b, b.op("Mul", bits, b.const(places)), -1)
    return b.op("Cast", total, to=models.INT64)


def score(b: Builder, z: str) -> str:
    """Return ``sum |z| / prod(1 + exp(-2 |z|))``."""
    size = b.op("Abs", z)
    decay = b.op("Exp", b.op("Mul", size, b.const(-2.0)))
    product = b.op("ReduceProd", b.op("Add", b.const(1.0), decay), axes=[-1], keepdims=0)
    return b.op("Div", sum_over(b, size, -1), product)


def offset(b: Builder, codes: str) -> str:
    """Return rows of tables that lie end to end."""
    return b.op("Add", codes, b.const(ROWS * np.arange(H), "int64"))


def weighted(b: Builder, rows: str, weights: str) -> str:
    """Return the sum over tables of rows (.., H, N) times weights (.., H)."""
    wide = b.op("Unsqueeze", weights, b.const([-1], "int64"))
    return sum_over(b, b.op("Mul", rows, wide), -2)


def flat_lookup(b: Builder, z: str, weights: str) -> str:
    """Return the layer on tables end to end."""
    rows = b.op("Gather", table(b, H * ROWS, N), offset(b, code(b, z)))
    return weighted(b, rows, weights)


# Codes and tables


@spelling()
def public_code(b):
    """The public code: bits from 0.5 * (2 * (z > 0) - 1 + 1), offsets, one flat table."""
    z = grouped(b, B * S)
    bits = b.op("Cast", b.op("Greater", z, b.const(0.0)), to=models.FLOAT)
    signs = b.op("Sub", b.op("Mul", bits, b.const(2.0)), b.const(1.0))
    bits = b.op("Div", b.op("Add", signs, b.const(1.0)), b.const(2.0))
    codes = b.op("Cast", sum_over(b, b.op("Mul", b.const(PLACES), bits), -1), to=6)
    rows = b.op("Add", codes, b.const(ROWS * np.arange(H)[None], "int32"))
    y = weighted(b, b.op("Gather", table(b, H * ROWS, N), rows), score(b, z))
    return b.reshape(y, B, S, N)


@spelling(bias=True)
def least_significant_first(b):
    """Powers of two in rising order, and a bias."""
    z = grouped(b)
    rows = b.op("Gather", table(b, H * ROWS, N), offset(b, code(b, z, PLACES[::-1])))
    y = weighted(b, rows, score(b, z))
    return b.op("Add", y, b.const(models.weight(N, seed=3)))


@spelling()
def features_cut_from_more(b):
    """The projection yields more than the tables take, as BH4 does."""
    x = b.random(B, S, D)
    wide = b.op("MatMul", x, b.const(models.weight(D, H * TAU + 4, seed=4)))
    bounds = [b.const([n], "int64") for n in (0, H * TAU, -1)]
    z = b.reshape(b.op("Slice", wide, *bounds), B, S, H, TAU)
    return flat_lookup(b, z, score(b, z))


@spelling()
def bits_by_matmul(b):
    """The bits times a constant vector."""
    z = grouped(b)
    bits = b.op("Cast", b.op("Less", b.const(0.0), z), to=models.FLOAT)
    total = b.op("MatMul", bits, b.const(PLACES[:, None]))
    codes = b.op("Cast", b.op("Squeeze", total, b.const([-1], "int64")), to=models.INT64)
    return weighted(b, b.op("Gather", table(b, H * ROWS, N), offset(b, codes)), score(b, z))


@spelling()
def sign_and_half(b):
    """``(sign(z) + 1) / 2``."""
    z = grouped(b)
    bits = b.op("Mul", b.op("Add", b.op("Sign", z), b.const(1.0)), b.const(0.5))
    codes = b.op("Cast", sum_over(b, b.op("Mul", bits, b.const(PLACES)), -1), to=models.INT64)
    return weighted(b, b.op("Gather", table(b, H * ROWS, N), offset(b, codes)), score(b, z))


@spelling()
def where_picks_powers(b):
    """Integers, chosen by a condition."""
    z = grouped(b)
    places, zero = b.const(PLACES, "int64"), b.const(0, "int64")
    codes = sum_over(b, b.op("Where", b.op("Greater", z, b.const(0.0)), places, zero), -1)
    return weighted(b, b.op("Gather", table(b, H * ROWS, N), offset(b, codes)), score(b, z))


@spelling()
def negative_bits(b):
    """``z <= 0`` is a bit: tables the other way round."""
    z = grouped(b)
    bits = b.op("Cast", b.op("LessOrEqual", z, b.const(0.0)), to=models.INT64)
    codes = sum_over(b, b.op("Mul", bits, b.const(PLACES, "int64")), -1)
    return weighted(b, b.op("Gather", table(b, H * ROWS, N), offset(b, codes)), score(b, z))


@spelling()
def two_indices(b):
    """``tables[arange(h), code]`` as GatherND."""
    z = grouped(b)
    shape = b.const((B, S, H), "int64")
    which = b.op("Expand", b.const(np.arange(H), "int64"), shape)
    both = [b.op("Unsqueeze", i, b.const([-1], "int64")) for i in (which, code(b, z))]
    rows = b.op("GatherND", table(b, H, ROWS, N), b.op("Concat", *both, axis=-1))
    return weighted(b, rows, score(b, z))


@spelling()
def elements_of_stacked_tables(b):
    """GatherElements: codes of every table written out for all columns, tables first."""
    z = grouped(b, B * S)
    wide = b.op("Unsqueeze", b.op("Transpose", code(b, z), perm=[1, 0]), b.const([-1], "int64"))
    wide = b.op("Expand", wide, b.const([H, B * S, N], "int64"))
    rows = b.op("GatherElements", table(b, H, ROWS, N), wide, axis=1)
    weights = b.op("Unsqueeze", b.op("Transpose", score(b, z), perm=[1, 0]), b.const([-1], "int64"))
    return b.reshape(sum_over(b, b.op("Mul", rows, weights), 0), B, S, N)


@spelling()
def table_by_table(b):
    """A loop over tables, unrolled; each adds its row."""
    z = grouped(b)
    weights, codes, y = score(b, z), code(b, z), None
    for k in range(H):
        at = b.const(k, "int64")
        own = b.op("Gather", table(b, H, ROWS, N), at, axis=0)
        rows = b.op("Gather", own, b.op("Gather", codes, at, axis=-1), axis=0)
        weight = b.op("Unsqueeze", b.op("Gather", weights, at, axis=-1), b.const([-1], "int64"))
        term = b.op("Mul", weight, rows)
        y = term if y is None else b.op("Add", y, term)
    return y


@spelling()
def flat_codes(b):
    """All codes of all rows in one axis."""
    z = grouped(b, B * S)
    rows = b.op("Gather", table(b, H * ROWS, N), b.reshape(offset(b, code(b, z)), -1))
    y = weighted(b, b.reshape(rows, B * S, H, N), score(b, z))
    return b.reshape(y, B, S, N)


@spelling()
def sum_by_matmul(b):
    """Weights (1, H) times rows (H, N)."""
    z = grouped(b)
    rows = b.op("Gather", table(b, H * ROWS, N), offset(b, code(b, z)))
    weights = b.op("Unsqueeze", score(b, z), b.const([-2], "int64"))
    return b.op("Squeeze", b.op("MatMul", weights, rows), b.const([-2], "int64"))


@spelling()
def sum_by_einsum(b):
    """``bsh,bshn->bsn``."""
    z = grouped(b)
    rows = b.op("Gather", table(b, H * ROWS, N), offset(b, code(b, z)))
    return b.op("Einsum", score(b, z), rows, equation="bsh,bshn->bsn")


# Scores


@spelling(scaled=False)
def softmax_weight(b):
    """Equation 7: ``exp(<z, S>) / prod(exp z + exp -z)``."""
    z = grouped(b)
    inner = b.op("Exp", sum_over(b, b.op("Abs", z), -1))
    both = b.op("Add", b.op("Exp", z), b.op("Exp", b.op("Neg", z)))
    weights = b.op("Div", inner, b.op("ReduceProd", both, axes=[-1], keepdims=0))
    return flat_lookup(b, z, weights)


@spelling()
def softmax_weight_of_signs(b):
    """``<z, S> exp(<z, S>) / prod(exp z + exp -z)``, S the signs."""
    z = grouped(b)
    inner = sum_over(b, b.op("Mul", z, b.op("Sign", z)), -1)
    both = b.op("Add", b.op("Exp", z), b.op("Exp", b.op("Neg", z)))
    product = b.op("ReduceProd", both, axes=[-1], keepdims=0)
    weights = b.op("Mul", b.op("Div", b.op("Exp", inner), product), inner)
    return flat_lookup(b, z, weights)


@spelling()
def sigmoids(b):
    """``sum |z| prod sigmoid(2 |z|)``."""
    z = grouped(b)
    size = b.op("Abs", z)
    gates = b.op("Sigmoid", b.op("Add", size, size))
    weights = b.op("ReduceProd", gates, axes=[-1], keepdims=0)
    return flat_lookup(b, z, b.op("Mul", sum_over(b, size, -1), weights))


@spelling(scaled=False)
def logarithms(b):
    """``exp(sum(-softplus(-2 |z|)))``, rows weighted by 1.175, which the tables take."""
    z = grouped(b)
    size = b.op("Mul", b.op("Abs", z), b.const(-2.0))
    inner = b.op("Neg", sum_over(b, b.op("Softplus", size), -1))
    return flat_lookup(b, z, b.op("Mul", b.op("Exp", inner), b.const(1.175)))


@spelling()
def cosh(b):
    """``sum |z| exp(sum |z|) / prod(2 cosh z)``."""
    z = grouped(b)
    total = sum_over(b, b.op("Abs", z), -1)
    cosh = b.op("Mul", b.op("Cosh", z), b.const(2.0))
    product = b.op("ReduceProd", cosh, axes=[-1], keepdims=0)
    return flat_lookup(b, z, b.op("Mul", total, b.op("Div", b.op("Exp", total), product)))


# Neighbours


@spelling(flips=1, scaled=False)
def neighbours(b):
    """Each flipped bit adds its row: ``sum(w[m] * T[k, code ^ m] for m in (0, 1, 2, ...))``."""
    z = grouped(b)
    bits = b.op("Greater", z, b.const(0.0))
    both = b.op("Add", b.op("Exp", z), b.op("Exp", b.op("Neg", z)))
    product = b.op("ReduceProd", both, axes=[-1], keepdims=0)
    tables, y = table(b, H * ROWS, N), None
    for j in range(-1, TAU):
        turned = np.arange(TAU) == j
        own = b.op("Xor", bits, b.const(turned, "bool"))
        signs = b.op("Where", own, b.const(1.0), b.const(-1.0))
        weights = b.op("Div", b.op("Exp", sum_over(b, b.op("Mul", z, signs), -1)), product)
        places = b.op("Mul", b.op("Cast", own, to=models.INT64), b.const(PLACES, "int64"))
        rows = b.op("Gather", tables, offset(b, sum_over(b, places, -1)))
        term = weighted(b, rows, weights)
        y = term if y is None else b.op("Add", y, term)
    return y


# What is none


def compared(b, op, limit):
    """Bits by a comparison of z with ``limit``, then as usual."""
    z = grouped(b)
    bits = b.op("Cast", b.op(op, z, b.const(limit)), to=models.FLOAT)
    total = sum_over(b, b.op("Mul", bits, b.const(PLACES)), -1)
    codes = b.op("Cast", total, to=models.INT64)
    return weighted(b, b.op("Gather", table(b, H * ROWS, N), offset(b, codes)), score(b, z))


@refused("looks up something else than rows of a table")
def elements_of_another_axis(b):
    """GatherElements along the columns: no row is looked up."""
    z = grouped(b, B * S)
    wide = b.op("Unsqueeze", b.op("Transpose", code(b, z), perm=[1, 0]), b.const([-1], "int64"))
    wide = b.op("Expand", wide, b.const([H, B * S, 1], "int64"))
    rows = b.op("GatherElements", table(b, H, N, ROWS), wide, axis=2)
    return b.reshape(sum_over(b, rows, 0), B, S, 1)


@refused("another threshold")
def threshold(b):
    """A threshold of a tenth."""
    return compared(b, "Greater", 0.1)


@refused("the bit of a feature of zero is 1")
def zero_counts(b):
    """``z >= 0``."""
    return compared(b, "GreaterOrEqual", 0.0)


@refused("not powers of two")
def powers_of_three(b):
    """Places 9, 3, 2, 1."""
    z = grouped(b)
    rows = b.op("Gather", table(b, H * ROWS, N), offset(b, code(b, z, np.array([9, 3, 2, 1]))))
    return weighted(b, rows, score(b, z))


@refused("the table has 47 rows")
def table_too_short(b):
    """The last table lacks its last row."""
    z = grouped(b)
    short = b.const(models.weight(H * ROWS - 1, N, seed=9))
    return weighted(b, b.op("Gather", short, offset(b, code(b, z))), score(b, z))


@refused("the sum over tables reads")
def score_of_another(b):
    """Weights of other features than the codes."""
    x = b.random(B, S, D)
    z, other = (b.reshape(project(b, x), B, S, H, TAU) for _ in range(2))
    return flat_lookup(b, z, score(b, other))


@refused("not the scores of equation 7")
def other_score(b):
    """``max |z|``."""
    z = grouped(b)
    return flat_lookup(b, z, b.op("ReduceMax", b.op("Abs", z), axes=[-1], keepdims=0))


@refused("rows are looked up for 12 features")
def too_few_tables(b):
    """A table reads two groups' features."""
    z = b.reshape(project(b), B, S, H * TAU // 6, 6)
    codes = code(b, z, np.array([1, 2, 4, 8, 16, 32]))
    again = b.op("Concat", codes, codes, codes, codes, axis=-1)
    rows = b.op("Gather", b.const(models.weight(64, N, seed=9)), again)
    weights = b.op("Concat", *[score(b, z)] * 4, axis=-1)
    return weighted(b, rows, weights)
