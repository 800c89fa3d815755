"""The clock model of VVMA (equations 2 and 3) and the models of its Tables 1 to 3.

A matrix unit of ``k x k`` loads a block in ``k`` clocks and multiplies ``t`` vectors in ``2k + t``.
A dense matrix of m inputs and n outputs loads all ``ceil(n/k) ceil(m/k)`` blocks, a VVMA only one.
What the paper does not say, and what its tables need: every model runs 25 steps of t = 1;
embeddings cost nothing; the output projection stays dense, of blocks of the row's k; each gate of
an LSTM has an M of its own but is charged for the vectors of the whole stacked matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvmstruct.errors import InputError

STEPS = 25
GATES = 4


def _blocks(inputs: int, outputs: int, k: int) -> int:
    return -(-inputs // k) * -(-outputs // k)


def _check(inputs: int, outputs: int, k: int, t: int) -> None:
    for name, value in {"inputs": inputs, "outputs": outputs, "k": k, "t": t}.items():
        if value < 1:
            raise InputError(f"clock model: {name} is {value}, want an integer of 1 or more")


def dense_clocks(inputs: int, outputs: int, k: int, t: int = 1) -> int:
    """Return ``ceil(n/k) ceil(m/k) (3k + t)``: equation 2 for m ``inputs``, n ``outputs``."""
    _check(inputs, outputs, k, t)
    return _blocks(inputs, outputs, k) * (3 * k + t)


def vvma_clocks(inputs: int, outputs: int, k: int, t: int = 1) -> int:
    """Return ``3k + ceil(n/k) ceil(m/k) t``: equation 3 for m ``inputs``, n ``outputs``."""
    _check(inputs, outputs, k, t)
    return 3 * k + _blocks(inputs, outputs, k) * t


@dataclass(frozen=True)
class Matrix:
    """``count`` matrices of ``inputs x outputs``; ``gates`` VVMAs each, 0 where they stay dense."""

    inputs: int
    outputs: int
    count: int = 1
    gates: int = 1

    @property
    def params(self) -> int:
        """Return the number of weights of the dense form."""
        return self.count * self.inputs * self.outputs

    def clocks(self, k: int, *, vvma: bool) -> int:
        """Return the clocks of one step."""
        if vvma and self.gates:
            one = self.gates * vvma_clocks(self.inputs, self.outputs, k)
        else:
            one = dense_clocks(self.inputs, self.outputs, k)
        return self.count * one

    def vvma_params(self, k: int, *, diagonals: bool) -> int:
        """Return the number of weights with ``gates`` VVMAs of block size ``k``."""
        if not self.gates:
            return self.params
        vectors = _blocks(self.inputs, self.outputs // self.gates, k) * k if diagonals else 0
        return self.count * self.gates * (k * k + vectors)


@dataclass(frozen=True)
class Workload:
    """A model: the matrices that a step multiplies with and the ``free`` weights that it reads.

    ``free`` weights (embeddings, biases) cost no clocks.
    """

    name: str
    matrices: tuple[Matrix, ...]
    free: int

    def clocks(self, k: int, *, vvma: bool) -> int:
        """Return the clocks of all 25 steps."""
        return STEPS * sum(matrix.clocks(k, vvma=vvma) for matrix in self.matrices)

    @property
    def params(self) -> int:
        """Return the number of weights of the original."""
        return self.free + sum(matrix.params for matrix in self.matrices)

    def vvma_params(self, k: int, *, diagonals: bool = True) -> int:
        """Return the number of weights with VVMAs of block size ``k``."""
        return self.free + sum(m.vvma_params(k, diagonals=diagonals) for m in self.matrices)


def _lstm(inputs: int, units: int, count: int = 1) -> Matrix:
    return Matrix(inputs + units, GATES * units, count, GATES)


def _projection(inputs: int, words: int) -> Matrix:
    return Matrix(inputs, words, gates=0)


def _wmt_lstm() -> Workload:
    """Return the four-layer GNMT of Luong's code for WMT, 1024 units, vocabulary 36,548.

    The encoder is a bidirectional layer, a layer of both directions and two more; every layer of
    the decoder reads the context, too.  The attention is normalised Bahdanau: a query and a
    memory matrix.
    """
    units, words = 1024, 36548
    layers = (
        _lstm(units, units, 2),
        _lstm(2 * units, units),
        _lstm(units, units, 2),
        _lstm(2 * units, units, 4),
    )
    attention = Matrix(units, units, 2)
    biases = 9 * GATES * units
    return Workload(
        "Seq2Seq-LSTM", (*layers, attention, _projection(units, words)), 2 * units * words + biases
    )


def _iwslt_lstm(source: int, target: int) -> Workload:
    """Return the model of Luong's tutorial: 512 units, a bidirectional encoder, Luong attention.

    Two decoder layers, the first of which reads the attention vector, too.
    """
    units = 512
    layers = _lstm(units, units, 2), _lstm(2 * units, units), _lstm(units, units)
    attention = Matrix(2 * units, units), Matrix(3 * units, units)
    biases = 4 * GATES * units
    free = units * (source + target) + biases
    return Workload("Seq2Seq-LSTM", (*layers, *attention, _projection(units, target)), free)


def _transformer() -> Workload:
    """Return the base Transformer of TensorFlow's model garden: 6 + 6 layers, 33,708 words.

    The table of words is the output projection, too, and is charged as that.
    """
    hidden, ffn, words, layers = 512, 2048, 33708, 6
    attention = Matrix(hidden, hidden, count=4 * 3 * layers)
    feed_forward = Matrix(hidden, ffn, 2 * layers), Matrix(ffn, hidden, 2 * layers)
    small = 2 * layers * (ffn + hidden) + 2 * hidden * (5 * layers + 2)  # biases, normalisations
    return Workload(
        "Transformer", (attention, *feed_forward, _projection(hidden, words)), free=small
    )


def _transformer_xl() -> Workload:
    """Return the standard Transformer-XL of WikiText-103, whose feed-forward layers stay dense.

    16 layers of 410 units with ten heads of 41, feed-forward size 2100, 267,735 words in an
    adaptive softmax, whose clocks the paper leaves out.
    """
    hidden, ffn, words, layers = 410, 2100, 267735, 16
    attention = Matrix(hidden, 3 * hidden, layers), Matrix(hidden, hidden, 2 * layers)
    feed_forward = Matrix(hidden, ffn, layers, gates=0), Matrix(ffn, hidden, layers, gates=0)
    small = layers * (ffn + hidden + 4 * hidden) + 2 * hidden + 3 * hidden
    return Workload("Transformer-XL", (*attention, *feed_forward), (hidden + 1) * words + small)


GERMAN, VIETNAMESE, ENGLISH = "De-En, En-De", 7709, 17191
WMT, WORDS = _wmt_lstm(), _transformer()
FROM_VIETNAMESE = _iwslt_lstm(VIETNAMESE, ENGLISH)
TO_VIETNAMESE = _iwslt_lstm(ENGLISH, VIETNAMESE)
XL = _transformer_xl()


@dataclass(frozen=True)
class Row:
    """A row of the paper: what it prints (millions) and what the model gives."""

    table: int
    task: str
    workload: Workload
    vvma: bool
    k: int
    diagonals: bool
    printed_params: float
    printed_clocks: float

    @property
    def label(self) -> str:
        """Return, such as, ``1 En-Vi Seq2Seq-LSTM VVMA k=32``."""
        form = f"VVMA k={self.k}" if self.vvma else "original"
        plain = "" if self.diagonals else " without diagonals"
        return f"{self.table} {self.task} {self.workload.name} {form}{plain}"

    @cached_property
    def params(self) -> float:
        """Return millions of weights."""
        if not self.vvma:
            return self.workload.params / 1e6
        return self.workload.vvma_params(self.k, diagonals=self.diagonals) / 1e6

    @cached_property
    def clocks(self) -> float:
        """Return millions of clocks; diagonals take none, so leaving them out saves none."""
        return self.workload.clocks(self.k, vvma=self.vvma) / 1e6

    @property
    def difference(self) -> float:
        """Return the relative difference of the clocks from the printed ones."""
        return self.clocks / self.printed_clocks - 1


def _row(
    table: int, task: str, model: Workload, k: int | None, params: float, clocks: float
) -> Row:
    """Return a row with diagonals; the originals, ``k`` None, run on blocks of 32."""
    return Row(table, task, model, k is not None, k or 32, True, params, clocks)


ROWS = (
    _row(1, GERMAN, WMT, None, 210.9, 322.1),
    _row(1, GERMAN, WMT, 32, 115.4, 98.3),
    _row(1, GERMAN, WORDS, None, 61.4, 145.2),
    _row(1, GERMAN, WORDS, 32, 18.8, 42.2),
    _row(1, "Vi-En", FROM_VIETNAMESE, None, 32.3, 46.3),
    _row(1, "Vi-En", FROM_VIETNAMESE, 32, 21.9, 21.9),
    _row(1, "En-Vi", TO_VIETNAMESE, None, 27.5, 34.8),
    _row(1, "En-Vi", TO_VIETNAMESE, 32, 17.1, 10.3),
    _row(2, "En-Vi", TO_VIETNAMESE, None, 27.5, 34.8),
    _row(2, "En-Vi", TO_VIETNAMESE, 32, 17.1, 10.3),
    Row(2, "En-Vi", TO_VIETNAMESE, True, 32, False, 16.7, 10.3),
    _row(2, "En-Vi", TO_VIETNAMESE, 16, 17.4, 22.7),
    _row(2, "En-Vi", TO_VIETNAMESE, 64, 16.9, 5.0),
    _row(3, "WikiText-103", XL, None, 151.1, 99.4),
    _row(3, "WikiText-103", XL, 32, 138.2, 67.0),
    _row(3, "WikiText-103", XL, 64, 138.1, 35.9),
)
"""Every row of Tables 1 to 3 that prints clocks; De-En and En-De have the same figures."""

LABEL, NUMBER = 55, 9  # characters


def to_plain(row: Row) -> dict[str, object]:
    """Return a row for JSON: millions of weights and clocks, and the relative difference."""
    return {
        "table": row.table,
        "task": row.task,
        "model": row.workload.name,
        "vvma": row.vvma,
        "k": row.k,
        "diagonals": row.diagonals,
        "params": row.params,
        "printed_params": row.printed_params,
        "clocks": row.clocks,
        "printed_clocks": row.printed_clocks,
        "difference": row.difference,
    }


def table() -> str:
    """Return all rows as text: weights and clocks in millions, and how far the clocks are off."""
    names = ("params", "paper", "clocks", "paper", "differ")
    head = f"{'table, task, model':<{LABEL}}" + "".join(f"{name:>{NUMBER}}" for name in names)
    return "\n".join([head, *map(_line, ROWS)])


def _line(row: Row) -> str:
    numbers = row.params, row.printed_params, row.clocks, row.printed_clocks
    cells = "".join(f"{number:{NUMBER}.2f}" for number in numbers)
    return f"{row.label:<{LABEL}}{cells}{row.difference:+{NUMBER}.2%}"
