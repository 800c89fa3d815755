"""Plans: which layer becomes which form, read from and written to JSON.

A plan names layers by their weight and says nothing of layers that stay dense::

    {"version": 1,
     "layers": {"encoder.layer.0.intermediate.dense.weight":
                {"family": "vvma", "parameters": {"k": 32}}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvmstruct.embeddings import TensorTable, nearest_table
from tvmstruct.errors import PlanError
from tvmstruct.families import FAMILIES, Family
from tvmstruct.fit import Fit
from tvmstruct.ops import Array

VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The form that one layer takes; ``layer`` is its name, for messages."""

    family: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layer: str = ""

    def __post_init__(self) -> None:
        family = FAMILIES.get(self.family)
        if family is None:
            raise PlanError(
                f"{self._where}: unknown family {self.family!r}; known: {', '.join(FAMILIES)}"
            )
        object.__setattr__(self, "parameters", _checked(self.parameters, family, self._where))

    @property
    def _where(self) -> str:
        return f"plan, layer {self.layer!r}" if self.layer else "plan"


class Plan(Mapping[str, LayerPlan]):
    """An immutable mapping from the name of a layer's weight to its ``LayerPlan``."""

    def __init__(self, layers: Mapping[str, LayerPlan] | None = None) -> None:
        self._layers = {
            name: LayerPlan(plan.family, plan.parameters, name)
            for name, plan in (layers or {}).items()
        }

    def __getitem__(self, name: str) -> LayerPlan:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Plan({len(self)} layers)"

    def lookup(self, name: str) -> LayerPlan | None:
        """Return the plan of the layer called ``name``, or ``None`` where it stays dense."""
        return self._layers.get(name)

    def to_json(self) -> str:
        """Return the plan as JSON text that ``from_json`` reads back."""
        layers = {
            name: {"family": plan.family, "parameters": dict(plan.parameters)}
            for name, plan in self._layers.items()
        }
        return json.dumps({"version": VERSION, "layers": layers}, indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """Read a plan from JSON text (a string that starts with ``{``) or from a file."""
        document = _parse(_read(source))
        version = document.get("version")
        if version != VERSION:
            raise PlanError(f"plan: version is {version!r}; this release reads version {VERSION}")
        layers = document.get("layers")
        extra = sorted(set(document) - {"version", "layers"})
        if not isinstance(layers, dict) or extra:
            raise PlanError(
                f"plan: has the keys {sorted(document)}; want 'version' and an object 'layers'"
            )
        return cls({str(name): _layer(str(name), entry) for name, entry in layers.items()})


def apply_layer(layer_plan: LayerPlan, w: Array) -> Fit:
    """Return the member of the planned family that is nearest to ``w`` (n_in, n_out)."""
    with _named(layer_plan):
        return FAMILIES[layer_plan.family].nearest(w, **layer_plan.parameters)


def apply_table(layer_plan: LayerPlan, w: Array) -> tuple[TensorTable, Fit]:
    """Return the planned table nearest to ``w`` (vocabulary, dimension), and how near it is."""
    with _named(layer_plan):
        return nearest_table(layer_plan.family, w, **layer_plan.parameters)


@contextmanager
def _named(layer_plan: LayerPlan) -> Iterator[None]:
    """Say which layer of the plan a ``ValueError`` is about."""
    try:
        yield
    except ValueError as error:
        raise PlanError(
            f"plan, layer {layer_plan.layer!r}: {error}; "
            f"change the parameters {dict(layer_plan.parameters)} or leave the layer out"
        ) from error


def _layer(name: str, entry: object) -> LayerPlan:
    if not isinstance(entry, dict) or set(entry) - {"family", "parameters"}:
        raise PlanError(
            f"plan, layer {name!r}: is {entry!r}; "
            'want {"family": name, "parameters": {name: value}} and no other key'
        )
    family: object = entry.get("family")
    parameters: object = entry.get("parameters", {})
    if not isinstance(family, str) or not isinstance(parameters, dict):
        raise PlanError(
            f"plan, layer {name!r}: family={family!r} and parameters={parameters!r}; "
            "want a string and an object"
        )
    return LayerPlan(family, parameters, name)


def _checked(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the parameters with lists as tuples, after checking names and kinds."""
    kinds = {**family.required, **family.optional}
    unknown = sorted(set(values) - set(kinds))
    missing = sorted(set(family.required) - set(values))
    if unknown or missing:
        raise PlanError(
            f"{where}: {family.name} got the parameters {dict(values)}; "
            f"unknown {unknown}, missing {missing}; want {dict(family.required)} "
            f"and optionally {dict(family.optional)}"
        )
    return {name: _of_kind(value, kinds[name], name, where) for name, value in values.items()}


def _of_kind(value: Any, kind: str, name: str, where: str) -> Any:
    """Return ``value`` if it is of ``kind``; ``None`` means the default."""
    if value is None:
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and _is_count(value):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "shape" and isinstance(value, list | tuple):
        sides = tuple(value)
        if len(sides) == 2 and all(map(_is_count, sides)):
            return sides
    wanted = {"int": "a whole number of at least 0", "shape": "two such numbers [rows, columns]"}
    raise PlanError(f"{where}: parameter {name}={value!r}; want {wanted.get(kind, f'a {kind}')}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read(source: str | Path) -> str:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan: cannot read {str(source)!r}: {error}; want a JSON file") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"plan: not valid JSON: {error}; was the file cut short?") from error
    if not isinstance(document, dict):
        raise PlanError(f"plan: the JSON is a {type(document).__name__}; want an object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise PlanError(f"plan: the names {repeated} occur twice; keep one entry of each")
    return dict(pairs)
