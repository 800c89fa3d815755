"""What becomes of the layers of a model that VTA takes: observed, quantised, launched.

While scales are still unknown the sites of a model compute in float and remember what they read;
from then on they compute in int8, in numpy or by launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import InputError, TvmstructError, VtaError
from tvmstruct.layers import Layer, Offloaded, weights_of
from tvmstruct.ops import Array
from tvmstruct.report import LayerRecord
from tvmstruct.vta import sites
from tvmstruct.vta.calibration import Calibration, Samples
from tvmstruct.vta.integer import Program, Reorder, Step, factors, terms
from tvmstruct.vta.quantize import FloatLayer, NoIntegerForm, Quantised, quantise
from tvmstruct.vta.simulated_kernel import Kernel
from tvmstruct.vta.site_entry import site_symbol

OBSERVE, FLOAT, INTEGER, LAUNCH = "observe", "float", "integer", "launch"
UNREACHED = "the calibration batches do not reach it"
STAYS = {  # forms of the report that VTA has nothing for
    "attention": "VTA has no exponential for softmax",
    "embedding": "VTA gathers no rows by ids",
    "table": "VTA gathers no rows by ids",
    "lookup": "VTA gathers no rows by ids",
}

Make = Callable[[Sequence[Step], int], Sequence[Any]]  # steps and rows to what has ``run``


class Refused(TvmstructError):
    """VTA cannot have a layer after all; lowering starts again without it."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key, self.why = key, why


@dataclass(eq=False)
class FloatSite:
    """Layers in float; with ``samples`` it remembers what each of them reads."""

    symbol: str
    layers: tuple[tuple[str, FloatLayer], ...]
    samples: dict[str, Samples] | None = None
    keep: int = 0

    def compute(self, x: Array) -> Array:
        """Return float32 rows for float32 rows."""
        for key, layer in self.layers:
            if self.samples is not None:
                check_finite(x, f"calibration: the input of {key}")
                self.samples.setdefault(key, Samples(self.keep)).add(x)
            x = layer(x).astype(np.float32)
        return x


@dataclass(eq=False)
class IntegerSite:
    """Layers in int8, whose linear steps numpy or kernels for VTA compute."""

    symbol: str
    name: str
    layers: Quantised

    def compute(self, x: Array) -> Array:
        """Return float32 rows for float32 rows."""
        check_finite(x, f"the input of {self.name}")
        return self.layers(x)


def check_finite(x: Array, what: str) -> None:
    """Raise InputError where int8 cannot hold a value."""
    if not np.isfinite(x).all():
        raise InputError(
            f"{what} has NaN or infinite values, which int8 cannot hold: "
            "are the inputs and weights finite?"
        )


class Offload:
    """All that the buckets of one model share about VTA. ``make`` builds the launch of steps."""

    def __init__(self, calibration: Calibration, make: Make) -> None:
        self.options, self.keep, self.make = calibration.options, calibration.rows, make
        self.state = OBSERVE
        self.samples: dict[str, Samples] = {}
        self.refused: dict[str, str] = {}
        self.notes: dict[str, tuple[float, str]] = {}  # layer to error and what the report says
        self._quantised: dict[str, Quantised] = {}
        self._kernels: dict[tuple[str, int], Quantised] = {}
        self._made: list[sites.Site] = []
        self._count = itertools.count()

    def obstacle(self, layer: Layer) -> str | None:
        """Return why VTA cannot have a layer, or None."""
        if layer.key in self.refused:
            return self.refused[layer.key]
        arrays = [*layer.op.arrays(), *([] if layer.bias is None else [layer.bias])]
        if not all(np.isfinite(a).all() for a in arrays):
            return "its weights have NaN or infinite values, which int8 cannot hold"
        try:
            for term in terms(layer.op):
                factors(term)
        except ValueError as error:
            return str(error)
        if self.state in (INTEGER, LAUNCH) and layer.key not in self.samples:
            return UNREACHED
        return None

    def chains(self, layer: Layer) -> bool:
        """Return whether a layer can read and yield int8: a sum is added in float."""
        return len(terms(layer.op)) == 1

    def symbol(self, node: Offloaded, rows: int) -> str:
        """Return the symbol of the site that computes layers for so many rows."""
        if self.state in (OBSERVE, FLOAT):
            layers = tuple((layer.key, _plain(layer)) for layer in node.layers)
            samples = self.samples if self.state == OBSERVE else None
            site = FloatSite(self._fresh(), layers, samples, self.keep)
        else:
            site = self._integer_site(node, rows)
        self._made.append(sites.enter(site))
        return site.symbol

    def taken(self) -> list[sites.Site]:
        """Return the sites made since the last call; who runs their code must keep them."""
        made, self._made = self._made, []
        return made

    def records(self, records: list[LayerRecord], refusals: Mapping[str, str]) -> list[LayerRecord]:
        """Return the records, saying what runs where and why."""
        return [self._record(record, refusals) for record in records]

    def _record(self, record: LayerRecord, refusals: Mapping[str, str]) -> LayerRecord:
        form = record.form.split(" ", maxsplit=1)[0]
        if (why := STAYS.get(form)) is not None:
            return replace(record, reason=_joined(f"on the CPU: {why}", record.reason))
        if (why := refusals.get(record.name)) is not None:
            return replace(record, reason=_joined(f"on the CPU: {why}", record.reason))
        if record.name not in self.notes:
            return record
        error, note = self.notes[record.name]
        return replace(
            record,
            form=f"{record.form} vta",
            bytes=record.params,
            error=float(np.hypot(record.error, error)),
            reason=_joined(note, record.reason),
        )

    def _fresh(self) -> str:
        return f"{sites.PREFIX}{id(self):x}.{next(self._count)}"

    def _integer_site(self, node: Offloaded, rows: int) -> IntegerSite:
        layers = self._quantise(node)
        name = node.key
        if self.state == INTEGER:
            return IntegerSite(self._fresh(), name, layers)
        if (name, rows) not in self._kernels:
            self._kernels[name, rows] = self._build(node, layers, rows)
        made = self._kernels[name, rows]
        self._note(node, made, rows)
        return IntegerSite(site_symbol(made), name, made)

    def _quantise(self, node: Offloaded) -> Quantised:
        if node.key not in self._quantised:
            x = self.samples[node.layers[0].key].array()
            try:
                self._quantised[node.key] = quantise(
                    list(map(_plain, node.layers)), x, self.options
                )
            except NoIntegerForm as error:
                raise Refused(node.layers[error.index].key, str(error)) from error
        return self._quantised[node.key]

    def _build(self, node: Offloaded, layers: Quantised, rows: int) -> Quantised:
        """Return the layers with a kernel in the place of each linear step."""
        programs = tuple(
            replace(program, steps=tuple(self._launches(node, layers, program, rows)))
            for program in layers.programs
        )
        return replace(layers, programs=programs)

    def _launches(
        self, node: Offloaded, layers: Quantised, program: Program, rows: int
    ) -> Sequence[Any]:
        """Return a program in few launches: each takes as many steps as VTA can have at once."""
        made: list[Any] = []
        start = 0
        while start < len(program.steps):
            for end in range(len(program.steps), start, -1):
                steps = program.steps[start:end]
                if all(isinstance(step, Reorder) for step in steps):
                    made += steps  # the CPU moves features
                    break
                try:
                    made += self.make(steps, rows)
                    break
                except VtaError as error:
                    if end == start + 1:
                        layer = next(n for n, last in enumerate(layers.ends) if start < last)
                        raise Refused(node.layers[layer].key, str(error)) from error
            start = end
        return made

    def _note(self, node: Offloaded, made: Quantised, rows: int) -> None:
        """Keep what the report says of every layer of a site."""
        x_scale, y_scale = made.programs[0].x_scale, made.programs[-1].y_scale
        steps: list[Any] = [step for program in made.programs for step in program.steps]
        together = f" and {len(node.layers)} layers" if len(node.layers) > 1 else ""
        for i, (layer, error) in enumerate(zip(node.layers, made.errors, strict=True), 1):
            first, last = i == 1, i == len(node.layers)
            text = _joined(
                f"int8 on VTA: {cost(steps)} for {rows} rows{together}",
                f"scale of x {_span(x_scale)}" if first else "x is int8 already",
                f"of y {_span(y_scale)}" if last else "y stays int8",
            )
            for part in weights_of(layer):
                self.notes[part.names[0]] = self.notes[part.key] = (error, text)


def cost(steps: Iterable[Any]) -> str:
    """Return how many of some steps are launches, and the cycles predicted for them, in words."""
    kernels = [step for step in steps if isinstance(step, Kernel)]
    cycles = sum(kernel.prediction.cycles for kernel in kernels)
    busy = sum(kernel.prediction.matrix_cycles for kernel in kernels)
    launches = f"{len(kernels)} launch{'' if len(kernels) == 1 else 'es'}"
    return f"{launches}, {cycles:,} cycles, matrix unit {busy / max(cycles, 1):.0%} busy"


def _plain(layer: Layer) -> FloatLayer:
    bias = None if layer.bias is None else np.asarray(layer.bias, np.float32)
    return FloatLayer(ops.cast(layer.op, np.float32), bias, layer.activation == "relu")


def _span(values: Array) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
