"""Zero skipping inside a tile of attention (NLP-Fast, section III-C): approximate, asked for.

A score that lies far enough under the maximum gives a weight of zero. Keys that no query of a
tile weighs are left out of exp, and those that no query of a register tile weighs are left out
of the weighted sum: their numbers go into lists, without a branch, and the loops run over those.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.x86.attention_tile import Index, Problem, View, reduce_lanes, splat

RAISE = "tvmstruct_raise"
LLVM = f"""
declare float @llvm.maxnum.f32(float, float)
define linkonce_odr float @{RAISE}(ptr %best, float %value) alwaysinline nounwind {{
  %old = atomicrmw fmax ptr %best, float %value monotonic
  %new = call float @llvm.maxnum.f32(float %old, float %value)
  ret float %new
}}
"""
ULPS = 2.0**-22  # how close to the maximum a score counts as one


class Keys:
    """A list of keys of a chunk that grows while code runs."""

    def __init__(self, most: int) -> None:
        self.places = T.alloc_buffer((most,), "int32", scope="global")
        self.number = T.alloc_buffer((1,), "int32", scope="global")

    def clear(self) -> None:
        """Drop all keys."""
        T.buffer_store(self.number, T.int32(0), [0])

    def add(self, key: Expr, wanted: Expr) -> None:
        """Add a key where the boolean ``wanted`` holds."""
        T.buffer_store(self.places, T.cast(key, "int32"), [self.number[0]])
        more = T.Select(wanted, T.int32(1), T.int32(0))
        T.buffer_store(self.number, self.number[0] + more, [0])

    @property
    def count(self) -> Expr:
        """How many there are."""
        return T.cast(self.number[0], "int64")

    def at(self, i: Expr) -> Expr:
        """Return the i-th key."""
        return T.cast(self.places[i], "int64")


def limit(problem: Problem, top: Expr, lanes: int) -> Expr:
    """Return the score up to which weights are zero; the maximum itself is never under it."""
    assert problem.skip is not None
    threshold, raw = problem.skip
    bound = splat(threshold, lanes) if raw else top - splat(threshold, lanes)
    # Next to a maximum of -1e9, say, a threshold of 8 rounds away.
    size = T.max(T.max(top, splat(0.0, lanes) - top), splat(1.0, lanes))
    return T.min(bound, top - size * splat(ULPS, lanes))


def raise_best(best: View, query: Index, top: Expr) -> Expr:
    """Raise what all threads have found for a query to ``top``, and return the larger of both.

    Needs `LLVM` around. How much is skipped depends on who is first; no weight over the threshold
    of the true maximum is.
    """
    place = T.address_of(best.buffer[tuple(best.at(0, query))])
    return T.call_extern("float32", RAISE, place, top)


def weight(score: Expr, top: Expr, bound: Expr, lanes: int) -> Expr:
    """Return ``exp(score - top)``, zero up to the bound; NaN is under no bound."""
    return T.Select(score <= bound, splat(0.0, lanes), vector_math.exp(score - top))


def any_lane(flags: Expr, lanes: int) -> Expr:
    """Return whether a lane of a vector of zeros and ones is one."""
    return reduce_lanes(flags, lanes, T.max) > T.float32(0)


def above(score: Expr, bound: Expr, lanes: int) -> Expr:
    """Return one for each lane whose score is over the bound or no number, else zero."""
    return T.Select(score <= bound, splat(0.0, lanes), splat(1.0, lanes))
