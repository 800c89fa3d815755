"""What runs inside the processes that build the candidates of ``tune``; imports little."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 60.0  # seconds to build one candidate
USES = 64  # candidates a process builds before a fresh one takes over: LLVM gives no memory back


def build(job: tuple[object, object]) -> str:
    """Compile and link one (module, target); who measures the library needs no compiler."""
    from tvmstruct.building import build_library

    path = Path(tempfile.mkdtemp(prefix="tvmstruct-tune-")) / "candidate.so"
    mod, target = job
    build_library(mod, target).export_library(str(path))
    return str(path)


class Builder:
    """A pool of processes that build.

    MetaSchedule's own builder starts its processes anew for every batch, and each of them parses
    TVM's tensor intrinsics, which takes longer than it allows for a build.
    """

    def __init__(self, processes: int) -> None:
        from tvm.support.popen_pool import PopenPoolExecutor

        self.pool = PopenPoolExecutor(processes, TIMEOUT, maximum_process_uses=USES)

    def build(self, jobs: Sequence[tuple[object, object]]) -> list[tuple[str | None, str]]:
        """Return the library's path, or None and the error, for each job."""
        from tvm.support.popen_pool import StatusKind

        results: list[tuple[str | None, str]] = []
        for found in self.pool.map_with_error_catching(build, jobs):
            if found.status == StatusKind.COMPLETE:
                results.append((found.value, ""))
            elif found.status == StatusKind.TIMEOUT:
                results.append((None, f"building took over {TIMEOUT:.0f} s"))
            else:
                results.append((None, str(found.value)))
        return results
