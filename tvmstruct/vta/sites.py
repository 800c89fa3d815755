"""Sites: places in a model's CPU code that call VTA, known to the virtual machine by a symbol.

A symbol is a hash of what the site does, so sites of one symbol are one and may be shared; the
function under it lives as long as a model that uses it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import tvm_ffi

from tvmstruct.ops import Array

PREFIX = "tvmstruct.vta."


class Site(Protocol):
    """Something that computes float32 rows from float32 rows."""

    symbol: str

    def compute(self, x: Array) -> Array:
        """Return the rows."""
        ...


class _Thread(threading.local):
    error: Exception | None = None


_THREAD = _Thread()
_LIVE: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def enter(site: Site) -> Site:
    """Make a site callable from compiled code; returns the one of its symbol that there is."""
    with _LOCK:
        if (known := _LIVE.get(site.symbol)) is not None:
            return known
        _LIVE[site.symbol] = site
        tvm_ffi.register_global_func(site.symbol, _function(site.symbol), override=True)
        weakref.finalize(site, _leave, site.symbol).atexit = False
        return site


@contextmanager
def errors_of_sites() -> Iterator[None]:
    """Raise what a site raised: on its way through compiled code it became a RuntimeError."""
    _THREAD.error = None
    try:
        yield
    except RuntimeError:
        if _THREAD.error is not None:
            raise _THREAD.error from None
        raise


def _function(symbol: str):
    """Return the function that compiled code calls: input and output tensor, nothing back."""

    def run(x: Any, out: Any) -> None:
        site = _LIVE.get(symbol)
        assert site is not None, symbol
        try:
            np.from_dlpack(out)[...] = site.compute(np.from_dlpack(x))
        except Exception as error:
            _THREAD.error = error
            raise

    return run


def _leave(symbol: str) -> None:
    with _LOCK:
        if symbol not in _LIVE:
            tvm_ffi.remove_global_func(symbol)
