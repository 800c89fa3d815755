"""Structured recurrent layers by their sizes: AntMan's g_im, g_hm, r_im and r_hm, and counts.

The gates of a layer are one matrix each for the input and for the hidden state, ``n_in`` and
``h`` by ``gates h``. A rank is ``min(n_in, n_out) / r`` (Rajbhandari et al. 2019, Table 7).
"""

from __future__ import annotations

from tvmstruct.errors import PlanError
from tvmstruct.families import FAMILIES
from tvmstruct.ops import Dense, Op, zeros
from tvmstruct.planning import LayerPlan
from tvmstruct.recurrent import GATES, Cell, Recurrent

Forms = tuple[LayerPlan | None, LayerPlan | None]  # of the input and the hidden matrix


def antman(
    family: str, *, g_im: int, g_hm: int, r_im: int | None = None, r_hm: int | None = None
) -> Forms:
    """Return the forms of the input and the hidden matrix by the names of AntMan's Table 7.

    ``family`` is "lgp_shuffle", "lgp_dense" or "low_rank_lgp"; ranks belong to the last.
    """
    groups, ranks = {"input": g_im, "hidden": g_hm}, {"input": r_im, "hidden": r_hm}
    ranked = family == "low_rank_lgp"
    if any((rank is not None) != ranked for rank in ranks.values()):
        raise PlanError(f"{family}: r_im={r_im}, r_hm={r_hm}; ranks belong to low_rank_lgp, both")
    found = [
        LayerPlan(family, {"g": g} | ({"r": ranks[name]} if ranked else {}), name)
        for name, g in groups.items()
    ]
    return found[0], found[1]


def zero_operator(n_in: int, n_out: int, form: LayerPlan | None) -> Op:
    """Return an operator of zeros in a form, dense where that is None."""
    if form is None:
        return Dense(zeros(n_in, n_out))
    try:
        return FAMILIES[form.family].template(n_in, n_out, **form.parameters)
    except ValueError as error:
        raise PlanError(f"{form.layer or 'plan'}: {error}") from error


def zero_layer(
    kind: str, n_in: int, h: int, input: LayerPlan | None = None, hidden: LayerPlan | None = None
) -> Recurrent:
    """Return one direction of a layer of zeros, without biases; forms left out are dense.

    >>> zero_layer("lstm", 800, 100, *antman("lgp_shuffle", g_im=10, g_hm=4)).macs
    42000
    """
    width = GATES[Cell(kind).kind] * h
    return Recurrent(Cell(kind), zero_operator(n_in, width, input), zero_operator(h, width, hidden))


def reduction(layer: Recurrent) -> float:
    """Return the multiply-adds of the dense layer of this size over those of ``layer``."""
    width = layer.cell.gates * layer.h
    return (layer.n_in + layer.h) * width / layer.macs
