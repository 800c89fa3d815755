"""Turn every call of offloaded layers into the call of a site: a function that knows VTA."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import LayerTable, Offloaded, arguments
from tvmstruct.rewrite import Graph

Symbol = Callable[[Offloaded, int], str]


class EmitLaunches:
    """Call the site of offloaded layers; ``symbol`` makes it for the rows at hand."""

    name = "emit_launches"

    def __init__(self, table: LayerTable, symbol: Symbol) -> None:
        self.table, self.symbol = table, symbol

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the call of the site."""
        node = self.table.node(call)
        if not isinstance(node, Offloaded):
            return None
        shape = compat.static_shape(call)
        assert shape is not None
        symbol = self.symbol(node, shape[0])
        return relax.call_dps_packed(symbol, arguments(call), compat.tensor_type(shape, "float32"))
