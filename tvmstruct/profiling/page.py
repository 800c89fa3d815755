"""Profiles as one web page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from tvmstruct.profiling.plots import to_png
from tvmstruct.profiling.result import HEADS, Profile, cells

STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
    "table{border-collapse:collapse}caption{text-align:left;font-weight:bold;padding:1em 0 .5em}"
    "th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


def to_html(profiles: Sequence[Profile]) -> str:
    """Return plots and a table for each profile; needs the extra ``plot``."""
    title = escape(f"Profile of {profiles[0].model}")
    picture = base64.b64encode(to_png(profiles)).decode()
    image = f'<img alt="shares of the classes; roofline" src="data:image/png;base64,{picture}">'
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
    style = f"<style>{STYLE}</style>"
    tables = "".join(map(_section, profiles))
    return f"{head}{style}<h1>{title}</h1>{image}{tables}</html>\n"


def _section(profile: Profile) -> str:
    heads = _line("th", [*HEADS, *profile.events])
    rows = "".join(
        _line("td", [*cells(row), *(f"{n:,.0f}" for n in row.events.values())])
        for row in profile.rows
    )
    remarks = "".join(f"<p>{escape(line)}</p>" for line in profile.remarks())
    return f"<table><caption>{escape(profile.title)}</caption>{heads}{rows}</table>{remarks}"


def _line(tag: str, texts: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"
