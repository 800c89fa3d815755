"""Every contender behind one interface, each in a process of its own.

Thread pools disturb each other: OpenMP, ONNX Runtime and TBB threads spin for a while after
their work. So every contender lives in a worker process, and the parent alternates between
them; while one is timed the others are blocked on a pipe. A contender gets a *case* (what to
compute) and answers with the seconds of single calls.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Call = Callable[[], Any]
F32_PEERS = ("torch", "onnxruntime", "openvino-f32")
PEERS = (*F32_PEERS, "openvino-default")


@dataclass(frozen=True)
class Case:
    """What to compute: ``kind`` names a builder, ``options`` are its arguments."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
            os.environ[variable] = str(threads)
        os.environ["TVM_BIND_THREADS"] = "0"
        self.process = context.Process(target=_serve, args=(theirs, name, threads), daemon=True)
        self.process.start()

    def ask(self, *message: Any) -> Any:
        """Send a request and wait for its answer."""
        self.pipe.send(message)
        status, answer = self.pipe.recv()
        if status == "error":
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.send(("stop",))
        self.process.join(10)


def _serve(pipe: Connection, name: str, threads: int) -> None:
    calls: dict[str, Call] = {}
    while True:
        request, *rest = pipe.recv()
        if request == "stop":
            return
        try:
            if request == "prepare":
                key, case = rest
                calls[key] = _prepare(name, case, threads)
                out = calls[key]()
                pipe.send(("ok", np.shape(out[0] if isinstance(out, tuple) else out)))
            else:
                key, seconds = rest
                pipe.send(("ok", _time(calls[key], seconds)))
        except Exception as error:  # the parent prints it beside the line it belongs to
            pipe.send(("error", f"{type(error).__name__}: {error}"))


def _time(call: Call, seconds: float) -> list[float]:
    """Return the seconds of single calls for about ``seconds``, after a warm-up."""
    for _ in range(3):
        call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _prepare(name: str, case: Case, threads: int) -> Call:
    import contenders

    return contenders.build(name, case, threads)


def environment() -> dict[str, str]:
    """Return the versions that a result belongs to."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("apache-tvm", "torch", "onnxruntime", "openvino", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
