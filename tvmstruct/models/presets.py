"""Configurations under names of their own: the models of Tables 4 to 7 of Shapeshifter.

The text of the thesis swaps two sizes: IWSLT'14 has a feed-forward size of 1024 and four heads,
the others 2048 and eight.  It names no vocabulary.  Those of IWSLT'14 (German 8,848, English
6,632) and of WMT'14 English-French (44,512) are fairseq's for these data sets; with WMT'16 only
34,970 to 34,983 words give both printed totals, 62.0 and 5.4 million.  T5-small has no biases,
but the totals printed for its Shapeshifter are 36,000 to 38,000 parameters above its factors,
norms and position scores; a bias on the four matrices of every attention is 36,864.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Options = Mapping[str, int | bool | str]


@dataclass(frozen=True)
class Preset:
    """The name of a model and the options that differ from its own."""

    model: str
    options: Options = field(default_factory=dict[str, int | bool | str])


def _transformer(**options: int) -> Preset:
    return Preset("transformer", {"hidden": 512, "layers": 6, "seq": 128, **options})


def _shapeshifter(preset: Preset, r: int) -> Preset:
    return Preset(preset.model, {**preset.options, "form": "kronecker", "r": r, "r_embedding": 256})


_BASES = {
    "iwslt": _transformer(ffn=1024, heads=4, vocabulary=8848, target_vocabulary=6632),
    "wmt16": _transformer(ffn=2048, heads=8, vocabulary=34976),
    "wmt14": _transformer(ffn=2048, heads=8, vocabulary=44512),
    "t5": Preset("t5", {"attention_bias": True}),
}
RANKS = {"iwslt": 64, "wmt16": 24, "wmt14": 64, "t5": 16}

PRESETS: Mapping[str, Preset] = {
    **{f"transformer-{name}": base for name, base in _BASES.items() if base.model != "t5"},
    **{f"shapeshifter-{name}": _shapeshifter(base, RANKS[name]) for name, base in _BASES.items()},
}
"""Every preset by name."""
