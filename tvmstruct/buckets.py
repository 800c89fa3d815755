"""Which shape is compiled for a request: exact, or padded where that changes nothing.

Padding is a promise that the result does not change. It breaks for models without a mask
input, for means over length, for positions counted by cumsum, for rows whose mask is all zero.
So a dimension is padded only after a probe: the model is compiled for a small size and for a
larger one, and must give the same numbers on random inputs padded from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tvmstruct.errors import InputError
from tvmstruct.frontends import Source, TensorSpec

SMALLEST = 8  # lengths are padded at least to this
STEPS = 4  # grid points per factor of two: at most a quarter of the work is padding
FIRST = 16  # the length compiled by ``compile`` itself
KEEP = 32  # compiled buckets kept, least recently used first out


@dataclass(frozen=True)
class Policy:
    """How requests map to compiled shapes; ``sizes`` are fixed buckets, largest last."""

    kind: str  # "auto", "exact" or "fixed"
    sizes: tuple[Mapping[str, int], ...] = ()
    limits: Mapping[str, int] | None = None

    @classmethod
    def of(cls, buckets: str | Sequence[Mapping[str, int]], source: Source) -> Policy:
        """Check the ``buckets`` argument of ``compile``."""
        limits = dict(source.limits) if source.dims else {}
        if buckets in ("auto", "exact"):
            return cls(str(buckets), (), limits)
        if isinstance(buckets, str):
            raise InputError(
                f'buckets={buckets!r} is unknown; want "auto", "exact" or a list of '
                f"{{symbol: size}} with the symbols {', '.join(source.dims) or '(none)'}"
            )
        sizes = tuple(dict(b) for b in buckets)
        for size in sizes:
            if set(size) != set(source.dims) or not all(
                isinstance(n, int) and n > 0 for n in size.values()
            ):
                raise InputError(
                    f"buckets: {size} must give a positive size for each of "
                    f"{', '.join(source.dims) or '(none)'}"
                )
        return cls("fixed", sizes, limits)

    def first(self, source: Source) -> Iterator[dict[str, tuple[int, ...]]]:
        """Yield the shapes that ``compile`` itself compiles."""
        if self.kind == "fixed":
            for size in self.sizes:
                yield shapes_at(source.inputs, size)
            return
        sizes = {}
        for symbol, places in source.dims.items():
            leading = all(axis == 0 for _, axis in places)
            limit = (self.limits or {}).get(symbol, FIRST)
            sizes[symbol] = 1 if leading else min(FIRST, limit)
        yield shapes_at(source.inputs, sizes)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise where a size is over what the model itself can take."""
        for symbol, size in sizes.items():
            limit = (self.limits or {}).get(symbol)
            if limit is not None and size > limit:
                raise InputError(
                    f"{symbol} is {size}, but the model takes at most {limit}; "
                    "truncate the input or split it"
                )

    def padded(self, sizes: Mapping[str, int], paddable: frozenset[str]) -> dict[str, int]:
        """Return the sizes of the bucket that serves a request."""
        if self.kind == "exact":
            return dict(sizes)
        if self.kind == "auto":
            return {
                symbol: self._round(symbol, size) if symbol in paddable else size
                for symbol, size in sizes.items()
            }
        for bucket in sorted(self.sizes, key=lambda b: tuple(b.values())):
            fits = all(
                bucket[s] == n or (bucket[s] > n and s in paddable) for s, n in sizes.items()
            )
            if fits:
                return dict(bucket)
        raise InputError(
            f"no bucket fits {dict(sizes)}; the buckets are {list(self.sizes)}"
            + ("" if paddable else " and padding changes this model's result")
        )

    def _round(self, symbol: str, size: int) -> int:
        limit = (self.limits or {}).get(symbol)
        rounded = round_up(size)
        return rounded if limit is None else max(size, min(rounded, limit))


def round_up(size: int) -> int:
    """Return the next size of the grid with four steps per factor of two."""
    if size <= STEPS:
        return size
    step = (1 << ((size - 1).bit_length() - 1)) // STEPS
    return -(-size // step) * step


def shapes_at(inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input with its symbols replaced by sizes."""
    return {s.name: tuple(sizes[d] if isinstance(d, str) else d for d in s.shape) for s in inputs}
