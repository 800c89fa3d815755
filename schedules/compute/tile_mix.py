"""Sums of tiles that are multiplied element by element: the diagonals of VVMA.

``y[n, g, m] = requantise(sum_k w[g, m, k] * x[n, g, k])`` on tiles (batch, out), where all
products and sums are int32, for a vector ALU that multiplies.
"""

from __future__ import annotations

from tvmstruct.schedules.compute.tile_matmul import Matmul, only
from tvmstruct.schedules.compute.tile_step import Axes, Step


class Mix(Matmul):
    """A `Matmul` whose weights are tiles (batch, out); rows come one at a time, k all at once."""

    widens = True

    @property
    def _weights(self) -> tuple[int, int]:
        return self.tile.batch, self.tile.out

    def product(self, outer: Axes) -> None:
        """Emit the loads, w *= x in the place of w, and the sum over k."""
        nest, elements = self.nest, self._weights
        n, g, m, k = ("n", 1), ("g", nest.g), ("m", nest.m), ("k", nest.k)
        w = Step("load", "load_w", (g, m, k), elements, "int8", widen=True)
        self.emit(w, only(outer, "gmck"), to="w", **{"from": "w"})
        x = Step("load", "load_x", (n, g, k), elements, "int8", widen=True)
        self.emit(x, only(outer, "ngk"), to="x", **{"from": "x"})
        dims = (("operand", "ngk"), ("to", "gmk"))
        mul = Step("alu", "mul_x", (g, m, k), elements, operand="x", dims=dims)
        self.emit(mul, outer, to="w", operand="x")
        dims = (("operand", "gmk"), ("to", "ngm"))
        add = Step("alu", "add_w", (k, g, m), elements, operand="w", dims=dims)
        self.emit(add, outer, to="sums", operand="w")
