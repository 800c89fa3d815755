"""What ``tvmstruct profile`` does once its options are read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tvmstruct.frontends import TensorSpec
from tvmstruct.model_argument import ModelArgument
from tvmstruct.models import Config
from tvmstruct.profiling import cachegrind
from tvmstruct.profiling.events import events_of
from tvmstruct.profiling.page import to_html
from tvmstruct.profiling.plots import to_png
from tvmstruct.profiling.result import DenormalWarning, Profile, plain, to_csv
from tvmstruct.profiling.sweep import check_axes, sweep
from tvmstruct.progress import working

Shapes = Mapping[str, Sequence[int]]


class Command:
    """A model, read, and what to measure of it."""

    def __init__(self, model: ModelArgument) -> None:
        with working(f"reading {model}"):
            self.model = model.config or model.source()
        self.axes: Sequence[str] = ()
        self.counting: dict[str, Any] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the inputs of the model."""
        if isinstance(self.model, Config):
            return tuple(TensorSpec(e.name, "", e.dims) for e in self.model.specs())
        return self.model.inputs

    def check(self, axes: Sequence[str], mode: str, events: Sequence[str]) -> None:
        """Keep what to sweep and count; InputError where the model or we cannot."""
        check_axes(self.model, axes)
        events_of(mode, events)
        self.axes, self.counting = axes, {"mode": mode, "events": events}

    def profile(
        self, shapes: Shapes | None, factor: int, options: Mapping[str, Any]
    ) -> tuple[Profile, ...]:
        """Return the profiles; tables show denormal numbers, so there is no warning too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DenormalWarning)
            return sweep(
                self.model,
                self.axes,
                shapes,
                factor=factor,
                watch=working,
                **options,
                **self.counting,
            )

    def simulate(
        self, shapes: Shapes | None, cache: str, options: Mapping[str, Any]
    ) -> cachegrind.Simulation:
        """Return what cachegrind counts."""
        with working("compiling for AVX2, then two calls in simulated caches: minutes"):
            return cachegrind.simulate(self.model, shapes, cache=cache, **options)


def write(
    profiles: Sequence[Profile], plot: Path | None, html: Path | None, csv: Path | None
) -> None:
    """Write the files that were asked for."""
    if plot is not None:
        plot.write_bytes(to_png(profiles))
    if html is not None:
        html.write_text(to_html(profiles), encoding="utf-8")
    if csv is not None:
        csv.write_text(to_csv(profiles), encoding="utf-8")


def show(profiles: Sequence[Profile], *, as_json: bool) -> None:
    """Print tables, or one JSON object with a list of profiles."""
    if as_json:
        typer.echo(json.dumps({"profiles": [plain(p) for p in profiles]}, indent=2))
        return
    for profile in profiles:
        profile.show()
