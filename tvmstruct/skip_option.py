"""``--skip`` and ``--memory`` of the command line, and the table of what skipping does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tvmstruct.errors import InputError
from tvmstruct.skipping import Skip

if TYPE_CHECKING:
    from tvmstruct.model_argument import ModelArgument
    from tvmstruct.skip_analysis import SkipStatistics

RAW = "raw:"


LEGEND = (
    "saved: of softmax and weighted sum; v-gen: values that hardly a query needs; not made: rows "
    "of values left out, with --memory minimal; last four columns: how busy a scheduler keeps the "
    "threads"
)


def parse_skip(text: str) -> Skip:
    """Return the skip of ``8``, ``8,0.99`` or ``raw:0.0``; misuse where that is none."""
    numbers = text.removeprefix(RAW)
    threshold, comma, ratio = numbers.partition(",")
    try:
        more = {"zero_ratio": float(ratio)} if comma else {}
        return Skip(float(threshold), raw=text != numbers, **more)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}: want a number such as 8, or raw:0.0, and a zero ratio as in 8,0.99 if any"
        ) from error


SkipOption = Annotated[
    Skip | None,
    typer.Option(
        "--skip",
        parser=parse_skip,
        metavar="NUMBER",
        help="Leave scores so far below their maximum out of attention, such as 8; or those of "
        "at most a number, as in raw:0.0. Both lose. With --memory minimal values that are zero "
        "for over 0.99 of the queries are not made; another share goes after a comma: 8,0.9.",
    ),
]
Memory = Annotated[
    Literal["auto", "minimal", "baseline"],
    typer.Option(
        help="How attention and feed-forward are cut: minimal holds the least at a time, baseline "
        "keeps everything, to compare with."
    ),
]


def chosen(model: ModelArgument, skip: Skip | None, memory: str) -> dict[str, Any]:
    """Return what differs from the defaults as options of ``compile``."""
    options: dict[str, Any] = {} if memory == "auto" else {"memory": memory}
    if skip is not None:
        options["skip"] = skip
    if options and model.compiled:
        names = " and ".join(f"--{name}" for name in options)
        raise typer.BadParameter(
            f"{model} is compiled already; give {names} to tvmstruct compile instead"
        )
    return options


def skip_rows(found: Mapping[str, SkipStatistics]) -> list[dict[str, Any]]:
    """Return a row of a table for each attention."""
    return [
        {
            "layer": name,
            "zeros": f"{s.zeros:.1%}",
            "saved": f"{s.saved:.1%}",
            "error": f"{s.error:.1e}",
            "cosine": f"{s.cosine:.6f}",
            "v-gen": f"{s.v_gen:.1%}",
            "not made": "-" if s.unmade is None else f"{s.unmade} of {s.value_rows}",
            "threads": s.threads,
        }
        | {scheduler: f"{busy:.1%}" for scheduler, busy in s.utilisation.items()}
        for name, s in found.items()
    ]
