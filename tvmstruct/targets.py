"""Targets: what the user writes to a checked TVM target, its ISA row and its CPU features.

``"host"`` is this machine: the highest x86-64 level whose features the kernel reports plus
the further instruction sets one by one, so a CPU that LLVM has never heard of is served too.
Plain ``"llvm"`` means what it means in TVM, the x86-64 baseline, and warns.
"""

import ctypes
import difflib
import json
import platform
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import tvm_ffi
from tvm.target import Target

from .errors import TargetError
from .threads import wanted_threads
from .vta.target import Accelerator

CPUINFO = Path("/proc/cpuinfo")
LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64")  # of the psABI, best first
NOT_YET = ("cuda",)
VTA = "vta"
FAST_MATH = "fast-math"
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64

# Instruction sets that generated code may use: LLVM's name, and the kernel's where it differs.
KERNEL_NAMES = {
    "64bit": "lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "crc32": "sse4_2",
    "sahf": "lahf_lm",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "amx-fp16": "amx_fp16",
    "amx-complex": "amx_complex",
}
SAME_NAMES = frozenset(
    "mmx sse sse2 ssse3 sse4a popcnt cx8 cx16 cmov fxsr movbe f16c fma fma4 xop tbm avx avx2 bmi2 "
    "adx aes vaes vpclmulqdq gfni avx512f avx512cd avx512dq avx512bw avx512vl avx512ifma "
    "avx512vbmi sha512 sm3 sm4 avx10.1 avx10.2".split()
)
INSTRUCTION_SETS = SAME_NAMES | KERNEL_NAMES.keys()


@dataclass(frozen=True)
class Isa:
    """One row of the table that schedules read: float32 lanes, vector registers, fused multiply.

    ``dots`` says whether one instruction multiplies and adds four bytes, which some CPUs of a row
    have (VNNI).
    """

    name: str
    lanes: int
    registers: int
    fma: bool
    needs: frozenset[str]
    dots: bool = True


ISAS = (  # best first
    Isa("avx512", 16, 32, True, frozenset("avx512f avx512bw avx512dq avx512vl fma".split())),
    Isa("avx2", 8, 16, True, frozenset({"avx2", "fma"})),
    Isa("sse", 4, 16, False, frozenset({"sse2"})),
)


@dataclass(frozen=True)
class TargetSpec:
    """A resolved target.

    ``features`` are the instruction sets that compiled code may use. ``key`` names
    everything that changes the generated code, so not the thread count.
    """

    target: Target = field(compare=False)  # TVM compares targets by identity
    isa: Isa
    features: frozenset[str]
    threads: int
    key: str
    accelerator: Accelerator | None = None  # that takes layers off the CPU


def resolve(target: str | Mapping[str, Any] | Target | TargetSpec = "host") -> TargetSpec:
    """Return the checked form of a target string, JSON text, dict or TVM target, or of "host".

    ``"vta -config=FILE"`` is the accelerator beside this CPU, or beside that of ``-mcpu``.
    """
    if isinstance(target, TargetSpec):
        return target
    options = _parse(target)
    if options.get("kind") == VTA:
        accelerator = Accelerator.of(options.pop("config", None))
        options |= {"kind": "llvm", "mcpu": options.get("mcpu", "native")}
        host = resolve(options)
        return replace(host, key=f"{accelerator.key}:{host.key}", accelerator=accelerator)
    _check_options(options)
    _fill_cpu(options)
    options.setdefault("num-cores", wanted_threads())
    return _spec(options)


def check_runs_here(spec: TargetSpec) -> None:
    """Raise where this machine lacks instruction sets that code for ``spec`` may use."""
    if missing := spec.features - host_features():
        raise TargetError(
            f"target {spec.key} uses {', '.join(sorted(missing))}, which this CPU does not have; "
            'compiling for it works, running needs another machine or target="host"'
        )


def check_cpu(spec: TargetSpec, what: str) -> TargetSpec:
    """Return a target of CPU code only; TargetError where an accelerator takes layers from it."""
    if spec.accelerator is not None:
        raise TargetError(
            f"{what} measures code on a CPU, but layers of target {spec.key} run in a simulator; "
            "report() and tvmstruct vta say what they cost there"
        )
    return spec


@cache
def host_features() -> frozenset[str]:
    """Return this machine's instruction sets under LLVM's names: the kernel's flags, else cpuid.

    AMX counts only where Linux grants this process the tile registers, which is asked for here.
    """
    flags = _flags(_read(CPUINFO))
    if flags:
        found = frozenset(f for f in INSTRUCTION_SETS if KERNEL_NAMES.get(f, f) in flags)
    else:
        have = _llvm("tvm.codegen.llvm.GetHostCPUFeatures")() or {}
        found = frozenset(str(name) for name, on in have.items() if on) & INSTRUCTION_SETS
    if "amx-tile" in found and not permit_tiles():
        found -= {name for name in found if name.startswith("amx-")}
    return found


def permit_tiles() -> bool:
    """Ask Linux for the AMX tile registers, for all threads to come; return whether it agrees."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


@cache
def known_cpus() -> tuple[str, ...]:
    """Return the names of all 64-bit x86 CPUs that LLVM knows."""
    names = _llvm("target.llvm_get_cpu_archlist")(Target({"kind": "llvm", "mcpu": "x86-64"}))
    return tuple(sorted(str(n) for n in names if "64bit" in _llvm_features(str(n))))


def isa_of(features: Iterable[str]) -> Isa:
    """Return the best row of the ISA table that ``features`` allow."""
    return next(isa for isa in ISAS if isa.needs <= frozenset(features))


def _parse(target: str | Mapping[str, Any] | Target) -> dict[str, Any]:
    """Return the options of any way to write a target."""
    if isinstance(target, Target):
        target = dict(target.export())
    if isinstance(target, str):
        text = target.strip()
        return _parse_json(text) if text.startswith("{") else _parse_words(text)
    if not isinstance(target, Mapping):
        raise TargetError(
            f"target has type {type(target).__name__}; give a string such as "
            '"llvm -mcpu=znver2", a dict, a tvm.target.Target or "host"'
        )
    return {str(key): _plain(str(key), value) for key, value in target.items()}


def _parse_json(text: str) -> dict[str, Any]:
    try:
        return _parse(json.loads(text))
    except json.JSONDecodeError as error:
        raise TargetError(f"target {text!r} starts like JSON but is not: {error}") from error


def _parse_words(text: str) -> dict[str, Any]:
    """Parse ``kind -option=value ...``; an option without value is true."""
    try:
        kind, *words = shlex.split(text)
    except ValueError as error:
        raise TargetError(f'target {text!r} cannot be read: {error}; try "host"') from error
    if kind == "host":
        kind, words = "llvm", ["-mcpu=native", *words]
    options: dict[str, Any] = {"kind": kind}
    for word in words:
        if not word.startswith("-"):
            raise TargetError(f"target {text!r}: {word!r} is no option; write -name=value")
        name, equals, value = word.lstrip("-").partition("=")
        options[name] = _typed(name, value if equals else "true")
    return options


def _typed(name: str, value: str) -> Any:
    """Return an option's text as the type that TVM wants."""
    kind = _option_types().get(name, "str")
    if kind == "int":
        try:
            return int(value)
        except ValueError:
            raise TargetError(f"target option -{name}={value} must be a whole number") from None
    if kind == "bool":
        return value.lower() in ("1", "true", "on")
    return value.split(",") if kind.startswith("Array") else value


def _check_options(options: dict[str, Any]) -> None:
    """Refuse a wrong kind or option, and options that would break exactness or the ISA table."""
    kind = options.get("kind", "llvm")
    if kind in NOT_YET:
        raise TargetError(
            f'target kind "{kind}" is not available yet; this version has "llvm" and "vta"'
        )
    if kind != "llvm":
        raise TargetError(
            f"unknown target kind {kind!r}{_nearest(str(kind), ('llvm', VTA, *NOT_YET))}"
        )
    options["kind"] = kind
    options.pop("host", None)  # code for the CPU is its own host
    for name, value in options.items():
        if name not in _option_types() | {"kind": "str"}:
            raise TargetError(f"unknown option -{name}{_nearest(name, _option_types())}")
        if name.startswith(FAST_MATH) and value:
            raise TargetError(f"option -{name} would change results; leave it out")
    triple = options.get("mtriple", "x86_64")
    if not str(triple).startswith(("x86_64", "amd64")):
        raise TargetError(f"-mtriple={triple}: only x86_64 is available in this version")


def _fill_cpu(options: dict[str, Any]) -> None:
    """Set mcpu and mattr: this machine's for ``native``, the baseline for none, else checked."""
    cpu = options.get("mcpu")
    if cpu == "native":
        options |= _host_options(options.get("mattr", []))
    elif cpu is None:
        options["mcpu"] = "x86-64"
        if "mattr" not in options:
            warnings.warn(
                "the target names no CPU: compiling for the x86-64 baseline (SSE2), which is "
                'several times slower than AVX; use "host" for this machine',
                stacklevel=3,
            )
    elif cpu not in known_cpus():
        raise TargetError(f"unknown CPU -mcpu={cpu}{_nearest(str(cpu), known_cpus())}")
    for attribute in options.get("mattr", []):
        if attribute[:1] not in ("+", "-") or attribute[1:] not in _known_attributes():
            near = _nearest(attribute.lstrip("+-"), _known_attributes())
            raise TargetError(f"unknown -mattr={attribute}; write +name or -name{near}")


def _host_options(more: list[str]) -> dict[str, Any]:
    """Return mcpu and mattr for this machine, whatever LLVM believes it to be."""
    have = host_features()
    if "64bit" not in have:
        raise TargetError("this machine is no 64-bit x86; only those are available in this version")
    level = next(c for c in LEVELS if _llvm_features(c) & INSTRUCTION_SETS <= have | {"crc32"})
    extra = (have & _known_attributes()) - _llvm_features(level)
    return {"mcpu": level, "mattr": sorted(f"+{name}" for name in extra) + more}


def _spec(options: dict[str, Any]) -> TargetSpec:
    mattr = options.get("mattr", [])
    features = _llvm_features(options["mcpu"], tuple(mattr)) & INSTRUCTION_SETS
    try:
        target = Target(options)
    except (TypeError, ValueError) as error:
        raise TargetError(f"TVM refuses target {json.dumps(options)}: {error}") from error
    isa = isa_of(features)
    silent = ("kind", "keys", "tag", "mtriple", "mcpu", "mattr", "num-cores")
    others = [f"{name}={options[name]}" for name in sorted(options) if name not in silent]
    key = ":".join([isa.name, options["mcpu"], *([",".join(mattr)] if mattr else []), *others])
    threads = options["num-cores"]
    if not isinstance(threads, int) or threads < 1:
        raise TargetError(f"-num-cores={threads} must be a whole number of at least 1")
    return TargetSpec(target, isa, features, threads, key)


@cache
def _llvm_features(cpu: str, mattr: tuple[str, ...] = ()) -> frozenset[str]:
    """Return what LLVM lets code for a CPU use, tuning hints included."""
    target = Target({"kind": "llvm", "mcpu": cpu, "mattr": list(mattr)})
    return frozenset(str(name) for name in _llvm("target.llvm_get_cpu_features")(target))


@cache
def _known_attributes() -> frozenset[str]:
    return frozenset().union(*(_llvm_features(cpu) for cpu in known_cpus()))


@cache
def _option_types() -> dict[str, str]:
    """Return the options of TVM's llvm kind and their types."""
    found = _llvm("target.ListTargetKindOptionsFromName")("llvm")
    return {str(name): str(kind) for name, kind in found.items()}


def _llvm(name: str) -> Any:
    return tvm_ffi.get_global_func(name)


def _plain(name: str, value: Any) -> Any:
    """Return FFI containers as Python ones, and texts as the type that TVM wants."""
    if isinstance(value, tvm_ffi.Array | list | tuple):
        return list(map(str, value))
    return _typed(name, value) if isinstance(value, str) else value


def _flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags that every processor of a cpuinfo listing has."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    sets = [frozenset(value.split()) for name, _, value in lines if name.strip() == "flags"]
    return frozenset.intersection(*sets) if sets else frozenset()


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion and the list of known names, to end an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {close[0]}?" if close else ";") + f" known: {', '.join(names)}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
