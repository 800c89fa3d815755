"""Profiles as pictures: shares of the classes, as in Fig. 4 of NLP-Fast, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING, Any

from tvmstruct.errors import MissingDependencyError
from tvmstruct.profiling.result import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, BAR_WIDTH, HEIGHT, DPI = 11.5, 0.8, 4.8, 130  # inches
MARKERS = "osD^vPX*"
LEAST_SHARE = 0.06  # of a part of a bar that has room for its number
MARGIN = 4.0  # factor between the points and the edges of the roofline


def to_png(profiles: Sequence[Profile]) -> bytes:
    """Return both plots, side by side, as a PNG file; needs the extra ``plot``."""
    check_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    width = WIDTH + BAR_WIDTH * len(profiles)
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_shares(left, profiles)
    draw_roofline(right, profiles)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def check_matplotlib() -> None:
    """Raise MissingDependencyError where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError('plots need matplotlib: pip install "tvmstruct[plot]"')


def draw_shares(axes: Axes, profiles: Sequence[Profile]) -> None:
    """Draw a bar for each profile, cut into the shares of its classes."""
    colours = _colours(profiles)
    bottoms = [0.0] * len(profiles)
    for name, colour in colours.items():
        shares = [_share(profile, name) for profile in profiles]
        bars = axes.bar(range(len(profiles)), shares, bottom=bottoms, color=colour, label=name)
        texts = [f"{share:.0%}" if share >= LEAST_SHARE else "" for share in shares]
        axes.bar_label(bars, texts, label_type="center", fontsize=8)
        bottoms = [b + s for b, s in zip(bottoms, shares, strict=True)]
    axes.set_xticks(range(len(profiles)), [_caption(profile) for profile in profiles])
    axes.set_xlim(-0.7, len(profiles) - 0.3)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the time of all kernels")
    axes.set_title(profiles[0].model)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )


def draw_roofline(axes: Axes, profiles: Sequence[Profile]) -> None:
    """Draw GFLOP/s over FLOP/byte of every class, under the limits of each profile."""
    colours, points = _colours(profiles), []
    for profile, marker in zip(profiles, cycle(MARKERS), strict=False):
        for row in profile.rows:
            if row.intensity > 0 and row.gflops > 0:
                points.append((row.intensity, row.gflops))
                axes.plot(*points[-1], marker, color=colours[row.name], markeredgecolor="black")
        axes.plot([], [], marker, color="white", markeredgecolor="black", label=profile.label)
    ridge = max(profile.peak / profile.bandwidth for profile in profiles)
    last = MARGIN * max([ridge, *(x for x, _ in points)])
    first = min([ridge, *(x for x, _ in points)]) / MARGIN
    for profile in profiles:
        corner = profile.peak / profile.bandwidth
        line = [first, corner, last], [first * profile.bandwidth, profile.peak, profile.peak]
        axes.plot(*line, color="grey", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP / byte of arguments and results")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"roofline, {profiles[0].threads} threads (colours as on the left)")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def _share(profile: Profile, name: str) -> float:
    return sum(row.share for row in profile.rows if row.name == name)


def _caption(profile: Profile) -> str:
    return f"{profile.label}\n{profile.kernel_seconds * 1e3:.2f} ms"


def _colours(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Return a colour for each class, in the order in which a model runs them."""
    from matplotlib import colormaps

    from tvmstruct.profiling.classes import ORDER, OTHER, rank

    palette = colormaps["tab20"].colors
    names = sorted({row.name for profile in profiles for row in profile.rows}, key=rank)
    unknown = [name for name in names if name not in (*ORDER, OTHER)]
    places = {name: i for i, name in enumerate((*ORDER, OTHER, *unknown))}
    return {name: palette[places[name] % len(palette)] for name in names}
