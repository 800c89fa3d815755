"""Compiled chains equal ``op.apply``: every expression, every ISA, odd numbers of rows."""

from __future__ import annotations

import importlib
import itertools
import re

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import tirx as T

from tests.catalogue import EXPRESSIONS, NODES, RAGGED, normal
from tests.kernels import build, call, every_isa, extras, finish
from tvmstruct import families, ops
from tvmstruct.folding import fold
from tvmstruct.parts import lower_parts
from tvmstruct.schedules.builder import argument, prim_func
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue
from tvmstruct.schedules.compute.low_precision import pack_product, round_bf16
from tvmstruct.schedules.compute.product_tile import Tile, emit_tile, touch_tile
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.schedules.x86.intrinsics import product_tile
from tvmstruct.schedules.x86.packed_dense import HEIGHTS
from tvmstruct.stages import lower
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

ROWS = (1, 3, 8, 17)
PARALLEL = 1 << 30  # multiply-adds that make the kernel choose its parallel form
FLAGS = ((True, False), (False, True), (True, True))  # bias, residual
EPILOGUES = [
    Epilogue(FLAGS[i % 3][0], activation, FLAGS[i % 3][1], norm=None if i else 1e-3)
    for i, activation in enumerate(ACTIVATIONS)
]
FAMILIES = list({case.family: str(case) for case in RAGGED}.values())
REST = [name for name in EXPRESSIONS if name not in NODES]
BATCH = 10  # expressions compiled as one library
PLAIN = Epilogue()


def scale_of(op: ops.Op, x: np.ndarray) -> float:
    """Return the size of the terms whose rounding may show in the result."""
    return max(1.0, float(np.abs(op.apply(np.abs(x))).max()))


def check(
    isa,
    names: list[str],
    epilogue: Epilogue,
    rng,
    macs: int | None = None,
    form: str = "float",
) -> None:
    kernels = X86Kernels(isa, threads=2)
    programs = {name: lower(EXPRESSIONS[name], isa.lanes, form=form) for name in names}
    made = {
        (name, rows): kernels.chain(p, epilogue, rows, macs or EXPRESSIONS[name].macs)
        for name, p in programs.items()
        for rows in ROWS
    }
    library = build(isa, {kernel.symbol: kernel.func for kernel in made.values()})
    for name, rows in itertools.product(names, ROWS):
        function = library[made[name, rows].symbol]
        compare(function, EXPRESSIONS[name], programs[name], rows, rng, epilogue=epilogue)


def compare(function, op, program, rows: int, rng, epilogue=PLAIN) -> None:
    """Hold a compiled kernel to ``op.apply``, in bf16 to the operator with rounded weights."""
    x = rng.normal(size=(rows, op.n_in)).astype(np.float32)
    bias, residual = rng.normal(size=op.n_out), rng.normal(size=(rows, op.n_out))
    more = extras(epilogue, bias, residual)
    weights = [stored(program, i) for i in range(len(program.weights))]
    if any(product.form == "pairs" for product in program.products):
        op = ops.map_arrays(
            fold(op), lambda w: w if w.ndim == 1 else round_bf16(w).astype(np.float32)
        )
    found = call(function, [x, *weights, *more], rows, op.n_out)
    want = finish(op.apply(x.astype(np.float64)), epilogue, bias, residual)
    bound = tolerance("float32", max(op.n_in, 4 * op.n_out), scale=scale_of(op, x))
    np.testing.assert_allclose(found, want, **bound, err_msg=f"{op!r}, {rows} rows")


def stored(program, i: int):
    return tvm.runtime.tensor(program.stored(i, pack_product))


@every_isa
def test_every_node(isa, rng):
    check(isa, list(NODES), Epilogue(), rng)


@pytest.mark.isa("avx512")
def test_every_family(rng):
    check(ISAS[0], FAMILIES, Epilogue(), rng)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("start", range(0, len(REST), BATCH))
def test_every_other_expression(isa, start, rng):
    check(isa, REST[start : start + BATCH], Epilogue(), rng)


@every_isa
def test_every_epilogue(isa, rng):
    for epilogue in EPILOGUES:
        check(isa, ["product"], epilogue, rng)


@every_isa
def test_epilogues_of_families_and_forms_that_end_in_a_view(isa, rng):
    names = ["vvma 24x36 k=4", "kronecker 23x31 r=2", "lgp_shuffle 24x36 g=3", "permute 3-D"]
    check(isa, names, Epilogue(True, "gelu", True), rng)


@every_isa
def test_the_parallel_form(isa, rng):
    check(isa, ["vvma 24x36 k=4", "product"], Epilogue(bias=True), rng, macs=PARALLEL)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("start", range(0, len(EXPRESSIONS), BATCH))
def test_the_parallel_form_of_every_expression(isa, start, rng):
    names = list(EXPRESSIONS)[start : start + BATCH]
    check(isa, names, Epilogue(bias=True), rng, macs=PARALLEL)


@every_isa
def test_a_layer_of_real_size(isa, rng):
    """384 x 1536 in 32 x 32 blocks: the scratch of one tile is far over the register limit."""
    v = rng.normal(size=(48, 12, 32)).astype(np.float32)
    op = families.vvma(rng.normal(size=(32, 32)).astype(np.float32) / 6, v)
    program = lower(op, isa.lanes)
    kernel = X86Kernels(isa).chain(program, Epilogue(), 33, op.macs)
    compare(build(isa, {"k": kernel.func})["k"], op, program, 33, rng)


RESIDUAL = Epilogue(True, "none", True)


@every_isa
def test_bf16_weights(isa, rng):
    names = [*FAMILIES[:2], "product", "sum", "array used twice", "dense 1x1"]
    check(isa, names if isa.name == "avx512" else names[1:-1], RESIDUAL, rng, form="pairs")


@pytest.mark.slow
@pytest.mark.isa("avx512")
def test_bf16_weights_of_every_family(rng):
    check(ISAS[0], FAMILIES, RESIDUAL, rng, form="pairs")


@every_isa
def test_a_single_tile(isa, rng):
    op = ops.Dense(rng.normal(size=(5, isa.lanes)))
    program = lower(op, isa.lanes)
    kernel = X86Kernels(isa).chain(program, PLAIN, 1, op.macs)
    compare(build(isa, {"k": kernel.func})["k"], op, program, 1, rng)


SHUFFLES = {  # (g, q) -> (q, g): squares, bands of squares, overlapping squares, single numbers
    f"{g}x{q}": ops.swap(g, q) @ ops.Diag(np.arange(1, g * q + 1) / (g * q)) @ ops.swap(q, g)
    for g, q in ((8, 50), (16, 16), (24, 40), (32, 17), (2, 16), (4, 5), (12, 33), (5, 64), (8, 3))
}


@every_isa
def test_shuffles(isa, rng):
    kernels = X86Kernels(isa)
    turns = {n: ops.swap(*map(int, n.split("x"))) for n in SHUFFLES}
    cases = {**SHUFFLES, **{f"{n} alone": op for n, op in turns.items()}}
    programs = {name: lower(op, isa.lanes) for name, op in cases.items()}
    made = {n: kernels.chain(p, PLAIN, 3, 1) for n, p in programs.items()}
    library = build(isa, {k.symbol: k.func for k in made.values()})
    for name, op in cases.items():
        compare(library[made[name].symbol], op, programs[name], 3, rng)


def choices_of(isa) -> list[dict[str, int]]:
    """Return every height and way to share threads, with blocks of one or of four tiles."""
    cuts = itertools.product(HEIGHTS[isa.name], range(3))
    tiles = itertools.cycle((1, 4))
    return [{"height": h, "threads": way, "block": h * next(tiles)} for h, way in cuts]


@every_isa
def test_every_way_to_cut_rows(isa, rng):
    """The choices of tuning, on long sums (cut in chunks) and on large and small stages."""
    rows = 43
    cases = {
        "low rank": families.low_rank(rng.normal(size=(520, 17)) / 23, rng.normal(size=(17, 40))),
        "monarch": EXPRESSIONS["monarch 23x31 b=4,r=2"],
    }
    for op in cases.values():
        program = lower(op, isa.lanes)
        kernel = X86Kernels(isa, threads=2).chain(program, Epilogue(bias=True), rows, op.macs)
        made = {}
        for choices in choices_of(isa):
            answered = lambda name, options, default, c=choices: take(c[name], options)  # noqa: E731
            made[str(choices)] = kernel.space.build(rows, answered)
        library = build(isa, {f"k{i}": func for i, func in enumerate(made.values())})
        for i in range(len(made)):
            compare(library[f"k{i}"], op, program, rows, rng, epilogue=Epilogue(bias=True))


def take(choice: int, options):
    assert choice in options, (choice, options)
    return choice


@every_isa
def test_threads_share_stages(isa, rng, monkeypatch):
    module = importlib.import_module("tvmstruct.schedules.x86.chain")
    monkeypatch.setattr(module, "SHARED_MACS", 0)
    names = ("monarch 36x24 b=3", "vvma 24x36 k=12,transposed=False", "2 Kroneckers")
    large = families.kronecker(normal(2, 40, 24), normal(2, 16, 40))
    for rows, name in itertools.product((1, 4, 17), names):
        op = EXPRESSIONS.get(name, large)
        program = lower(op, isa.lanes)
        kernel = X86Kernels(isa, threads=2).chain(program, PLAIN, rows, 1)
        assert "T.parallel" in kernel.func.script()
        compare(build(isa, {"k": kernel.func})["k"], op, program, rows, rng)


def test_vvma_and_kroneckers_fall_into_independent_parts(monkeypatch):
    module = importlib.import_module("tvmstruct.schedules.x86.chain")
    monkeypatch.setattr(module, "SHARED_MACS", 0)
    cases = {  # the parts that three threads can have: tiles of outputs and of groups divide
        "vvma": (families.vvma(normal(16, 16), normal(32, 4, 16)), 2),
        "kronecker": (families.kronecker(normal(2, 40, 24), normal(2, 16, 40)), 3),
        "monarch": (families.monarch(normal(4, 8, 8), normal(4, 8, 8)), 1),
    }
    shard = re.compile(r'T\.parallel\(T\.int64\((\d+)\)\):\s+with T\.sblock\("shard')
    for name, (op, parts) in cases.items():
        kernel = X86Kernels(ISAS[0], threads=3).chain(lower(op, 16), PLAIN, 1, 1)
        assert shard.findall(kernel.func.script()) == [str(parts)] * (parts > 1), name


TILES = {
    "columns of groups": dict(rows=3, groups=2, columns=2, a_group=7, c_group=96),
    "one row, one group": dict(rows=1, groups=1, columns=1, a_group=0, c_group=0),
    "onto old sums": dict(rows=2, groups=1, columns=3, a_group=0, c_group=0, clear=False),
    "scratch rows": dict(rows=4, groups=1, columns=2, a_group=0, c_group=0, a_row=60, c_row=99),
    "words": dict(rows=3, groups=2, columns=2, a_group=2, c_group=96, form="pairs"),
    "over groups": dict(over=True, rows=3, columns=4, a_group=1, c_group=1),
    "over groups, shared": dict(over=True, rows=1, columns=2, a_group=1, c_group=1, shared=True),
    "over groups, words": dict(over=True, rows=2, columns=2, a_group=1, c_group=1, form="pairs"),
}


def tile_of(isa, case: dict) -> Tile:
    case = {"over": False, "shared": False, "form": "float", "clear": True, **case}
    over, lanes, columns = case.pop("over"), isa.lanes, case.pop("columns")
    shared, words = case.pop("shared"), 2 if case["form"] == "pairs" else 1
    each = (1 if shared else lanes) if over else 1
    width = columns * (each if over else lanes) // words
    case = {"a_row": None, "c_row": None, "groups": lanes, **case}
    return Tile(
        **case, lanes=lanes, over_groups=over, columns=columns if over else columns * lanes,
        depth=((3, 21), (5, 2)), b_depth=(5 * width, width), b_column=each,
        b_group=int(over and not shared), c_column=lanes if over else 1,
    )  # fmt: skip


def product_alone(tile: Tile) -> tvm.tirx.PrimFunc:
    def body() -> None:
        named = zip("abcs", tile.span, tile.dtypes, strict=False)
        buffers = tuple(argument(*one) for one in named)
        starts = [(T.int64(0),) * len(shape) for shape in tile.span]
        with T.sblock("root"), T.sblock("product"):
            touch_tile(tile, buffers, starts)
            emit_tile(tile, buffers, starts)

    return prim_func(body)


@every_isa
@pytest.mark.parametrize("name", TILES)
def test_description_and_implementation_of_a_tile_agree(isa, name, rng):
    tile = tile_of(isa, TILES[name])
    described = product_alone(tile)
    schedule = tvm.s_tir.Schedule(described)
    schedule.tensorize(schedule.get_sblock("product"), product_tile(isa, tile))
    implemented = schedule.mod["main"]
    library = build(isa, {"described": described, "implemented": implemented})
    a, b, c = (rng.normal(size=shape).astype(np.float32) for shape in tile.span)
    if tile.paired:
        b = rng.integers(0x3F803F80, 0x3FFF3FFF, size=tile.span[1]).astype(np.int32)
    results = []
    for function in ("described", "implemented"):
        out = tvm.runtime.tensor(c.copy())
        library[function](tvm.runtime.tensor(a), tvm.runtime.tensor(b), out)
        results.append(out.numpy())
    assert not np.array_equal(results[0], c)
    np.testing.assert_allclose(*results, **tolerance("float32", 15, scale=30))


def test_the_inner_loops_hold_their_sums_in_registers():
    v = np.ones((32, 32, 32), np.float32)
    program = lower(families.vvma(np.ones((32, 32), np.float32), v), 16)
    for rows in (1, 64):
        kernel = X86Kernels(ISAS[0], threads=2).chain(program, PLAIN, rows, 1 << 16)
        assembly = build(ISAS[0], {"k": kernel.func}).inspect_source("asm")
        blocks = re.split(r"^\.?\w+:", assembly, flags=re.M)
        for text in (b for b in blocks if len(re.findall(r"vfmadd\w+ps", b)) >= 8):
            assert not re.findall(r"vmovup?s?\s+%zmm\d+,.*\(%rsp\)", text), "a sum is spilled"


GOLDENS = {
    "chain_avx512_vvma_24x36": ("vvma 24x36 k=12,transposed=False", 8),
    "chain_avx512_lgp_shuffle_36x24_single_row": ("lgp_shuffle 36x24 g=3", 1),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, golden):
    expression, rows = GOLDENS[name]
    program = lower(EXPRESSIONS[expression], 16)
    kernel = X86Kernels(ISAS[0], threads=2).chain(program, Epilogue(bias=True), rows, 100)
    golden(name, kernel.func.with_attr("global_symbol", "chain").script())


def test_equal_programs_share_a_kernel_and_different_ones_do_not(rng):
    kernels = X86Kernels(ISAS[0], threads=2)

    def symbol(op, rows=8, macs=10, **epilogue):
        return kernels.chain(lower(op, 16), Epilogue(**epilogue), rows, macs).symbol

    a, b = (ops.BlockDiag(rng.normal(size=(4, 3, 5))) for _ in range(2))
    assert symbol(a) == symbol(b)
    others = {
        symbol(a),
        symbol(ops.BlockDiag(rng.normal(size=(3, 4, 5)))),
        symbol(a, rows=1),
        symbol(a, bias=True),
        symbol(a, rows=64, macs=PARALLEL),
    }
    assert len(others) == 5


@every_isa
@pytest.mark.parametrize("paired", [False, True])
def test_parts_with_weights_of_their_own(isa, paired, rng):
    op = families.bh4(normal(2, 4, 4, 8, 8), 27, 64)
    program = lower_parts(op, isa.lanes, 2, form="pairs" if paired else "float")
    assert program.parts == 2
    epilogue, kernels = EPILOGUES[0], X86Kernels(isa, threads=2)
    made = {rows: kernels.chain(program, epilogue, rows, PARALLEL) for rows in (1, 3, 37)}
    library = build(isa, {kernel.symbol: kernel.func for kernel in made.values()})
    for rows, kernel in made.items():
        compare(library[kernel.symbol], op, program, rows, rng, epilogue=epilogue)
