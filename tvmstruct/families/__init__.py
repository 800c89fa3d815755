"""The structured forms: each a function returning an expression, and its nearest member."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tvmstruct.families.bh4 import bh4, bh4_params, bh4_template, nearest_bh4
from tvmstruct.families.kronecker import (
    kronecker,
    kronecker_macs,
    kronecker_params,
    kronecker_template,
    nearest_kronecker,
)
from tvmstruct.families.lgp import (
    block_diagonal,
    block_diagonal_template,
    block_params,
    lgp_dense,
    lgp_dense_params,
    lgp_dense_template,
    lgp_shuffle,
    lgp_shuffle_template,
    low_rank_lgp,
    low_rank_lgp_params,
    low_rank_lgp_template,
    nearest_block_diagonal,
    nearest_lgp_dense,
    nearest_lgp_shuffle,
    nearest_low_rank_lgp,
)
from tvmstruct.families.low_rank import (
    low_rank,
    low_rank_params,
    low_rank_template,
    nearest_low_rank,
)
from tvmstruct.families.monarch import monarch, monarch_params, monarch_template, nearest_monarch
from tvmstruct.families.vvma import nearest_vvma, vvma, vvma_macs, vvma_params, vvma_template
from tvmstruct.families.word2ket_xs import (
    nearest_word2ket_xs,
    word2ket_xs,
    word2ket_xs_macs,
    word2ket_xs_params,
    word2ket_xs_template,
)
from tvmstruct.fit import Fit
from tvmstruct.ops import Op

__all__ = [
    "FAMILIES",
    "Family",
    "bh4",
    "block_diagonal",
    "kronecker",
    "lgp_dense",
    "lgp_shuffle",
    "low_rank",
    "low_rank_lgp",
    "monarch",
    "vvma",
    "word2ket_xs",
]


@dataclass(frozen=True)
class Family:
    """One structured form: how to fit it, what it stores, what it costs.

    ``nearest(w, **parameters)`` takes ``w`` (n_in, n_out); ``template(n_in, n_out,
    **parameters)`` is a member of zeros, shaped like the nearest; ``params`` and ``macs`` are
    formulas called as ``params(n_in, n_out, **parameters)``.  ``required`` and ``optional``
    name the parameters and their kinds: "int", "float", "bool" or "shape" (two ints).
    """

    name: str
    title: str
    nearest: Callable[..., Fit]
    template: Callable[..., Op]
    params: Callable[..., int]
    macs: Callable[..., int]
    required: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict[str, str])


def _family(
    name: str,
    title: str,
    nearest: Callable[..., Fit],
    template: Callable[..., Op],
    params: Callable[..., int],
    required: str,
    *,
    macs: Callable[..., int] | None = None,
    **optional: str,
) -> Family:
    kinds = dict.fromkeys(required.split(), "int")
    return Family(name, title, nearest, template, params, macs or params, kinds, optional)


_ALL = (
    _family("low_rank", "low rank", nearest_low_rank, low_rank_template, low_rank_params, "r"),
    _family(
        "vvma",
        "VVMA",
        nearest_vvma,
        vvma_template,
        vvma_params,
        "k",
        macs=vvma_macs,
        transposed="bool",
    ),
    _family(
        "kronecker",
        "sum of Kroneckers",
        nearest_kronecker,
        kronecker_template,
        kronecker_params,
        "r",
        macs=kronecker_macs,
        a="shape",
        b="shape",
    ),
    _family(
        "block_diagonal",
        "block diagonal",
        nearest_block_diagonal,
        block_diagonal_template,
        block_params,
        "g",
    ),
    _family(
        "lgp_shuffle", "LGP-shuffle", nearest_lgp_shuffle, lgp_shuffle_template, block_params, "g"
    ),
    _family("lgp_dense", "LGP-dense", nearest_lgp_dense, lgp_dense_template, lgp_dense_params, "g"),
    _family(
        "low_rank_lgp",
        "LowRank-LGP",
        nearest_low_rank_lgp,
        low_rank_lgp_template,
        low_rank_lgp_params,
        "g r",
        g_out="int",
        sweeps="int",
    ),
    _family(
        "bh4",
        "BH4",
        nearest_bh4,
        bh4_template,
        bh4_params,
        "b",
        decay="float",
        sweeps="int",
        seed="int",
    ),
    _family("monarch", "Monarch", nearest_monarch, monarch_template, monarch_params, "b", r="int"),
    _family(
        "word2ket_xs",
        "word2ketXS",
        nearest_word2ket_xs,
        word2ket_xs_template,
        word2ket_xs_params,
        "order r",
        macs=word2ket_xs_macs,
        sweeps="int",
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""Every form by name, in the order that breaks ties between equally cheap ones."""
