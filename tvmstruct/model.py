"""`CompiledModel`: what users call. Checks, picks or compiles a bucket, pads, runs, unpads."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import from_dlpack

from tvmstruct.arrays import ALIGNMENT, aligned_empty, as_array, to_numpy
from tvmstruct.buckets import KEEP, Policy, shapes_at
from tvmstruct.errors import InputError
from tvmstruct.frontends.source import TensorSpec
from tvmstruct.padding import Padder
from tvmstruct.report import LayerRecord, Report
from tvmstruct.targets import TargetSpec, check_runs_here, host_features

if TYPE_CHECKING:
    from tvmstruct.artifact import Artifact
    from tvmstruct.caches import Caches
    from tvmstruct.compiler import Compiler
    from tvmstruct.energy_report import EnergyReport
    from tvmstruct.footprint import Footprint
    from tvmstruct.pipeline import Lowered
    from tvmstruct.skip_analysis import SkipStatistics

CUT = (
    "attention",
    "feed-forward",
    " vta",
)  # ends of forms that depend on the shape: the last one is reported
Shapes = Mapping[str, Sequence[int]]
Key = tuple[tuple[int, ...], ...]


class Runner:
    """One virtual machine with aligned memory of its own for inputs that lie badly."""

    def __init__(self, executable: Any, shapes: Key, dtypes: Sequence[str]) -> None:
        self.machine = relax.VirtualMachine(executable, tvm.cpu())
        self.main = self.machine["main"]
        self.staging = [aligned_empty(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        self.staged = [from_dlpack(array) for array in self.staging]

    def tensor(self, i: int, array: np.ndarray) -> tuple[Any, bool]:
        """Return input i as a tensor, and whether it is the array's own memory."""
        if (tensor := own_memory(array)) is not None:
            return tensor, True
        np.copyto(self.staging[i], array)
        return self.staged[i], False


def own_memory(array: np.ndarray) -> Any:
    """Return a tensor on an array's own memory, None where kernels cannot take it."""
    flags = array.flags
    if flags.c_contiguous and flags.writeable:  # numpy exports no read-only memory
        tensor = from_dlpack(array)
        if tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
    return None


class Bucket:
    """Compiled code for one set of input shapes; any number of threads may run it."""

    def __init__(
        self,
        executable: Any,
        weights: Sequence[Any],
        shapes: Key,
        dtypes: Sequence[str],
        *,
        lowered: Lowered | None = None,
        libraries: Sequence[Any] = (),
    ) -> None:
        self.executable, self.weights, self.lowered = executable, tuple(weights), lowered
        self.shapes, self.dtypes, self.libraries = shapes, dtypes, tuple(libraries)
        self._idle: deque[Runner] = deque()  # a virtual machine serves one call at a time
        self._copied: frozenset[int] | None = None
        # The arrays of the last call, where none needed a copy, and the tensors on their memory.
        self.last: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says of the bucket that was compiled last."""
        if self.lowered is None:
            return ()
        return (f"intermediate results of the last: {self.lowered.footprint}",)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run on arrays of exactly the compiled shapes and dtypes."""
        runner = self._runner()
        try:
            seen, tensors = self.last
            if len(seen) != len(arrays) or not all(map(is_, seen, arrays)):
                pairs = [runner.tensor(i, a) for i, a in enumerate(arrays)]
                tensors = tuple([t for t, _ in pairs])
                if all([own for _, own in pairs]):
                    self.last = (tuple(arrays), tensors)
            out = _listed(runner.main(*tensors, *self.weights))
            if self._copied is None:
                again = _listed(runner.main(*tensors, *self.weights))
                self._copied = _not_fresh(out, again)
        finally:
            self._idle.append(runner)
        if not self._copied:
            return list(map(to_numpy, out))
        return [to_numpy(o).copy() if i in self._copied else to_numpy(o) for i, o in enumerate(out)]

    def tensors(self, arrays: Sequence[np.ndarray]) -> tuple[Any, ...] | None:
        """Return tensors on the memory of arrays, None where one of them would need a copy."""
        found = tuple([own_memory(array) for array in arrays])
        return found if all([tensor is not None for tensor in found]) else None

    def run_single(self, tensors: tuple[Any, ...]) -> np.ndarray:
        """Run on the tensors of the last call, for a model of one output that has run before."""
        runner = self._runner()
        try:
            out = to_numpy(runner.main(*tensors, *self.weights))
        finally:
            self._idle.append(runner)
        return out.copy() if self._copied else out

    def _runner(self) -> Runner:
        try:
            return self._idle.pop()
        except IndexError:
            return Runner(self.executable, self.shapes, self.dtypes)


def _listed(out: Any) -> list[Any]:
    return [out] if isinstance(out, tvm.runtime.Tensor) else list(out)


def _not_fresh(first: list[Any], second: list[Any]) -> frozenset[int]:
    """Return the outputs of two calls that share memory: with an input, a weight, each other."""
    places = [o.data_ptr() for o in first]
    again = {o.data_ptr() for o in second}
    return frozenset(
        i
        for i, o in enumerate(first)
        if o.numel() == 0 or places[i] in again or places[i] in places[:i]
    )


class CompiledModel:
    """A compiled model: call it with arrays, or ``run`` it with names."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        spec: TargetSpec,
        policy: Policy,
        *,
        compiler: Compiler | None,
        threads: int | None = None,
        token_inputs: Mapping[str, int] | None = None,
        length_inputs: Mapping[str, int | str] | None = None,
        default_ones: Sequence[str] = (),
        default_zeros: Sequence[str] = (),
        records: Sequence[LayerRecord] = (),
        saved: Artifact | None = None,
    ) -> None:
        self.inputs, self.outputs, self.spec, self.policy = inputs, outputs, spec, policy
        self.compiler, self.saved = compiler, saved
        self.threads = _checked_threads(threads)
        self.token_inputs = dict(token_inputs or {})
        self.length_inputs = dict(length_inputs or {})
        self.default_ones, self.default_zeros = tuple(default_ones), tuple(default_zeros)
        self._foreign = not spec.features <= host_features()
        self._dtypes = [np.dtype(s.dtype) for s in inputs]
        self._ranks = [len(s.shape) for s in inputs]
        self.padder = Padder(self)
        self.notes: tuple[str, ...] = ()  # what else the report says
        self.buckets: OrderedDict[Key, Bucket] = OrderedDict()
        self._records = {r.name: r for r in records}
        self._seconds: dict[str, float] = {}
        self._skipped: dict[str, SkipStatistics] = {}
        self._again: tuple[tuple[Any, ...], Key, tuple[Any, ...], Bucket] | None = None
        self._lock = threading.RLock()
        self._own_thread: ThreadPoolExecutor | None = None
        if self.threads is not None:
            self._own_thread = ThreadPoolExecutor(
                1, "tvmstruct", initializer=_limit_threads, initargs=(self.threads,)
            )
        self._checks = [
            (i, s.name, self.token_inputs[s.name])
            for i, s in enumerate(inputs)
            if s.name in self.token_inputs
        ]
        self._lengths = [
            (i, s.name, _place(inputs, self.length_inputs[s.name]))
            for i, s in enumerate(inputs)
            if s.name in self.length_inputs
        ]

    def __call__(self, *arrays: Any, **named: Any) -> Any:
        """Return the output, or a tuple of outputs in the source model's order."""
        if (again := self._again) is not None and not named:
            seen, shapes, tensors, bucket = again
            same = len(arrays) == len(seen) and all(map(is_, arrays, seen))
            if (same or self._are_plain(arrays)) and tuple([a.shape for a in arrays]) == shapes:
                if same:
                    return bucket.run_single(tensors)
                if (tensors := bucket.tensors(arrays)) is not None:
                    self._again = (arrays, shapes, tensors, bucket)
                    return bucket.run_single(tensors)
        outputs = self._run(self._bind(arrays, named))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return every output by name for inputs by name."""
        outputs = self._run(self._bind((), feeds))
        return {spec.name: out for spec, out in zip(self.outputs, outputs, strict=True)}

    def _run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Run here, or where ``threads`` limits them on a thread of the model's own.

        TVM keeps one pool per Python thread, and a pool can shrink but never grow again.
        """
        if self._own_thread is None:
            return self._serve(arrays)
        return self._own_thread.submit(self._serve, arrays).result()

    def _serve(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if self._foreign:
            check_runs_here(self.spec)
        key = tuple([a.shape for a in arrays])
        self._check_values(arrays)
        bucket = self.buckets.get(key)
        if bucket is None:
            return self._run_new(key, arrays)
        try:
            self.buckets.move_to_end(key)  # used last, so dropped last
        except KeyError:  # another thread's new bucket has just pushed it out
            pass
        outputs = bucket.run(arrays)
        if len(outputs) == 1 and not (self._checks or self._lengths) and self.threads is None:
            seen, tensors = bucket.last  # the same arrays again need no checks at all
            self._again = (seen, key, tensors, bucket) if seen else None
        return outputs

    def _check_values(self, arrays: Sequence[np.ndarray]) -> None:
        for i, name, rows in self._checks:
            _check_ids(name, arrays[i], rows)
        for i, name, steps in self._lengths:
            most = steps if isinstance(steps, int) else arrays[steps[0]].shape[steps[1]]
            _check_lengths(name, arrays[i], most)

    def _run_new(self, key: Key, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Serve a shape that is not compiled exactly: pad to a bucket, or compile."""
        self._again = None  # it stands for the bucket used last
        sizes = self._sizes(dict(zip([s.name for s in self.inputs], key, strict=True)))
        bucket_sizes = self.padder.bucket(sizes, arrays)
        if bucket_sizes == sizes:
            return self._bucket(sizes).run(arrays)
        padded = self.padder.pad(arrays, bucket_sizes)
        return self.padder.unpad(self._bucket(bucket_sizes).run(padded), sizes)

    def longest(self, shapes: Shapes) -> dict[str, int]:
        """Return the most steps that each input of lengths may name at these input shapes."""
        most = [(n, place) for _, n, place in self._lengths]
        names = [spec.name for spec in self.inputs]
        return {
            n: place if isinstance(place, int) else shapes[names[place[0]]][place[1]]
            for n, place in most
        }

    def compile_bucket(self, shapes: Shapes, *, background: bool = False) -> None:
        """Compile for these input shapes now, or in the background."""
        sizes = self._sizes(self._checked_shapes(shapes))
        if background:
            threading.Thread(target=self._bucket, args=(sizes,), daemon=True).start()
        else:
            self._bucket(sizes)

    def _checked_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of inputs as tuples, after checking names, ranks and types."""
        ranks = {s.name: len(s.shape) for s in self.inputs}
        for name, shape in shapes.items():
            if name not in ranks:
                raise InputError(f"unknown input {name!r}; {self._wanted()}")
            whole = all(isinstance(n, (int, np.integer)) for n in shape)
            if len(shape) != ranks[name] or not whole:
                raise InputError(
                    f"input {name!r}: shape {tuple(shape)} must be {ranks[name]} whole numbers "
                    f"(its rank is {ranks[name]}); {self._wanted()}"
                )
        return {name: tuple(map(int, shape)) for name, shape in shapes.items()}

    def _bucket(self, sizes: Mapping[str, int]) -> Bucket:
        """Return the bucket for exactly these sizes, compiled if it must be."""
        shapes = shapes_at(self.inputs, sizes)
        key = tuple(shapes.values())
        with self._lock:
            if key in self.buckets:
                self.buckets.move_to_end(key)
                return self.buckets[key]
            if self.compiler is None:
                have = ", ".join(map(str, self.buckets))
                raise InputError(
                    f"this saved model has no code for the input shapes {key} and no source to "
                    f"compile them from; it was saved with: {have}. Compile that shape with "
                    "compile_bucket() before save()"
                )
            bucket = self.compiler.bucket(shapes)
            assert bucket.lowered is not None
            for record in bucket.lowered.layers:
                if record.form.endswith(CUT) or record.name not in self._records:
                    self._records[record.name] = record
            self.buckets[key] = bucket
            while len(self.buckets) > KEEP and self.policy.kind != "fixed":
                self.buckets.popitem(last=False)
            return bucket

    def report(self, *, measure: bool = False) -> Report:
        """Return what became of every layer, and why.

        With ``measure`` each layer's kernel is timed, on random data at the shapes of the
        bucket that was compiled last.
        """
        if measure and self.compiler is not None and self.buckets:
            check_runs_here(self.spec)
            from tvmstruct.measure import measure_layers

            self._seconds = measure_layers(next(reversed(self.buckets.values())))
        records = [self._measured(record) for record in self._records.values()]
        shapes = tuple(
            " ".join(dict.fromkeys("x".join(map(str, s)) for s in key)) for key in self.buckets
        )
        last = next(reversed(self.buckets.values()), None)
        notes = (*self.notes, *self.padder.notes, *(() if last is None else last.notes))
        return Report(tuple(records), self.spec.key, shapes, notes)

    def measure_skip(
        self, inputs: Mapping[str, Any], threads: int | None = None
    ) -> dict[str, SkipStatistics]:
        """Return by attention what skipping saves and loses on inputs by name.

        The model runs once at exactly the shapes of ``inputs``, compiled if need be; numpy
        compares each attention with an exact one. ``threads`` are those that the schedulers have
        to keep busy; None is as many as the model runs on. ``report()`` repeats the result.

        Raises InputError as `run` does, for a model compiled without ``skip``, without attention
        that skips, or loaded.
        """
        from tvmstruct.skip_measure import compiler_that_skips, measure_bucket

        compiler, skip = compiler_that_skips(self.compiler)
        threads = _checked_threads(threads) or self.threads or self.spec.threads
        check_runs_here(self.spec)
        arrays = self._bind((), inputs)
        self._check_values(arrays)
        names = [spec.name for spec in self.inputs]
        shapes = (array.shape for array in arrays)
        bucket = self._bucket(self._sizes(dict(zip(names, shapes, strict=True))))
        work = partial(measure_bucket, bucket, arrays, compiler, skip, threads)
        found = work() if self._own_thread is None else self._own_thread.submit(work).result()
        self._skipped |= found
        return found

    def _measured(self, record: LayerRecord) -> LayerRecord:
        """Return a record with what was measured of its layer."""
        if (seconds := self._seconds.get(record.name)) is not None:
            record = replace(record, seconds=seconds)
        if (skipped := self._skipped.get(record.name)) is not None:
            record = replace(record, reason=f"{record.reason}; skip: {skipped}")
        return record

    def footprint(self, shapes: Shapes) -> Footprint:
        """Return the memory that intermediate results take at input shapes, compiled if need be.

        Raises InputError as `compile_bucket` does, and for a loaded model, which has no plan.
        """
        lowered = self._bucket(self._sizes(self._checked_shapes(shapes))).lowered
        if lowered is None:
            raise InputError("a loaded model does not know its memory plan; compile its source")
        return lowered.footprint

    def energy(self, shapes: Shapes | None = None, caches: Caches | None = None) -> EnergyReport:
        """Return what one call moves, by kernel and memory level, and an estimate of its energy.

        At input shapes, compiled if need be, or those that were compiled last; ``caches`` are
        this machine's if not given. The result says what it assumes.

        Raises InputError as `footprint` does, and where nothing is compiled yet.
        """
        from tvmstruct.caches import host_caches
        from tvmstruct.energy_report import energy_report

        if shapes is not None:
            bucket = self._bucket(self._sizes(self._checked_shapes(shapes)))
        elif (bucket := next(reversed(self.buckets.values()), None)) is None:
            raise InputError("energy: nothing is compiled yet; give the shapes of the inputs")
        if bucket.lowered is None:
            raise InputError("a loaded model does not know what it moves; compile its source")
        caches = caches or host_caches(self.threads or self.spec.threads)
        at = " ".join(dict.fromkeys("x".join(map(str, s)) for s in bucket.shapes))
        return energy_report(bucket.lowered, caches, at)

    def save(self, path: str | Path) -> None:
        """Write the compiled buckets and the weights to one file; see `tvmstruct.load`.

        A model for VTA becomes a package: a folder, or a zip where ``path`` ends so.
        """
        if self.spec.accelerator is not None:
            from tvmstruct.vta.package import save_package

            return save_package(self, path)
        from tvmstruct.saving import save_model

        return save_model(self, path)

    def bound(self, inputs: Mapping[str, Any] | Sequence[Any]) -> list[np.ndarray]:
        """Return inputs by name, or in order, as the arrays that the model runs on, checked.

        Raises InputError as `run` does.
        """
        named = isinstance(inputs, Mapping)
        arrays = self._bind((), inputs) if named else self._bind(inputs, {})
        self._sizes(
            dict(zip([s.name for s in self.inputs], [a.shape for a in arrays], strict=True))
        )
        self._check_values(arrays)
        return arrays

    def _bind(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> list[np.ndarray]:
        """Return one array per input in order, with name, dtype and rank checked."""
        if not named and len(arrays) == len(self._ranks):
            if self._are_plain(arrays) and [a.ndim for a in arrays] == self._ranks:
                return list(arrays)
        if len(arrays) > len(self.inputs):
            raise InputError(f"{len(arrays)} arrays given; {self._wanted()}")
        known = {s.name for s in self.inputs}
        if unknown := [n for n in named if n not in known]:
            raise InputError(f"unknown input {', '.join(map(repr, unknown))}; {self._wanted()}")
        bound: list[Any] = [None] * len(self.inputs)
        for i, spec in enumerate(self.inputs):
            value = arrays[i] if i < len(arrays) else named.get(spec.name)
            if i < len(arrays) and spec.name in named:
                raise InputError(f"input {spec.name!r} is given by position and by name")
            if value is not None:
                bound[i] = _checked(spec, value)
        if any(b is None for b in bound):
            self._fill(bound)
        return bound

    def _are_plain(self, arrays: Sequence[Any]) -> bool:
        """Return whether these are as many numpy arrays as there are inputs, of their dtypes."""
        if len(arrays) != len(self._dtypes):
            return False
        for a, dtype in zip(arrays, self._dtypes, strict=True):
            if type(a) is not np.ndarray or a.dtype is not dtype:
                return False
        return True

    def _fill(self, bound: list[Any]) -> None:
        """Give missing masks ones and missing token types zeros; refuse other gaps."""
        sizes: dict[str, int] = {}
        for spec, array in zip(self.inputs, bound, strict=True):
            if array is not None:
                sizes |= {d: n for d, n in zip(spec.shape, array.shape, strict=True) if d}
        for i, spec in enumerate(self.inputs):
            if bound[i] is not None:
                continue
            fill = 1 if spec.name in self.default_ones else 0
            if fill == 0 and spec.name not in self.default_zeros:
                raise InputError(f"input {spec.name!r} is missing; {self._wanted()}")
            if any(isinstance(d, str) and d not in sizes for d in spec.shape):
                raise InputError(f"input {spec.name!r} is missing, and nothing tells its shape")
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            bound[i] = np.full(shape, fill, spec.dtype)

    def _sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the size of every symbol; all inputs must agree and fit the model's limits."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in shapes:
                raise InputError(f"no shape for input {spec.name!r}; {self._wanted()}")
            for axis, (dim, size) in enumerate(zip(spec.shape, shapes[spec.name], strict=True)):
                want = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != want:
                    raise InputError(
                        f"input {spec.name!r} has shape {tuple(shapes[spec.name])}: axis {axis} "
                        f"({dim}) is {size} but must be {want} as in the other inputs"
                    )
                if size < 1:
                    raise InputError(
                        f"input {spec.name!r} has shape {tuple(shapes[spec.name])}: axis {axis} "
                        f"({dim}) is empty; give at least one element"
                    )
        self.policy.check(sizes)
        return sizes

    def _wanted(self) -> str:
        parts = (f"{s.name}: {s.dtype}{list(s.shape)}" for s in self.inputs)
        return f"the model takes {', '.join(parts)}"


def _limit_threads(threads: int) -> None:
    """Set the size of the calling thread's pool: mode 1 is "as many as asked for"."""
    tvm.get_global_func("runtime.config_threadpool")(1, threads)


def _checked(spec: TensorSpec, value: Any) -> np.ndarray:
    array = as_array(spec.name, value, spec.dtype)
    if array.ndim != len(spec.shape):
        raise InputError(
            f"input {spec.name!r} has rank {array.ndim} (shape {array.shape}); "
            f"the model takes rank {len(spec.shape)} {list(spec.shape)}"
        )
    return array


def _check_ids(name: str, ids: np.ndarray, rows: int) -> None:
    """Raise where an id would read outside its table, which compiled code does not check."""
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        bad = np.argwhere((ids < 0) | (ids >= rows))[0]
        raise InputError(
            f"input {name!r}{bad.tolist()} is {ids[tuple(bad)]}; ids must be 0 to {rows - 1}: "
            "is the tokenizer that of this model?"
        )


def _place(inputs: Sequence[TensorSpec], dim: int | str) -> int | tuple[int, int]:
    """Return a size, or input and axis where a symbol stands."""
    if isinstance(dim, int):
        return dim
    return next((i, s.shape.index(dim)) for i, s in enumerate(inputs) if dim in s.shape)


def _check_lengths(name: str, lengths: np.ndarray, steps: int) -> None:
    """Raise where a length is negative or more than there are steps."""
    if lengths.size and (lengths.min() < 0 or lengths.max() > steps):
        bad = np.argwhere((lengths < 0) | (lengths > steps))[0]
        raise InputError(
            f"input {name!r}{bad.tolist()} is {lengths[tuple(bad)]}; lengths must be 0 to {steps}, "
            "the number of steps of this request"
        )


def _checked_threads(threads: int | None) -> int | None:
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads!r}; want a positive number, or None for all cores")
    return threads
