"""What a model asks of hardware: its operation classes (Table II of NLP-Fast) and its products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tvmstruct.errors import InputError
from tvmstruct.models import Bert, Config, MemoryNetwork, Transformer
from tvmstruct.vta.resources import ACTIVATION, COMPARE, MULTIPLY_ADD, SOFTMAX, Resources

FLOAT_BYTES = 4
QUERY, KEY_VALUE, DOT, SOFT, SUM = "Q-Gen", "K/V-Gen", "dot product", "softmax", "weighted sum"
FC, UP, GELU, RELU, DOWN = "attention FC", "linear 1", "activation", "activation ReLU", "linear 2"
ANSWER = "answer"

UNITS: Mapping[str, Resources] = {SOFT: SOFTMAX, GELU: ACTIVATION, RELU: COMPARE}
"""What one lane takes where it is no multiply-add."""


@dataclass(frozen=True)
class Step:
    """One operation of one layer: ``work`` lane-cycles and ``bytes`` to be fetched before it."""

    name: str
    work: int
    bytes: int = 0


@dataclass(frozen=True)
class Gemm:
    """``count`` products of ``rows x inputs`` with constant ``inputs x outputs``."""

    rows: int
    inputs: int
    outputs: int
    count: int = 1

    @property
    def macs(self) -> int:
        """Return the multiply-adds of all of them."""
        return self.count * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Workload:
    """The steps of a model in order, and its products with constants."""

    name: str
    steps: tuple[Step, ...]
    gemms: tuple[Gemm, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the operation classes, in the order of their first step."""
        return tuple(dict.fromkeys(step.name for step in self.steps))

    def work(self, name: str) -> int:
        """Return the lane-cycles of a class."""
        return sum(step.work for step in self.steps if step.name == name)


def lane(name: str) -> Resources:
    """Return what one lane of a class takes."""
    return UNITS.get(name, MULTIPLY_ADD)


def workload(config: Config) -> Workload:
    """Return what a built-in model asks for at its configured length and a batch of one.

    Embeddings, normalisations and residual sums are left out, as in Table II.
    """
    if config.form != "dense":
        raise InputError(
            f"explore: {config.name} has form={config.form}; its factors are no operation classes "
            "of NLP-Fast, take form=dense"
        )
    for kind, make in MAKERS.items():
        if isinstance(config, kind):
            return make(config)
    known = ", ".join(kind.name for kind in MAKERS)
    raise InputError(f"explore: no operation classes of {config.name}; there are those of {known}")


def count_gemms(steps: Iterable[tuple[int, int, int]]) -> tuple[Gemm, ...]:
    """Return each shape (rows, inputs, outputs) once, with its number."""
    counts: dict[tuple[int, int, int], int] = {}
    for shape in steps:
        counts[shape] = counts.get(shape, 0) + 1
    return tuple(Gemm(*shape, count) for shape, count in counts.items())


def _attention(seq: int, hidden: int, heads: int) -> list[Step]:
    """Return the steps of one attention."""
    square = hidden * hidden
    return [
        Step(QUERY, seq * square, square * FLOAT_BYTES),
        Step(KEY_VALUE, 2 * seq * square, 2 * square * FLOAT_BYTES),
        Step(DOT, seq * seq * hidden),
        Step(SOFT, seq * seq * heads),
        Step(SUM, seq * seq * hidden),
        Step(FC, seq * square, square * FLOAT_BYTES),
    ]


def _feed_forward(seq: int, hidden: int, ffn: int, activation: str) -> list[Step]:
    matrix = hidden * ffn
    return [
        Step(UP, seq * matrix, matrix * FLOAT_BYTES),
        Step(activation, seq * ffn),
        Step(DOWN, seq * matrix, matrix * FLOAT_BYTES),
    ]


def _bert(config: Config) -> Workload:
    assert isinstance(config, Bert)
    seq, hidden, ffn, layers = config.seq, config.hidden, config.ffn, config.layers
    layer = _attention(seq, hidden, config.heads) + _feed_forward(seq, hidden, ffn, GELU)
    shapes = 4 * [(seq, hidden, hidden)] + [(seq, hidden, ffn), (seq, ffn, hidden)]
    return Workload(config.name, tuple(layers * layer), count_gemms(layers * shapes))


def _transformer(config: Config) -> Workload:
    """Return encoder and decoder; keys and values of the encoder are made in each layer."""
    assert isinstance(config, Transformer)
    seq, hidden, ffn, layers = config.seq, config.hidden, config.ffn, config.layers
    attention = _attention(seq, hidden, config.heads)
    last = _feed_forward(seq, hidden, ffn, RELU)
    steps = layers * (attention + last) + layers * (2 * attention + last)
    square = 12 * layers * [(seq, hidden, hidden)]
    shapes = square + 2 * layers * [(seq, hidden, ffn), (seq, ffn, hidden)]
    return Workload(config.name, tuple(steps), count_gemms(shapes))


def _memory_network(config: Config) -> Workload:
    """Return the hops, whose keys and values come from memory, and the answer layer."""
    assert isinstance(config, MemoryNetwork)
    rows, keys, hidden = config.queries, config.keys, config.hidden
    stored = keys * hidden * FLOAT_BYTES
    hop = [
        Step(DOT, rows * keys * hidden, stored),
        Step(SOFT, rows * keys),
        Step(SUM, rows * keys * hidden, stored),
    ]
    answer = rows, hidden, config.answers
    matrix = hidden * config.answers
    last = Step(ANSWER, rows * matrix, matrix * FLOAT_BYTES)
    return Workload(config.name, (*(config.hops * hop), last), count_gemms([answer]))


MAKERS: Mapping[type[Config], Callable[[Config], Workload]] = {
    Bert: _bert,
    Transformer: _transformer,
    MemoryNetwork: _memory_network,
}
