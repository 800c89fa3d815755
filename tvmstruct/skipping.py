"""What zero skipping leaves out of attention: an option of ``compile``, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from tvmstruct.errors import InputError

WANTED = 'a number such as 8, {"threshold": 8, "raw": false}, a Skip or None'
ZERO_RATIO = 0.99  # zero-ratio threshold of V-Gen skipping in the paper
LEAST, MOST = 2.0**-126, 2.0**128  # kernels compare in float32: below is 0, from here on infinity


@dataclass(frozen=True)
class Skip:
    """Which attention weights count as zero (NLP-Fast, section III-C: zero skipping).

    Keys go by in chunks. Let m be the maximum of a query's scores up to and including a chunk;
    scores are scaled and masked. In that chunk a weight is zero where its score is at most
    ``m - threshold``: it and the weights like it would be below ``exp(-threshold)`` of the
    largest. With ``raw`` the limit is ``threshold`` itself, as in the paper; it is always below m,
    so that the largest weight stays. A NaN score is never skipped.

    ``zero_ratio`` counts where attention makes its own values, under ``memory="minimal"`` (V-Gen
    skipping): the value of a key is not made where its weight is zero for more than that share of
    the queries of a head, or for all of them. Those that ``causal`` hides the key from are not
    counted. A key without a value adds nothing to the weighted sum of the rest, but stays in the
    sum of weights that it is divided by, as if its value were zero. With a ratio of 1 only values
    that no query weighs go, and nothing is lost beyond the zeros.

    Raises InputError for a threshold that is not finite, or not positive without ``raw``, and for
    a ratio outside 0 to 1.
    """

    threshold: float
    raw: bool = False
    zero_ratio: float = ZERO_RATIO

    def __post_init__(self) -> None:
        value: Any = self.threshold
        if not isinstance(self.raw, bool):
            raise InputError(f"skip: raw is {self.raw!r}; want True or False")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(f"skip: threshold is {value!r}; want a number such as 8")
        object.__setattr__(self, "threshold", float(value))
        if not abs(self.threshold) < MOST:
            raise InputError(f"skip: threshold is {value!r}; want a finite float32 such as 8")
        if not self.raw and self.threshold < LEAST:
            raise InputError(
                f"skip: threshold is {value!r}, want a positive distance from the maximum such as "
                "8; raw=True compares scores with the threshold itself"
            )
        self._check_ratio()

    def _check_ratio(self) -> None:
        ratio: Any = self.zero_ratio
        number = isinstance(ratio, Real) and not isinstance(ratio, bool)
        if not number or not 0 <= float(ratio) <= 1:
            raise InputError(
                f"skip: zero_ratio is {ratio!r}; want a share of the queries from 0 to 1 such as "
                f"{ZERO_RATIO}"
            )
        object.__setattr__(self, "zero_ratio", float(ratio))

    @classmethod
    def of(cls, value: Skip | float | Mapping[str, Any] | None) -> Skip | None:
        """Return what ``compile(skip=value)`` means; InputError names a value that means nothing.

        A number is the threshold; a mapping has ``threshold`` and may have ``raw`` and
        ``zero_ratio``.
        """
        if value is None or isinstance(value, Skip):
            return value
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in _FIELDS]
            if unknown or "threshold" not in value:
                raise InputError(f"skip={dict(value)!r}; want {WANTED}")
            return cls(**value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(f"skip={value!r}; want {WANTED}")
        return cls(float(value))

    def __str__(self) -> str:
        """Return in words which scores are skipped."""
        if self.raw:
            return f"scores of at most {self.threshold:g}, but for the maximum"
        return f"scores more than {self.threshold:g} below the maximum"

    @property
    def unmade(self) -> str:
        """Return in words which values are not made."""
        if self.zero_ratio == 1:
            return "values that no query weighs are not made"
        return f"values that over {self.zero_ratio:.4g} of the queries skip are not made"


_FIELDS = tuple(field.name for field in fields(Skip))
