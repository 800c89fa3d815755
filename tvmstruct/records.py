"""From a graph in the middle of compilation to the records of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import tvm
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import (
    Attention,
    Embedding,
    FeedForward,
    Form,
    HashTables,
    Layer,
    LayerSequence,
    LayerTable,
    MinimalAttention,
    ProjectedAttention,
    RecurrentCells,
    TableForm,
    arguments,
)
from tvmstruct.report import LayerRecord
from tvmstruct.rewrite import Graph, Log
from tvmstruct.schedules.compute.hash_tables import ITEM
from tvmstruct.skipping import Skip
from tvmstruct.table_traffic import DENSE_FACTOR

REFUSALS = (
    "canonicalize_dense",
    "fuse_attention",
    "fuse_embedding",
    "fuse_layer_norm",
    "minimise_attention",
    "plan_embedding",
    "recognize_lookup",
    "split_feed_forward",
)


def layer_records(
    mod: tvm.IRModule,
    table: LayerTable,
    forms: Mapping[str, Form],
    names: Mapping[int, str],
    tables: Mapping[str, TableForm],
    errors: Mapping[str, float],
) -> list[LayerRecord]:
    """Return one record per weight in the order of the graph: layers, and gathered tables.

    ``errors`` are those of lookup tables in a lower precision, by their names.
    An output layer tied to a table, whose name is taken, is called ``name^T``.
    """
    found: dict[str, LayerRecord] = {}
    for value in Graph(mod["main"]).bound.values():
        if isinstance(node := table.node(value), HashTables):
            name = "+".join(node.names)
            found.setdefault(name, _lookup(node, errors.get(name, 0.0)))
        if (layer := table.layer(value)) is not None:
            record = _layer(layer, forms[layer.key])
            tied = record.name in found and layer.key != record.name
            found.setdefault(layer.key, replace(record, name=layer.key) if tied else record)
        elif isinstance(node := table.node(value), RecurrentCells):
            for layer in node.hidden:
                found.setdefault(layer.key, _layer(layer, forms[layer.key]))
        elif isinstance(node := table.node(value), Embedding):
            found.setdefault(node.names[0], _made_table(node, tables[node.names[0]]))
        elif compat.op_name(value) == "relax.take" and compat.is_constant(value.args[0]):
            name = names.get(compat.address(compat.constant_tensor(value.args[0])))
            if name is not None:
                found.setdefault(name, _table(name, value.args[0]))
    return list(found.values())


def fused_records(
    mod: tvm.IRModule, table: LayerTable, skip: Skip | None = None
) -> Iterator[LayerRecord]:
    """Yield a record per fused attention and feed-forward block."""
    count = 0
    for value in Graph(mod["main"]).bound.values():
        node = table.node(value)
        projection = None
        made: tuple[Layer, ...] = ()
        if isinstance(node, MinimalAttention):
            made = node.sources
        if isinstance(node, ProjectedAttention | MinimalAttention):
            node, projection = node.attention, node.projection
        if isinstance(node, Attention):
            yield LayerRecord(
                f"attention.{count}",
                (node.heads, node.head_dim),
                "attention",
                macs=node.heads * node.key_length * (node.head_dim + node.value_dim),
                reason=f"fused, running maximum, {_scores(node)}; "
                f"{_made(made) or _sources(node, value)}{_into(projection)}"
                f"{'' if skip is None else _skipped(skip, made)}",
            )
            count += 1
        elif isinstance(node, FeedForward):
            yield LayerRecord(
                f"feed_forward.{node.up.names[0]}",
                (node.up.op.n_in, node.up.op.n_out, node.down.op.n_out),
                "feed-forward",
                macs=node.up.op.macs + node.down.op.macs,
                reason="both matrices in one kernel",
            )
        elif isinstance(node, LayerSequence):
            yield _sequence(node)
        elif isinstance(node, Embedding):
            yield _embedding(node)
        elif isinstance(node, RecurrentCells):
            yield _recurrence(node)


def _sequence(node: LayerSequence) -> LayerRecord:
    """Return the record of layers that few rows pass one after the other."""
    names = [layer.names[0] for layer in node.members]
    return LayerRecord(
        f"sequence.{names[0]}",
        (node.members[0].op.n_in, node.members[-1].n_out),
        "sequence",
        macs=sum(layer.op.macs for layer in node.members),
        reason=f"{len(names)} layers in one kernel, up to {names[-1]}",
    )


def _recurrence(node: RecurrentCells) -> LayerRecord:
    """Return the record of all steps of a recurrent layer."""
    kinds = " and ".join(f"{c.kind}{' from the end' if c.reverse else ''}" for c in node.cells)
    return LayerRecord(
        f"recurrent.{node.hidden[0].names[0]}",
        (node.h,),
        node.cells[0].kind,
        macs=sum(layer.op.macs for layer in node.hidden),
        reason=f"{kinds}: {node.steps} steps of {node.batch} rows in one kernel; products with "
        "the input are layers of their own",
    )


def _embedding(node: Embedding) -> LayerRecord:
    """Return the record of a sum of rows in one kernel."""
    tables = [name for name in node.names if name]
    parts = [*tables, *(["constant rows"] if "" in node.names else [])]
    norm = "" if node.total.norm is None else ", then LayerNorm,"
    return LayerRecord(
        node.record,
        (node.total.n,),
        "embedding",
        macs=node.total.work,
        reason=f"{' + '.join(parts)}{norm} in one kernel",
    )


def _skipped(skip: Skip, made: tuple[Layer, ...]) -> str:
    return f"; skip: {skip}" + (f"; {skip.unmade}" if made else "")


def _made(sources: tuple[Layer, ...]) -> str:
    names = ", ".join(layer.names[0] for layer in sources)
    return f"{names} computed head by head" if names else ""


def _into(projection: Layer | None) -> str:
    if projection is None:
        return "; heads side by side in memory"
    return f"; each head into {projection.names[0]} at once"


def _scores(node: Attention) -> str:
    """Return the mask and the key heads of an attention in words."""
    words = [f"mask {node.mask}", *(["causal"] if node.causal else [])]
    if node.kv_heads:
        words.append(f"{node.kv_heads} key head{'s' if node.kv_heads > 1 else ''}")
    return ", ".join(words)


def _sources(node: Attention, call: relax.Expr) -> str:
    """Return which of queries, keys and values are slices of the rows of one merged layer."""
    layouts = {"q": node.q_layout, "k": node.k_layout, "v": node.v_layout}
    rows = dict(zip(layouts, arguments(call), strict=False))
    merged = [
        a
        for a in layouts
        if any(rows[a].same_as(rows[b]) and layouts[a] != layouts[b] for b in layouts)
    ]
    return (
        f"{', '.join(merged)} from one merged layer" if merged else "q, k, v from separate layers"
    )


def tuned_records(records: list[LayerRecord], rows: Mapping[str, int]) -> list[LayerRecord]:
    """Return the records, saying which layers run as a tuning record has it, and at which rows."""
    return [
        replace(r, reason="; ".join(filter(None, (r.reason, f"tuned for {rows[r.name]} rows"))))
        if r.name in rows
        else r
        for r in records
    ]


def refused_records(log: Log) -> Iterator[LayerRecord]:
    """Yield a record for everything that a pass recognised and declined."""
    for rule, name, why in dict.fromkeys(log.rejected):
        if rule in REFUSALS:
            yield LayerRecord(name, (), f"not rewritten by {rule}", reason=why)


def _layer(layer: Layer, form: Form) -> LayerRecord:
    op = form.op
    name = form.form if form.precision == "f32" else f"{form.form} {form.precision}"
    size = 4 * op.params if form.bytes is None else form.bytes
    return LayerRecord(
        layer.names[0], (op.n_in, op.n_out), name, dict(form.parameters), op.params,
        op.macs, size, None, form.error, form.reason,
    )  # fmt: skip


def _made_table(node: Embedding, form: TableForm) -> LayerRecord:
    shape = form.table.vocabulary, form.table.dimension
    reason = f"{form.reason}; only the rows asked for are made"
    return LayerRecord(
        node.names[0], shape, form.form, dict(form.parameters), form.table.params,
        node.total.work, 4 * form.table.params, None, form.error, reason,
    )  # fmt: skip


def _lookup(node: HashTables, error: float) -> LayerRecord:
    """Return the record of hash tables: every row of x gathers ``h`` rows, or their neighbours."""
    t = node.static
    read = t.h * t.entries
    parameters = {"tau": t.tau, **({"flips": t.flips} if t.flips else {})}
    bias = 0 if node.bias is None else node.bias.size
    row = t.bytes // (t.h << t.tau)
    dense = 2 * DENSE_FACTOR * t.n * t.n * ITEM[t.dtype]
    more = "more than" if t.bytes > dense else "less than" if t.bytes < dense else "as much as"
    why = (
        f"{read} rows of {row} bytes gathered for a row of x; tables of {t.bytes / 1e6:,.3g} MB, "
        f"{more} the {dense / 1e6:,.3g} of a dense block {t.n}-{DENSE_FACTOR * t.n}-{t.n}"
    )
    scale = "" if node.scaled else ", without the linear scale"
    form, stored = "lookup", ""
    if t.dtype != "f32":
        form, stored = f"lookup {t.dtype}", "; scores and sums in f32"
    return LayerRecord(
        node.names[0], node.tables.shape, form, parameters, node.tables.size + bias, read * t.n,
        t.bytes + 4 * bias, error=error, reason=why + scale + stored,
    )  # fmt: skip


def _table(name: str, constant: relax.Expr) -> LayerRecord:
    shape = compat.static_shape(constant) or ()
    array = compat.constant_array(constant)
    return LayerRecord(
        name, shape, "table", {}, array.size, 0, array.nbytes, reason="only the rows asked for"
    )
