"""Bytes that lookups move: rows of tables of which a call touches few, or some many times."""

from __future__ import annotations

from collections.abc import Iterator

from tvmstruct.caches import L1, LEVELS, Caches
from tvmstruct.energy import Traffic, add_up, at
from tvmstruct.layers import Embedding, HashTables, Node
from tvmstruct.lookup_cost import (
    FLOAT,
    TableSize,
    Walk,
    distinct_rows,
    gather_traffic,
    memory_line,
)
from tvmstruct.schedules.compute.embedding import Rows, Tensors
from tvmstruct.schedules.compute.hash_tables import ITEM, LONG, ROW_BYTES

LOOKUPS = (HashTables, Embedding)
DENSE_FACTOR = 4  # hidden features of the dense block that tables are compared with


def lookup_traffic(node: Node, rows: int, caches: Caches, home: str = L1) -> Traffic:
    """Return the bytes of a node of `LOOKUPS` on ``rows`` tokens.

    Embeddings are read once a call, so from no nearer level than ``home``, where all weights are.
    """
    if isinstance(node, HashTables):
        return gather_traffic(table_size(node), rows, caches, _walk(node))
    assert isinstance(node, Embedding), node
    n = node.total.n
    parts = [_term(term, n, rows, caches, home) for term in node.total.terms]
    return add_up([*parts, at(caches.holding(rows * n * FLOAT, split=True), rows * n * FLOAT)])


def touched_bytes(node: Node, rows: int) -> float:
    """Return how much of the tables of a node of `LOOKUPS` so many tokens touch."""
    if isinstance(node, HashTables):
        size = table_size(node)
        each = size.rows // size.h
        share = distinct_rows(size.tau, rows * each) / (1 << size.tau)
        return share * size.table_bytes
    assert isinstance(node, Embedding), node
    return sum(min(_held(t, node.total.n), _read(t, node.total.n, rows)) for t in node.total.terms)


def notes(node: Node, caches: Caches) -> Iterator[str]:
    """Yield where a node of `LOOKUPS` reads its tables from, and what they take."""
    if isinstance(node, HashTables):
        size = table_size(node)
        dense = 2 * DENSE_FACTOR * size.n_out**2 * size.item
        yield (
            f"{node.names[0]}: {memory_line(size, size.table_bytes, dense, caches)} "
            f"(of {DENSE_FACTOR} times as many hidden features)"
        )
    if isinstance(node, Embedding):
        for name, term in zip(node.names, node.total.terms, strict=True):
            held = _held(term, node.total.n)
            if name:
                yield f"{name}: {held / 1e6:.3g} MB, rows read from {caches.holding(held)}"


def table_size(node: HashTables) -> TableSize:
    """Return the sizes of the tables of a LookupFFN layer as they are stored."""
    h, entries, n = node.tables.shape
    tau = int(entries).bit_length() - 1
    return TableSize(h=h, tau=tau, n_out=n, item=ITEM[node.precision], flips=node.flips)


def _walk(node: HashTables) -> Walk:
    size = table_size(node)
    line = ROW_BYTES // (2 if size.tau >= LONG else 1)
    return Walk(columns=max(1, line // size.item))


def _term(term: Rows | Tensors, n: int, rows: int, caches: Caches, home: str) -> Traffic:
    level = max(home, caches.holding(_held(term, n)), key=LEVELS.index)
    return at(level, _read(term, n, rows))


def _held(term: Rows | Tensors, n: int) -> int:
    """Return the bytes of what rows are taken from."""
    if isinstance(term, Rows):
        return term.size * n * FLOAT
    counts = term.digits or (term.size,)
    return FLOAT * sum(t * s for t, s in zip(counts, term.steps, strict=True))


def _read(term: Rows | Tensors, n: int, rows: int) -> int:
    """Return the bytes that ``rows`` tokens read of it."""
    return rows * FLOAT * (n if isinstance(term, Rows) else sum(term.steps))
