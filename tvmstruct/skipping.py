"""What zero skipping leaves out of attention: an option of ``compile``, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tvmstruct.errors import InputError

WANTED = 'a number such as 8, {"threshold": 8, "raw": false}, a Skip or None'
LEAST, MOST = 2.0**-126, 2.0**128  # kernels compare in float32: below is 0, from here on infinity


@dataclass(frozen=True)
class Skip:
    """Which attention weights count as zero (NLP-Fast, section III-C: zero skipping).

    Keys go by in chunks. Let m be the maximum of a query's scores up to and including a chunk;
    scores are scaled and masked. In that chunk a weight is zero where its score is at most
    ``m - threshold``: it and the weights like it would be below ``exp(-threshold)`` of the
    largest. With ``raw`` the limit is ``threshold`` itself, as in the paper; it is always below m,
    so that the largest weight stays. A NaN score is never skipped.

    Raises InputError for a threshold that is not finite, or not positive without ``raw``.
    """

    threshold: float
    raw: bool = False

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

    @classmethod
    def of(cls, value: Skip | float | Mapping[str, Any] | None) -> Skip | None:
        """Return what ``compile(skip=value)`` means; InputError names a value that means nothing.

        A number is the threshold; a mapping has ``threshold`` and may have ``raw``.
        """
        if value is None or isinstance(value, Skip):
            return value
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in ("threshold", "raw")]
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
