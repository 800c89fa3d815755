"""Tuning records: a folder of JSON-lines files, one for each kernel, shape, dtype and ISA.

Each line is complete in itself: what was computed, which choices its schedule took, how long
that ran, where, with which versions, and a checksum. Lines are only ever appended, each in one
write under a lock and flushed to disk, so a process killed at any moment loses none. Whatever is
in the way (a torn line, one from another version) is named once and left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tvmstruct.errors import TuningError
from tvmstruct.schedules.registry import Kernel, tuned_kernel
from tvmstruct.targets import CPUINFO, TargetSpec

SHIPPED = Path(__file__).parent / "tuned"
MARGIN = 1.02  # less gain is noise, and the default kernel is shared by every number of rows
MAX_FILE = 1 << 28  # bytes; a larger file is not ours

Choices = Mapping[str, int]


@dataclass(frozen=True)
class Workload:
    """What a record is about. Kernels of other thread counts are other workloads.

    ``dtype`` is that of all arguments, or where they differ one name for each, with commas.
    """

    kernel: str
    parameters: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    isa: str
    threads: int

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[str],
        spec: TargetSpec,
    ) -> Workload:
        """Return the workload of a kernel with choices at the types of its arguments."""
        assert kernel.space is not None
        dims = tuple(tuple(map(int, shape)) for shape in shapes)
        assert len(dtypes) == len(dims)
        dtype = ",".join(dtypes if len(set(dtypes)) > 1 else dtypes[:1])
        return cls(kernel.name, kernel.space.parameters, dims, dtype, spec.isa.name, spec.threads)

    @property
    def rows(self) -> int:
        """Rows of the input: what a tuned kernel is fixed to."""
        return self.shapes[0][0]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtype of each argument."""
        names = self.dtype.split(",")
        return tuple(names if len(names) > 1 else names * len(self.shapes))

    @property
    def file(self) -> str:
        """The name of its file: readable, and unique by a digest."""
        words = f"{self.kernel}-{self.rows}-{self.parameters}-{self.dtype}-{self.isa}"
        readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in words)[:100]
        digest = hashlib.sha256(_json(asdict(self))).hexdigest()[:8]
        return f"{readable}-{self.threads}t-{digest}.jsonl"

    def __str__(self) -> str:
        return f"{self.kernel} {self.rows} x {self.parameters}"


@dataclass(frozen=True)
class Record:
    """One measurement; ``choices`` is None for the kernel as it is without tuning.

    ``gain`` is how many times faster than that it ran when both were measured in turns; only
    the fastest choices of a search are.
    """

    workload: Workload
    choices: Choices | None
    seconds: float | None
    machine: str
    error: str | None = None
    gain: float | None = None

    @cached_property
    def key(self) -> tuple[tuple[str, int], ...] | None:
        """The choices as something hashable."""
        return None if self.choices is None else tuple(sorted(self.choices.items()))


class Database:
    """The records of one folder, which ``append`` creates and ``compile`` only reads."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._named: set[str] = set()

    def create(self) -> Database:
        """Make the folder and check that it can be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise _unwritable(self.folder, PermissionError(13, "permission denied"))
        return self

    def append(self, record: Record) -> None:
        """Write one record durably, or raise with everything before it intact."""
        path, line = self.folder / record.workload.file, _line(record)
        try:
            handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a torn line before ours stays a line of its own
                _write(handle, line, size)
            finally:
                os.close(handle)
            if size == 0:
                _sync(self.folder)
        except OSError as error:
            raise _unwritable(path, error) from error

    def records(self, workload: Workload) -> list[Record]:
        """Return the valid records of a workload, oldest first; warn once about other lines."""
        path = self.folder / workload.file
        try:
            if path.stat().st_size > MAX_FILE:
                self._name(path, [f"it is over {MAX_FILE >> 20} MB"])
                return []
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TuningError(f"{path} cannot be read: {error.strerror}") from error
        found, problems = [], []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                found.append(_parse(line, workload))
            except ValueError as error:
                problems.append(f"line {number} {error}")
        if problems:
            self._name(path, problems)
        return found

    def best(self, workload: Workload, machine: str) -> Record | None:
        """Return the record to use, None for the default kernel.

        Records of this machine come before those of others; among others, what gained most
        over the default kernel of its own machine wins.
        """
        machines: dict[str, list[Record]] = {}
        for record in self.records(workload):
            if record.seconds is not None:
                machines.setdefault(record.machine, []).append(record)
        if machine in machines:
            machines = {machine: machines[machine]}
        winners = map(_winner, machines.values())
        gain, record = max(winners, key=lambda pair: pair[0], default=(0.0, None))
        return record if gain >= MARGIN else None

    def _name(self, path: Path, problems: list[str]) -> None:
        if path.name not in self._named:
            self._named.add(path.name)
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            warnings.warn(
                f"{path}: skipped {'; '.join(problems[:3])}{more}. The other records are used; "
                "nothing was deleted",
                TuningWarning,
                stacklevel=4,
            )


class TuningWarning(UserWarning):
    """A record cannot be used."""


class Selector:
    """Replaces a kernel by its tuned form where a record for exactly these shapes exists."""

    def __init__(self, databases: Iterable[Database], spec: TargetSpec) -> None:
        self.databases, self.spec, self._machine = list(databases), spec, machine()

    def __call__(
        self, kernel: Kernel, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]
    ) -> Kernel:
        """Return the kernel to call with arguments of these shapes and dtypes, output last."""
        if kernel.space is None:
            return kernel
        workload = Workload.of(kernel, shapes, dtypes, self.spec)
        for database in self.databases:
            record = database.best(workload, self._machine)
            if record is not None and record.key is not None:
                try:
                    pick = recorded(record.choices or {}, workload)
                    return tuned_kernel(kernel, workload.rows, pick, record.key)
                except TuningError as error:
                    warnings.warn(f"{error}; the default is used", TuningWarning, stacklevel=2)
        return kernel


def selector(folder: str | Path | None, spec: TargetSpec) -> Selector:
    """Return the selector of ``compile``: a folder of the user's first, then what is shipped."""
    databases = [Database(SHIPPED)]
    if folder is not None:
        if not Path(folder).is_dir():
            raise TuningError(
                f"database {folder}: there is no such folder; tvmstruct.tune writes one"
            )
        databases.insert(0, Database(folder))
    return Selector(databases, spec)


def recorded(choices: Choices, workload: Workload):
    """Return the pick that answers what a record says; TuningError where that is no option."""

    def pick(name: str, options: Sequence[int], default: int) -> int:
        value = choices.get(name, default)
        if value not in options:
            raise TuningError(
                f"record of {workload}: {name}={value} is no option of this version's schedule"
            )
        return value

    return pick


def machine() -> str:
    """Return what identifies this kind of machine: the CPU's model name."""
    try:
        lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    except OSError:
        return "unknown"
    return next((v.strip() for name, _, v in lines if name.strip() == "model name"), "unknown")


def versions() -> dict[str, str]:
    """Return the versions that records must match: TVM's exactly, ours up to the patch level."""
    ours = ".".join(version("tvmstruct").split(".")[:2])
    return {"tvmstruct": ours, "apache-tvm": version("apache-tvm")}


def _winner(records: Sequence[Record]) -> tuple[float, Record]:
    """Return what gained most over the default on one machine, and how much.

    Gains measured in turns count; a search that was killed before it had any is judged by the
    fastest times, which other processes may have disturbed.
    """
    compared = {r.key: r for r in records if r.gain is not None and r.key is not None}
    if compared:
        record = max(compared.values(), key=lambda r: r.gain or 0.0)
        return record.gain or 0.0, record
    record = min(records, key=_seconds)
    default = min(filter(lambda r: r.key is None, records), key=_seconds, default=None)
    return MARGIN if default is None else _seconds(default) / _seconds(record), record


def _seconds(record: Record) -> float:
    return math.inf if record.seconds is None else record.seconds


def _line(record: Record) -> bytes:
    body = {
        "workload": asdict(record.workload),
        "choices": None if record.choices is None else dict(record.choices),
        "seconds": record.seconds,
        "machine": record.machine,
        "error": record.error,
        "gain": record.gain,
        "versions": versions(),
    }
    return _json({"checksum": _checksum(body), "record": body}) + b"\n"


def _parse(line: bytes, workload: Workload) -> Record:
    """Return the record of a line; ValueError says what is wrong with it."""
    try:
        outer = json.loads(line)
        body, checksum = outer["record"], outer["checksum"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ValueError("is damaged (no record)") from None
    if not isinstance(body, dict) or checksum != _checksum(body):
        raise ValueError("is damaged (its checksum differs)")
    if body.get("versions") != versions():
        raise ValueError(f"is of other versions ({body.get('versions')})")
    if _json(body.get("workload")) != _json(asdict(workload)):
        raise ValueError("is about another workload")
    choices, seconds, error = body.get("choices"), body.get("seconds"), body.get("error")
    if choices is not None and not (
        isinstance(choices, dict) and all(type(v) is int for v in choices.values())
    ):
        raise ValueError("has no choices")
    gain = body.get("gain")
    for name, value in (("seconds", seconds), ("gain", gain)):
        number = isinstance(value, int | float) and math.isfinite(value) and value > 0
        if value is not None and not number:
            raise ValueError(f"has {name}={value}")
    return Record(workload, choices, seconds, str(body.get("machine")), error and str(error), gain)


def _checksum(body: Any) -> str:
    return hashlib.sha256(_json(body)).hexdigest()[:16]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _write(handle: int, line: bytes, size: int) -> None:
    """Append in one write; a partial one is undone, so that a full disk leaves no torn line."""
    try:
        if os.write(handle, line) != len(line):
            raise OSError(28, "no space left on the device")
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise


def _sync(folder: Path) -> None:
    """Make a new file's name durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> TuningError:
    return TuningError(
        f"{path} cannot be written: {error.strerror}; earlier records are intact. Make room, or "
        "name another folder with database="
    )
