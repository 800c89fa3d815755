"""Compute a feed-forward block in chunks of hidden features: both matrices in one kernel."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import FeedForward, Layer, LayerTable, arguments
from tvmstruct.rewrite import Graph
from tvmstruct.schedules import Kernels


class SplitFeedForward:
    """Fuse two dense layers in a row where the target says that it pays."""

    name = "split_feed_forward"

    def __init__(self, table: LayerTable, kernels: Kernels) -> None:
        self.table, self.kernels = table, kernels

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the fused call, or None where the two layers stay apart."""
        down = self.table.layer(call)
        if down is None or not _plain(down) or down.activation != "none":
            return None
        hidden, *more = arguments(call)
        producer = graph.value(hidden)
        up = self.table.layer(producer)
        if up is None or not _plain(up) or up.epilogue.joins_rows or not graph.single(hidden):
            return None
        shape = compat.static_shape(call)
        assert shape is not None
        sizes = (up.op.n_in, up.op.n_out, down.op.n_out)
        if up.op.n_out != down.op.n_in or not self.kernels.splits_feed_forward(sizes, shape[0]):
            return None
        args = [arguments(producer)[0], *more]
        return self.table.call(FeedForward(up, down), args, shape)


def _plain(layer: Layer) -> bool:
    return isinstance(layer.op, ops.Dense) and layer.precision == "f32"
