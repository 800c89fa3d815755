"""What a VTA bitstream is built for: element widths, tile and buffer sizes, and their limits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tvmstruct.errors import VtaConfigError

PAGE_BYTES = 4096
WORD_BITS = 64
UOP_BITS = 32
LOOP_BITS = 14
HW_VERSIONS = ("0.0.1", "0.0.2")
EXTENSIONS: frozenset[str] = frozenset({"vvma"})


class Memory(IntEnum):
    """A scratchpad, by its id in LOAD and STORE; ACC8 widens int8 from DRAM into ACC."""

    UOP = 0
    WGT = 1
    INP = 2
    ACC = 3
    OUT = 4
    ACC8 = 5


@dataclass(frozen=True)
class Config:
    """One VTA design: the keys of its JSON file, all sizes as base-2 logarithms.

    Widths are bits of an element, buffer sizes bytes.  Zynq files that still say HW_VER 0.0.1
    describe the same design, so both versions encode alike.  ``extensions`` (JSON key
    EXTENSIONS, absent in files of stock designs) names units that stock VTA lacks.
    """

    target: str = "sim"
    hw_ver: str = "0.0.2"
    log_inp_width: int = 3
    log_wgt_width: int = 3
    log_acc_width: int = 5
    log_batch: int = 0
    log_block: int = 4
    log_uop_buff_size: int = 15
    log_inp_buff_size: int = 15
    log_wgt_buff_size: int = 18
    log_acc_buff_size: int = 17
    extensions: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        _check_values(self)
        _check_sizes(self)

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read the JSON text, or the file, of a bitstream's configuration."""
        text = source if isinstance(source, str) and "{" in source else _read(Path(source))
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise VtaConfigError(f"VTA configuration: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise VtaConfigError("VTA configuration: want a JSON object of keys and values")
        return cls.from_mapping(data)

    @classmethod
    def from_mapping(cls, data: dict[str, Any]) -> Self:
        """Read upper-case keys as in the JSON file; every key but EXTENSIONS must be there."""
        names = {f.name.upper(): f.name for f in fields(cls)}
        unknown = [key for key in data if key not in names]
        if unknown:
            hint = "; one LOG_BLOCK takes their place" if "LOG_BLOCK_IN" in unknown else ""
            known = ", ".join(names)
            raise VtaConfigError(
                f"VTA configuration: unknown key {', '.join(unknown)}{hint}; known are {known}"
            )
        missing = [key for key in names if key not in data and key != "EXTENSIONS"]
        if missing:
            raise VtaConfigError(f"VTA configuration: missing key {', '.join(missing)}")
        values = {names[key]: value for key, value in data.items()}
        if "extensions" in values:
            values["extensions"] = _extensions(values["extensions"])
        return cls(**values)

    def to_json(self) -> str:
        """Return the text that ``from_json`` reads; stock designs have no EXTENSIONS."""
        data = {f.name.upper(): getattr(self, f.name) for f in fields(self)}
        names = sorted(data.pop("EXTENSIONS"))
        return json.dumps(data | ({"EXTENSIONS": names} if names else {}), indent=2) + "\n"

    @property
    def batch(self) -> int:
        """Rows of an input, accumulator and output tile."""
        return 1 << self.log_batch

    @property
    def block_in(self) -> int:
        """Input channels of a tile."""
        return 1 << self.log_block

    @property
    def block_out(self) -> int:
        """Output channels of a tile."""
        return 1 << self.log_block

    @property
    def macs_per_tile(self) -> int:
        """Multiply-adds of one GEMM tile operation."""
        return self.batch * self.block_in * self.block_out

    @property
    def name(self) -> str:
        """The name that bitstreams carry, such as ``1x16_i8w8a32_15_15_18_17``."""
        widths = f"i{1 << self.log_inp_width}w{1 << self.log_wgt_width}a{1 << self.log_acc_width}"
        sizes = f"{self.log_uop_buff_size}_{self.log_inp_buff_size}"
        sizes += f"_{self.log_wgt_buff_size}_{self.log_acc_buff_size}"
        return f"{self.batch}x{self.block_in}_{widths}_{sizes}"

    def width(self, memory: Memory) -> int:
        """Bits of an element in DRAM; a micro-op is one element of 32 bits."""
        return 1 << self._log_width[memory]

    def tile_shape(self, memory: Memory) -> tuple[int, ...]:
        """Row-major shape of a tile: inp (batch, in), wgt (out, in), acc and out (batch, out)."""
        return self._tile_shape[memory]

    def tile_bytes(self, memory: Memory) -> int:
        """Bytes of a tile in DRAM: the unit of ``dram_base`` and ``x_stride``."""
        return self._tile_bytes[memory]

    def sram_tile_bytes(self, memory: Memory) -> int:
        """Bytes of a tile on chip: those in DRAM, but for ACC8, which is widened to ACC."""
        return self._tile_bytes[Memory.ACC if memory is Memory.ACC8 else memory]

    def log_depth(self, memory: Memory) -> int:
        """Base-2 logarithm of ``depth``."""
        return self._log_depth[memory]

    def depth(self, memory: Memory) -> int:
        """Tiles that a scratchpad holds (micro-ops for UOP)."""
        return 1 << self._log_depth[memory]

    @cached_property
    def log_depths(self) -> dict[Memory, int]:
        """``log_depth`` of every memory."""
        return dict(self._log_depth)

    @cached_property
    def uop_fields(self) -> tuple[int, int, int]:
        """Bits of the micro-op fields dst, src and wgt."""
        acc, inp = self._log_depth[Memory.ACC], self._log_depth[Memory.INP]
        return acc, max(acc, inp), self._log_depth[Memory.WGT]

    @cached_property
    def _log_width(self) -> dict[Memory, int]:
        inp, wgt, acc = self.log_inp_width, self.log_wgt_width, self.log_acc_width
        M = Memory
        return {M.UOP: 5, M.WGT: wgt, M.INP: inp, M.ACC: acc, M.OUT: inp, M.ACC8: inp}

    @cached_property
    def _tile_shape(self) -> dict[Memory, tuple[int, ...]]:
        rows = (self.batch, self.block_out)
        inp, wgt = (self.batch, self.block_in), (self.block_out, self.block_in)
        M = Memory
        return {M.UOP: (1,), M.WGT: wgt, M.INP: inp, M.ACC: rows, M.OUT: rows, M.ACC8: rows}

    @cached_property
    def _log_tile_bits(self) -> dict[Memory, int]:
        rows = self.log_batch + self.log_block
        elements = dict.fromkeys(Memory, rows) | {Memory.UOP: 0, Memory.WGT: 2 * self.log_block}
        return {memory: elements[memory] + self._log_width[memory] for memory in Memory}

    @cached_property
    def _tile_bytes(self) -> dict[Memory, int]:
        return {memory: 1 << (bits - 3) for memory, bits in self._log_tile_bits.items()}

    @cached_property
    def _log_depth(self) -> dict[Memory, int]:
        sizes = {
            Memory.UOP: self.log_uop_buff_size,
            Memory.WGT: self.log_wgt_buff_size,
            Memory.INP: self.log_inp_buff_size,
            Memory.ACC: self.log_acc_buff_size,
        }
        depths = {memory: size - self._log_tile_bits[memory] + 3 for memory, size in sizes.items()}
        return depths | {Memory.OUT: depths[Memory.ACC], Memory.ACC8: depths[Memory.ACC]}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VtaConfigError(f"VTA configuration: cannot read {path} ({error})") from error


def _extensions(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise VtaConfigError(f"VTA configuration: EXTENSIONS is {value!r}, want a list of names")
    return frozenset(value)


def _check_values(config: Config) -> None:
    for name in ("target", "hw_ver"):
        if not isinstance(getattr(config, name), str):
            value = getattr(config, name)
            raise VtaConfigError(f"VTA configuration: {name.upper()} is {value!r}, want a string")
    if config.hw_ver not in HW_VERSIONS:
        raise VtaConfigError(
            f"VTA configuration: HW_VER {config.hw_ver} is unknown; known are {HW_VERSIONS}"
        )
    for f in fields(config):
        value = getattr(config, f.name)
        if not f.name.startswith("log_"):
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise VtaConfigError(
                f"VTA configuration: {f.name.upper()} is {value!r}, want an integer"
            )
        limit = 5 if f.name.endswith("_width") else 30
        if not 0 <= value <= limit:
            raise VtaConfigError(
                f"VTA configuration: {f.name.upper()} is {value}, want 0 to {limit}"
            )
    if extra := sorted(config.extensions - EXTENSIONS):
        raise VtaConfigError(
            f"VTA configuration: unknown extension {', '.join(extra)}; "
            f"known are {', '.join(sorted(EXTENSIONS))}"
        )


def _check_sizes(config: Config) -> None:
    bits, depths = config._log_tile_bits, config._log_depth
    for memory in Memory:
        label = memory.name.lower()
        if bits[memory] < 3:
            raise VtaConfigError(
                f"VTA configuration: a tile of {label} has {1 << bits[memory]} bits, under one byte"
            )
        if 1 << (bits[memory] - 3) > PAGE_BYTES:
            raise VtaConfigError(
                f"VTA configuration: a tile of {label} has {1 << (bits[memory] - 3)} bytes, over "
                f"a page of {PAGE_BYTES}; LOG_BATCH, LOG_BLOCK or the width must shrink"
            )
        if depths[memory] < 0:
            raise VtaConfigError(
                f"VTA configuration: the {label} buffer is smaller than one tile "
                f"(log2 of its depth is {depths[memory]})"
            )
        if depths[memory] > 16:
            raise VtaConfigError(
                f"VTA configuration: the {label} buffer holds 2^{depths[memory]} tiles; "
                "sram_base has 16 bits"
            )
    _check_fields(config)


def _check_fields(config: Config) -> None:
    depths = config._log_depth
    acc, inp, wgt = depths[Memory.ACC], depths[Memory.INP], depths[Memory.WGT]
    uop = 8 + 2 * depths[Memory.UOP] + 1 + 2 * LOOP_BITS
    words = {
        "word 0 of GEMM and ALU": uop,
        "word 1 of GEMM": 2 * (acc + inp + wgt),
        "word 1 of ALU": 4 * acc + 20,
    }
    if "vvma" in config.extensions:
        words["word 1 of VGEMM"] = 2 * (acc + inp) + inp
    for label, used in words.items():
        if used > WORD_BITS:
            raise VtaConfigError(
                f"VTA configuration: {label} needs {used} bits, over {WORD_BITS}; "
                "make buffers smaller or tiles larger"
            )
    if (used := sum(config.uop_fields)) > UOP_BITS:
        raise VtaConfigError(
            f"VTA configuration: a micro-op needs {used} bits, over {UOP_BITS}; "
            "make buffers smaller or tiles larger"
        )


@dataclass(frozen=True)
class Board:
    """A board that VTA was built for: clock, bus and where its control registers lie."""

    name: str
    part: str
    mhz: int
    hls_period_ns: int
    axi_bits: int
    axi_prot: str
    control: int  # address of fetch; load, compute and store follow at steps of 4 KiB

    def peak_gops(self, config: Config) -> float:
        """Giga-operations a second at one tile operation a cycle, two a multiply-add."""
        return 2 * config.macs_per_tile * self.mhz / 1000


DEFAULT = Config()
_PYNQ = ("xc7z020clg484-1", 100, 7, 64, "000", 0x43C00000)
BOARDS = {
    b.name: b
    for b in (
        Board("pynq", *_PYNQ),
        Board("sim", *_PYNQ),
        Board("tsim", *_PYNQ),
        Board("ultra96", "xczu3eg-sbva484-1-e", 333, 2, 128, "010", 0xA0000000),
        Board("zcu104", "xczu7ev-ffvc1156-2-e", 333, 2, 128, "010", 0xA0000000),
        Board("de10nano", "5CSEBA6U23I7", 100, 2, 64, "100", 0xFF220000),
    )
}
# Every shipped configuration has the default's sizes.
PRESETS = {
    name: replace(DEFAULT, target=name, hw_ver="0.0.1" if name == "zcu104" else "0.0.2")
    for name in (*BOARDS, "intelfocl")
}
