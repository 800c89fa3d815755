"""LLVM source of what structured kernels call on bfloat16: rounding to words, and their product.

TVM has no bfloat16 vectors of its own, so these are functions in LLVM that vanish by inlining. A
``vdpbf16ps`` takes denormal numbers as zero.
"""

from __future__ import annotations

from tvmstruct.schedules.compute.row_words import JOIN, ROUND

DOT = "tvmstruct_bf16_dot{lanes}"  # sums + a . b on vectors of words
GROUPS, RUNS, SUMS = (1, 2, 4, 8, 16), (2, 4, 8, 16, 32), (4, 8, 16)  # lanes


def llvm_source() -> str:
    """Return the functions for all lanes."""
    parts = [_join(lanes) for lanes in GROUPS] + [_round(lanes) for lanes in RUNS]
    return "".join([*parts, *(_dot(lanes) for lanes in SUMS)])


def _vector(lanes: int, kind: str) -> str:
    return kind if lanes == 1 else f"<{lanes} x {kind}>"


def _join(lanes: int) -> str:
    """Words with the low half of one vector and the high half of another."""
    f, b, h, w = (_vector(lanes, kind) for kind in ("float", "bfloat", "i16", "i32"))
    by = "16" if lanes == 1 else "splat (i32 16)"
    halves = "".join(
        f"  %{x}b = fptrunc {f} %{x} to {b}\n  %{x}h = bitcast {b} %{x}b to {h}\n"
        f"  %{x}w = zext {h} %{x}h to {w}\n"
        for x in ("low", "high")
    )
    return (
        f"define linkonce_odr {w} @{JOIN.format(lanes=lanes)}({f} %low, {f} %high)"
        f" alwaysinline nounwind {{\n{halves}"
        f"  %up = shl {w} %highw, {by}\n  %y = or {w} %up, %loww\n  ret {w} %y\n}}\n"
    )


def _round(lanes: int) -> str:
    """A run of neighbours as words of two."""
    f, b, w = _vector(lanes, "float"), _vector(lanes, "bfloat"), _vector(lanes // 2, "i32")
    return (
        f"define linkonce_odr {w} @{ROUND.format(lanes=lanes)}({f} %x) alwaysinline nounwind {{\n"
        f"  %b = fptrunc {f} %x to {b}\n  %w = bitcast {b} %b to {w}\n  ret {w} %w\n}}\n"
    )


def _dot(lanes: int) -> str:
    f, w, b = _vector(lanes, "float"), _vector(lanes, "i32"), _vector(2 * lanes, "bfloat")
    intrinsic = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    return (
        f"declare {f} {intrinsic}({f}, {b}, {b})\n"
        f"define linkonce_odr {f} @{DOT.format(lanes=lanes)}({f} %c, {w} %a, {w} %b)"
        f" alwaysinline nounwind {{\n"
        f"  %x = bitcast {w} %a to {b}\n  %y = bitcast {w} %b to {b}\n"
        f"  %s = call {f} {intrinsic}({f} %c, {b} %x, {b} %y)\n  ret {f} %s\n}}\n"
    )
