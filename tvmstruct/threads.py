"""How many threads TVM may use, decided before its pool starts.

TVM reads ``TVM_NUM_THREADS`` when a thread of this process first runs a parallel kernel, and
can lower the number later but never raise it; unset, it may settle on one. Importing
tvmstruct therefore sets the variable, unless the user did, to the physical cores that this
process may run on. ``TVM_BIND_THREADS`` becomes 0 unless the user set it: pinned workers
collide with those of torch, ONNX Runtime or a second process, which costs more than pinning
gains.
"""

import ctypes
import math
import os
import sys
import warnings
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
NUM_THREADS_SYMBOL = "_ZN3tvm7runtime9threading10NumThreadsEv"


def available_threads() -> int:
    """Return the number of physical cores in the affinity mask, at most the cgroup's quota."""
    cores = physical_cores(allowed_cpus())
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def wanted_threads() -> int:
    """Return ``TVM_NUM_THREADS`` where it is a positive number, else ``available_threads()``."""
    value = os.environ.get("TVM_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) > 0 else available_threads()


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int], topology: Path = TOPOLOGY) -> int:
    """Count ``cpus`` with hyperthreads of one core counted once."""
    siblings = {_read(topology / f"cpu{c}/topology/thread_siblings_list") or str(c) for c in cpus}
    return max(1, len(siblings))


def cpu_quota(root: Path = CGROUPS) -> float | None:
    """Return the CPUs that the control group (version 2 or 1) grants, or None for no limit."""
    quota, _, period = _read(root / "cpu.max").partition(" ")
    if not quota:
        quota = _read(root / "cpu/cpu.cfs_quota_us")
        period = _read(root / "cpu/cpu.cfs_period_us")
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None
    return int(quota) / int(period)


def configure() -> None:
    """Set TVM's thread variables where the user did not; warn where TVM has already started."""
    chosen_by_user = "TVM_NUM_THREADS" in os.environ
    os.environ.setdefault("TVM_NUM_THREADS", str(available_threads()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if not chosen_by_user and "tvm" in sys.modules:
        warn_if_started()


def warn_if_started() -> None:
    """Warn where TVM's pool was started by earlier use, with fewer threads than wanted."""
    started, wanted = pool_threads(), wanted_threads()
    if started is not None and started < wanted:
        warnings.warn(
            f"TVM already runs with {started} thread(s) because it was used before tvmstruct "
            f"was imported; {wanted} are available. Import tvmstruct first, or set "
            f"TVM_NUM_THREADS={wanted} before starting Python.",
            RuntimeWarning,
            stacklevel=3,
        )


def pool_threads() -> int | None:
    """Return the size of the calling thread's TVM pool, starting it; None where not known."""
    runtime = _runtime_library()
    if runtime is None or not hasattr(runtime, NUM_THREADS_SYMBOL):
        return None
    return int(getattr(runtime, NUM_THREADS_SYMBOL)())


def _runtime_library() -> ctypes.CDLL | None:
    """Return TVM's runtime library, which must already be loaded."""
    folder = Path(getattr(sys.modules.get("tvm"), "__file__", None) or "tvm").parent
    path = folder / "lib" / "libtvm_runtime.so"
    return ctypes.CDLL(str(path)) if path.exists() else None


def _read(path: Path) -> str:
    """Return the text of a small system file, empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


configure()
