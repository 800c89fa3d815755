"""Plots and pages hold every class; without matplotlib the error names the extra."""

import base64
import re
from dataclasses import replace
from io import BytesIO

import pytest

from tvmstruct.errors import MissingDependencyError
from tvmstruct.profiling import plots
from tvmstruct.profiling.page import to_html
from tvmstruct.profiling.result import Profile, Row


def row(name, share):
    return Row(name, 2, 1e-3 * share, share, 50.0, 1000, 20.0, 40.0, {"cycles": 1234.0})


BASE = Profile(
    **{"model": "bert <x>", "label": "base", "shapes": {"x": (1, 2)}, "threads": 2},
    **{"precision": "f32", "target": "avx2", "runs": 5, "seconds": 2e-3, "peak": 100.0},
    **{"bandwidth": 20.0, "working_set": 4096},
    rows=(row("Q/K/V-Gen", 0.5), row("new thing (fused)", 0.3), row("other", 0.2)),
)
LONGER = replace(BASE, label="S-4x", rows=(row("softmax", 1.0), replace(row("other", 0), gflops=0)))


@pytest.fixture
def image():
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    return lambda data: imread(BytesIO(data), format="png")


def test_png_shows_something(image):
    pixels = image(plots.to_png([BASE, LONGER]))
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert len({tuple(colour) for colour in pixels[::7, ::7].reshape(-1, 4).tolist()}) > 8


def test_bars_and_points(image):
    from matplotlib.figure import Figure

    shares, roof = Figure().subplots(1, 2)
    plots.draw_shares(shares, [BASE, LONGER])
    plots.draw_roofline(roof, [BASE, LONGER])
    _, labels = shares.get_legend_handles_labels()
    assert labels == ["Q/K/V-Gen", "softmax", "new thing (fused)", "other"]
    tops = [max(bar.get_y() + bar.get_height() for bar in shares.patches[i::2]) for i in (0, 1)]
    assert tops == pytest.approx([1, 1])
    points = [line for line in roof.lines if line.get_marker() != "None" and len(line.get_xdata())]
    assert len(points) == 4  # a class without FLOPs has no place on a logarithmic axis


def test_page_is_self_contained(image):
    page = to_html([BASE, LONGER])
    assert "bert &lt;x&gt; S-4x" in page
    assert page.count("<table>") == 2
    assert all(name in page for name in ("Q/K/V-Gen", "cycles", "1,234", "roofline:"))
    assert not re.search(r"(src|href)=.?(http|//|/)", page)
    (data,) = re.findall(r"base64,([^\"]+)", page)
    assert image(base64.b64decode(data)).shape[0] > 400


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tvmstruct\[plot\]"):
        plots.to_png([BASE])
