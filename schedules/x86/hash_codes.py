"""Codes and scores of hashed features on x86: vectors of tables, a comparison for each bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.lookup import flipped
from tvmstruct.schedules.compute.hash_tables import ITEM, Tables
from tvmstruct.schedules.compute.product_tile import widen
from tvmstruct.schedules.x86.attention_tile import ramp, spread

Keep = Callable[[int, Expr, Expr], None]  # (entry, rows of the tables, scores)
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Hasher:
    """Hashes rows of ``z`` (tokens, h tau); int8 tables have a scale for each of their rows."""

    t: Tables
    z: tirx.Buffer
    scales: tirx.Buffer | None = None

    def emit(self, token: Expr, table: Expr, lanes: int, keep: Keep) -> None:
        """Hash ``lanes`` tables from ``table`` on; ``keep`` takes one entry of each after another.

        A NaN gives bit 0 and a score of NaN, so the sum of its token is NaN.
        """
        t = self.t
        codes, totals, product = (Held(lanes, d) for d in ("int32", "float32", "float32"))
        sizes = [Held(lanes) for _ in range(t.tau)]
        decays = [Held(lanes) for _ in range(t.tau)]
        for j in range(t.tau):
            z = Held(lanes)
            z.keep(self.z[token, _strided(table * t.tau + j, t.tau, lanes)])
            sizes[j].keep(_absolute(z.value, lanes))
            decays[j].keep(T.exp(sizes[j].value * spread(T.float32(-2), lanes)))
            one = spread(T.float32(1), lanes)
            bit = T.Select(
                z.value > spread(T.float32(0), lanes),
                _int(1 << (t.tau - 1 - j), lanes),
                _int(0, lanes),
            )
            codes.keep(bit if j == 0 else codes.value | bit)
            totals.keep(sizes[j].value if j == 0 else totals.value + sizes[j].value)
            grown = one + decays[j].value
            product.keep(grown if j == 0 else product.value * grown)
        weight = Held(lanes)
        weight.keep(spread(T.float32(1), lanes) / product.value)
        base = T.Cast("int32", table) if lanes == 1 else T.ramp(T.Cast("int32", table), 1, lanes)
        rows = Held(lanes, "int32")
        rows.keep(base * _int(1 << t.tau, lanes))
        for e, bits in enumerate(flipped(t.tau, t.flips)):
            code = codes.value
            if bits:
                code = code ^ _int(sum(1 << (t.tau - 1 - j) for j in bits), lanes)
            row = Held(lanes, "int32")
            row.keep(rows.value + code)
            score = self._score(totals, weight, [(sizes[j], decays[j]) for j in bits], lanes)
            if self.scales is not None:
                score = score * self.scales[row.value]
            keep(e, row.value, score)

    def _score(self, totals: Held, weight: Held, bits: list, lanes: int) -> Expr:
        """Return the score of the code with some bits flipped (eq. 7)."""
        value = weight.value
        for _, decay in bits:
            value = value * decay.value
        if not self.t.scaled:  # the exponential need not keep a NaN, the sum does
            whole = totals.value == totals.value
            return T.Select(whole, value, totals.value)
        taken = totals.value
        for size, _ in bits:
            taken = taken - size.value * spread(T.float32(2), lanes)
        return taken * value


@dataclass(frozen=True)
class TableRows:
    """Rows of packed tables: what a code names in one slice of columns."""

    t: Tables
    tables: tirx.Buffer
    lanes: int

    @property
    def vectors(self) -> int:
        """Vectors of float32 in a row of a slice."""
        return self.t.columns(self.lanes) // self.lanes

    def load(self, cut: Expr, row: Expr) -> list[Expr]:
        """Return the vectors of a row of slice ``cut``, in float32."""
        lanes, count = self.lanes, self.vectors
        if self.t.dtype == "bf16":
            words = [self.tables[cut, row, ramp(i * lanes, lanes)] for i in range(count // 2)]
            return [widen(word, half, lanes) for word in words for half in (0, 1)]
        values = [self.tables[cut, row, ramp(v * lanes, lanes)] for v in range(count)]
        if self.t.dtype == "int8":
            return [T.Cast(f"float32x{lanes}", value) for value in values]
        return values

    def fetch(self, cut: Expr, row: Expr, level: int) -> None:
        """Prefetch a row into a level of cache; the row may be anything, and its address too."""
        lines = -(-self.t.columns(self.lanes) * ITEM[self.t.dtype] // LINE)
        for i in range(lines):
            prefetch(self.tables[cut, row, i * (int(self.tables.shape[2]) // lines)], level)


class Held:
    """A vector that is computed once and used more than once."""

    def __init__(self, lanes: int, dtype: str = "float32") -> None:
        self.buffer = T.alloc_buffer((lanes,), dtype, scope="global")
        self.lanes = lanes

    def keep(self, value: Expr) -> None:
        """Hold a value from here on."""
        T.buffer_store(self.buffer, value, [ramp(0, self.lanes)])

    @property
    def value(self) -> Expr:
        """Read it."""
        return self.buffer[ramp(0, self.lanes)]


def prefetch(element: Expr, level: int) -> None:
    """Prefetch the cache line of an element, to read, into the first or second level."""
    hints = tuple(T.int32(value) for value in (0, 4 - level, 1))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", T.address_of(element), *hints))


def _strided(first: Expr, stride: int, lanes: int) -> Expr:
    return first if lanes == 1 else T.ramp(first, stride, lanes)


def _int(value: int, lanes: int) -> Expr:
    return spread(T.int32(value), lanes)


def _absolute(value: Expr, lanes: int) -> Expr:
    """Return ``|value|`` by clearing the sign, which keeps a NaN."""
    integer, real = ("int32", "float32") if lanes == 1 else (f"int32x{lanes}", f"float32x{lanes}")
    return T.reinterpret(real, T.reinterpret(integer, value) & _int(0x7FFFFFFF, lanes))
