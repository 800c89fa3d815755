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
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Call = Callable[[], Any]
F32_PEERS = ("torch", "onnxruntime", "openvino-f32")
BF16_PEERS = ("openvino-default", "torch-bf16")  # OpenVINO's default is bf16 where the CPU has it
OURS, OURS_BF16, OURS_DENSE = "tvmstruct", "tvmstruct-bf16", "tvmstruct-dense"
OURS_INT8 = "tvmstruct-int8"
OURS_BASELINE, OURS_MINIMAL = "tvmstruct-baseline", "tvmstruct-minimal"
OURS_SKIP = "tvmstruct-skip"
WARM_UP = 0.1  # seconds after which three calls are not waited for
LEAST_CALLS = 3  # timed in a round


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
            os.environ[variable] = str(self.threads)
        os.environ["TVM_BIND_THREADS"] = "0"
        arguments = (theirs, self.name, self.threads)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies is an end of file here

    def prepare(self, case: Any, files: Sequence[str]) -> str:
        """Build the case and run it once; return as what ours compiled it."""
        return self._ask("prepare", case, files)

    def time(self, seconds: float) -> list[float]:
        """Return the seconds of single calls of the prepared case, for about ``seconds``."""
        return self._ask("time", seconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(("stop",))
        self.process.join(10)

    def _ask(self, *message: Any) -> Any:
        try:
            self.pipe.send(message)
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self._start()  # the next case may do better
            raise RuntimeError(f"its process died with exit code {code}") from None
        if status == "error":
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, name: str, threads: int) -> None:
    call: Call | None = None
    while True:
        request, *rest = pipe.recv()
        if request == "stop":
            return
        try:
            if request == "prepare":
                call = None  # frees the weights of the case before
                call, note = _prepare(name, threads, *rest)
                pipe.send(("ok", note))
            else:
                assert call is not None
                pipe.send(("ok", _time(call, *rest)))
        except Exception as error:  # the parent prints it beside the line it belongs to
            pipe.send(("error", f"{type(error).__name__}: {error}"))


def _prepare(name: str, threads: int, case: Any, files: Sequence[str]) -> tuple[Call, str]:
    import contenders

    call, note = contenders.build(name, case, files, threads)
    out = call()
    if isinstance(out, np.ndarray) and not np.isfinite(out).all():
        raise FloatingPointError("the result is not finite")
    return call, note


def _time(call: Call, seconds: float) -> list[float]:
    warm = time.perf_counter() + WARM_UP
    for _ in range(3):
        call()
        if time.perf_counter() > warm:
            break
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < LEAST_CALLS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


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
