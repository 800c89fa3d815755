"""Operators of lookups in exported programs that TVM's importer lacks or leaves unchecked."""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvmstruct.errors import UnsupportedOperatorError
from tvmstruct.frontends.elements import gather_elements

R = relax.op
REDUCTIONS = {0: R.sum, 1: R.mean, 2: R.max}  # by the number of a mode of `embedding_bag`


def convert_gather(node: Any, importer: Any) -> relax.Expr:
    """Return ``torch.gather``."""
    data, axis, index = node.args[:3]
    return gather_elements(
        importer.block_builder.emit, importer.env[data], importer.env[index], axis
    )


def convert_prod(node: Any, importer: Any) -> relax.Expr:
    """Return ``torch.prod`` over one axis."""
    x, axis, *keep = node.args
    keepdims = bool(keep[0] if keep else node.kwargs.get("keepdim", False))
    return importer.block_builder.emit(R.prod(importer.env[x], axis, keepdims))


def convert_embedding_bag(node: Any, importer: Any) -> tuple[relax.Expr]:
    """Return ``embedding_bag`` of bags that are all as long: rows, weights, a sum over each bag.

    Raises UnsupportedOperatorError where they are not known to be, or some ids are padding.
    """
    table, ids, offsets, _, mode, _, weights, last, padding = _arguments(node)
    count, length = _bags(node, offsets)
    if last or padding >= 0:
        raise UnsupportedOperatorError(
            f"{node.name}: embedding_bag with padding_idx or include_last_offset cannot be "
            "compiled; look the rows up with embedding and sum them"
        )
    emit, env = importer.block_builder.emit, importer.env
    rows = emit(R.take(env[table], emit(R.reshape(env[ids], (count, length))), 0))
    if weights is not None:
        rows = emit(R.multiply(rows, emit(R.reshape(env[weights], (count, length, 1)))))
    return (emit(REDUCTIONS[mode](rows, 1)),)


def _arguments(node: Any) -> tuple[Any, ...]:
    defaults = (None, None, None, False, 0, False, None, False, -1)
    return (*node.args, *defaults[len(node.args) :])


def _bags(node: Any, offsets: Any) -> tuple[int, int]:
    """Return how many bags there are, and how long they all are."""
    target = getattr(getattr(offsets, "target", None), "name", lambda: "")()
    if target == "aten::arange.start_step":
        start, stop, step = offsets.args[:3]
        if start == 0 and stop % step == 0:
            return stop // step, step
    raise UnsupportedOperatorError(
        f"{node.name}: the bags of embedding_bag may differ in length; give it ids of two axes, "
        "a bag in each row"
    )


CONVERTERS = {
    "gather.default": convert_gather,
    "prod.dim_int": convert_prod,
    "_embedding_bag.default": convert_embedding_bag,
    "_embedding_bag_forward_only.default": convert_embedding_bag,
}
