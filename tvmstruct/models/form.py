"""How a built-in model stores its matrices: dense, or each as a sum of Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvmstruct.errors import InputError
from tvmstruct.families.kronecker import factor_shapes
from tvmstruct.families.word2ket_xs import MOST, factor_sides

KINDS = ("dense", "kronecker", "phm")
Factors = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Form:
    """What becomes of every matrix and of every table of words; other tables stay dense.

    "dense" keeps them.  "kronecker" is Shapeshifter: a matrix is ``sum_k A_k (x) B_k`` of ``r``
    terms with factors of ceil(sqrt n) x ceil(sqrt m), cropped, and an embedding table is
    word2ketXS of ``r_embedding`` terms and ``order`` factors (equation 3.4 of the thesis).
    "phm" is the layer of Zhang et al. that the thesis compares with: ``r`` terms, A r x r and
    B n/r x m/r; embeddings stay dense.  What would not become smaller stays dense.
    """

    kind: str = "dense"
    r: int = 16
    r_embedding: int = 256
    order: int = 2

    def check(self, model: str) -> None:
        """Raise InputError for an unknown kind or an order that no table has."""
        if self.kind not in KINDS:
            raise InputError(f"{model}: form is {self.kind!r}, want one of {', '.join(KINDS)}")
        if not 2 <= self.order <= MOST:
            raise InputError(f"{model}: order is {self.order}, want 2 to {MOST}")

    def matrix(self, n_in: int, n_out: int) -> Factors | None:
        """Return the shapes of A and B of a matrix, or None where it stays dense."""
        if self.kind == "dense":
            return None
        if self.kind == "kronecker":
            a, b = factor_shapes(n_in, n_out, r=self.r)
        elif n_in % self.r or n_out % self.r:
            raise InputError(
                f"phm: a {n_in}x{n_out} matrix does not split into r={self.r} parts each way; "
                "take an r that divides both sides, or form=kronecker, which crops"
            )
        else:
            a, b = (self.r, self.r), (n_in // self.r, n_out // self.r)
        stored = self.r * (math.prod(a) + math.prod(b))
        return (a, b) if stored < n_in * n_out else None

    def table(self, rows: int, width: int) -> tuple[int, int] | None:
        """Return t, q of the ``order`` factors t x q of a table, or None where it stays dense."""
        if self.kind != "kronecker":
            return None
        t, q = factor_sides(rows, width, order=self.order, r=self.r_embedding)
        stored = self.r_embedding * self.order * t * q
        return (t, q) if stored < rows * width else None
