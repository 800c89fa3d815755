"""A prediction as text and as a picture: which unit ran what, and who waited for whom."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from tvmstruct.errors import InputError
from tvmstruct.vta.cycles import Prediction
from tvmstruct.vta.engine import UNITS, Span
from tvmstruct.vta.instructions import (
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    VectorGemm,
    unit_of,
)
from tvmstruct.vta.timing import tile_operations

HEAD = f"{'#':>6}  {'unit':<8}{'instruction':<22}{'queued':>9}{'start':>9}{'end':>9}  waited for"
WIDTH, HEIGHT, DPI = 13.0, 3.4, 130  # inches
COLOURS = {
    "LOAD": "#4c78a8",
    "STORE": "#72b7b2",
    "GEMM": "#e45756",
    "VGEMM": "#b279a2",
    "ALU": "#f58518",
    "other": "#b0b0b0",
}
WAITING = "#e8e8e8"


def describe(instruction: Instruction) -> str:
    """Return an instruction in a few words: what it does and how much of it."""
    if isinstance(instruction, Gemm):
        name = "VGEMM" if isinstance(instruction, VectorGemm) else "GEMM"
        return f"{name} {'reset ' if instruction.reset else ''}{tile_operations(instruction)}"
    if isinstance(instruction, Alu):
        operand = instruction.imm if instruction.use_imm else "tile"
        name = instruction.alu_opcode.name.lower()
        return f"ALU {name} {operand}: {tile_operations(instruction)}"
    if isinstance(instruction, Finish):
        return "FINISH"
    if instruction.is_nop:
        return "NOP"
    name = "LOAD" if isinstance(instruction, Load) else "STORE"
    return f"{name} {instruction.memory.name.lower()} {instruction.y_size}x{instruction.x_size}"


def text(found: Prediction, first: int = 0, count: int | None = None) -> str:
    """Return a table of ``count`` instructions from ``first``, and the sums of all."""
    rows = list(_rows(found, *_range(found, first, count)))
    return "\n".join([HEAD, *rows, "", summary(found)])


def _range(found: Prediction, first: int, count: int | None) -> tuple[int, int]:
    total = len(found.spans)
    if not 0 <= first < total or (count is not None and count < 1):
        raise InputError(
            f"timeline: from {first}, count {count}: the program ran instructions 0 to {total - 1}"
        )
    return first, total if count is None else min(total, first + count)


def _rows(found: Prediction, first: int, end: int) -> Iterator[str]:
    for index in range(first, end):
        instruction, span = found.stream[index], found.spans[index]
        unit = UNITS[unit_of(instruction)]
        start, stop = (t if t >= 0 else "-" for t in (span.start, span.end))
        what, waited = describe(instruction), _waited(span, found.heads[index])
        yield (f"{index:>6}  {unit:<8}{what:<22}{span.queued:>9}{start:>9}{stop:>9}  {waited}")


def _waited(span: Span, head: int) -> str:
    """Return, such as, ``l2g of 12 for 340; dma 7``: at the head of the queue, and for data."""
    if span.start < 0:
        return "did not start"
    parts: list[str] = []
    if span.start > head:
        parts.append(f"{span.reason} of {span.blocker} for {span.start - head}")
    elif head > span.queued:
        parts.append(f"queue of {span.blocker}")
    if span.memory:
        parts.append(f"dma for {span.memory}")
    return "; ".join(parts)


def summary(found: Prediction) -> str:
    """Return cycles, how busy each unit was, and what all units waited for."""
    busy = ", ".join(f"{unit} {cycles / found.cycles:.1%}" for unit, cycles in found.busy.items())
    reasons = sorted(found.waits.items(), key=lambda pair: -pair[1])
    waits = ", ".join(f"{name} {cycles}" for name, cycles in reasons if cycles) or "nothing"
    return (
        f"{found.cycles} cycles; busy: {busy}, read channel {found.read_beats / found.cycles:.1%}\n"
        f"matrix unit: {found.matrix_cycles} tile operations, "
        f"{found.utilisation:.1%} of the cycles\n"
        f"cycles waited for: {waits}"
    )


def to_png(found: Prediction, first: int = 0, count: int | None = None) -> bytes:
    """Return the three units over time as a PNG file; needs the extra ``plot``.

    Grey is the time an instruction waits at the head of its queue.
    """
    from tvmstruct.profiling.plots import check_matplotlib  # imports TVM

    check_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    bars = _bars(found, *_range(found, first, count))
    for (row, colour), pieces in bars.items():
        axes.broken_barh(
            pieces, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3
        )
    axes.set_yticks(range(len(UNITS)), UNITS)
    axes.set_ylim(len(UNITS) - 0.5, -0.5)
    axes.set_xlabel("cycle")
    axes.set_title(
        f"{found.cycles} cycles, matrix unit used in {found.utilisation:.1%} of them", fontsize=10
    )
    shown = {**COLOURS, "waiting": WAITING}
    handles = [Patch(color=colour, label=name) for name, colour in shown.items()]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _bars(found: Prediction, first: int, end: int) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Return start and length of every bar, by unit and colour."""
    bars: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for index in range(first, end):
        instruction, span, head = found.stream[index], found.spans[index], found.heads[index]
        if span.end < 0:
            continue
        unit = int(unit_of(instruction))
        if span.start > head:
            bars.setdefault((unit, WAITING), []).append((head, span.start - head))
        kind = describe(instruction).split()[0]
        colour = COLOURS.get(kind, COLOURS["other"])
        bars.setdefault((unit, colour), []).append((span.start, span.end - span.start))
    return bars
