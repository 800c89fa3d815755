"""Structured kernels in int8 and bf16 against numpy: to the last bit where sums are integers."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import tvm

from tests.catalogue import EXPRESSIONS, RAGGED
from tests.chain_reference import evaluate, exactly, in_bf16, in_int8, unless_small
from tests.kernels import call, extras, finish, random_picks
from tests.schedules.test_bf16_dense import busiest_loop
from tests.schedules.test_chain import EPILOGUES, FAMILIES, PLAIN, product_alone, scale_of
from tvmstruct import families, ops, stages
from tvmstruct.folding import fold
from tvmstruct.rounding import BYTES, EACH, HALVES, Round, pays
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import pack_product, rounded_blocks
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.schedules.x86.intrinsics import product_tile
from tvmstruct.stages import lower
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

LEAST = 2  # rows of the blocks that are rounded in tests: catalogue entries are small
ROWS = (1, 11)
NEED = {BYTES: "avx512vnni", HALVES: "avx512bf16"}
MULTIPLY = {BYTES: unless_small(in_int8, LEAST), HALVES: unless_small(in_bf16, LEAST)}
APART = {BYTES: 2e-3, HALVES: 5e-4}  # from the reference in the norm, at most
FOUND = {BYTES: 0.03, HALVES: 0.01}  # from exact arithmetic
CPUS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}
FORMS = [
    pytest.param("avx512", BYTES, marks=pytest.mark.isa(NEED[BYTES])),
    pytest.param("avx2", BYTES, marks=pytest.mark.isa(NEED[BYTES])),  # 256 bits of it
    pytest.param("avx512", HALVES, marks=pytest.mark.isa(NEED[HALVES])),
]
every_form = pytest.mark.parametrize(("isa", "form"), FORMS)
int8 = pytest.mark.isa(NEED[BYTES])


@pytest.fixture
def all_rounded(monkeypatch):
    """Round blocks of every size."""
    monkeypatch.setattr(stages, "pays", lambda form, p, q: p >= LEAST)


def isa_of(name: str):
    return next(isa for isa in ISAS if isa.name == name)


def build(isa, form: str, kernels: dict[str, tvm.tirx.PrimFunc]) -> tvm.runtime.Module:
    features = ["+avx512vl", f"+{NEED[form]}"]
    target = {"kind": "llvm", "mcpu": CPUS[isa.name], "mattr": features, "num-cores": 2}
    named = {n: f.with_attr("global_symbol", n) for n, f in kernels.items()}
    return tvm.compile(tvm.IRModule(named), target=tvm.target.Target(target)).mod


def weights_of(program) -> list[tvm.runtime.Tensor]:
    return [
        tvm.runtime.tensor(program.stored(i, pack_product)) for i in range(len(program.weights))
    ]


def whole(op: ops.Op) -> bool:
    """Return whether nothing but int8 products changes a number: then results are exact."""
    small = any(w.ndim == 1 or w.shape[-2] < LEAST for w in op.leaf_arrays())
    return not small and not re.search(r"Hadamard| \+ ", repr(op))


def check(isa_name: str, form: str, names, rng, epilogue=PLAIN, rows=ROWS, macs=None) -> None:
    isa = isa_of(isa_name)
    kernels = X86Kernels(isa, threads=2)
    programs = {name: lower(EXPRESSIONS[name], isa.lanes, form=form) for name in names}
    made = {
        (name, count): kernels.chain(p, epilogue, count, macs or EXPRESSIONS[name].macs)
        for name, p in programs.items()
        for count in rows
    }
    library = build(isa, form, {kernel.symbol: kernel.func for kernel in made.values()})
    for name, count in itertools.product(names, rows):
        op = EXPRESSIONS[name]
        assert any(product.form == form for product in programs[name].products)
        function = library[made[name, count].symbol]
        compare(function, op, programs[name], form, count, rng, epilogue)


def compare(function, op, program, form: str, rows: int, rng, epilogue=PLAIN) -> None:
    x = rng.normal(size=(rows, op.n_in)).astype(np.float32)
    bias, residual = rng.normal(size=op.n_out), rng.normal(size=(rows, op.n_out))
    arrays = [x, *weights_of(program), *extras(epilogue, bias, residual)]
    found = call(function, arrays, rows, op.n_out)
    folded = fold(op)
    product = evaluate(folded, x, MULTIPLY[form])
    message = f"{op!r}, {rows} rows"
    want = finish(product.astype(np.float64), epilogue, bias, residual)
    if form == BYTES and whole(folded):
        if epilogue == PLAIN:
            np.testing.assert_array_equal(found, product, err_msg=message)
        np.testing.assert_allclose(found, want, **tolerance("float32"), err_msg=message)
    # A sum in another order may be rounded to the other neighbour before the next product.
    assert np.linalg.norm(found - want) <= APART[form] * np.linalg.norm(want), message
    if epilogue == PLAIN and rows:
        exact = op.apply(x.astype(np.float64))
        assert np.linalg.norm(found - exact) < FOUND[form] * np.linalg.norm(exact), message


@every_form
def test_every_family_at_ragged_sizes(isa, form, rng, all_rounded):
    names = FAMILIES if (isa, form) == ("avx512", BYTES) else FAMILIES[1::3]
    check(isa, form, [*names, "vvma 24x36 k=4", "monarch 36x24 b=3"], rng)


@every_form
def test_sums_views_and_diagonals_around_products(isa, form, rng, all_rounded):
    names = ["product", "product of sums", "what is read, then a sum", "hadamard beside blocks"]
    check(isa, form, names, rng, rows=(5,))


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("name", sorted({str(case) for case in RAGGED} - set(FAMILIES)))
def test_every_other_ragged_family(isa, form, name, rng, all_rounded):
    check(isa, form, [name], rng)


@every_form
def test_every_epilogue(isa, form, rng, all_rounded):
    for epilogue in EPILOGUES:
        check(isa, form, ["lgp_dense 31x23 g=3"], rng, epilogue, rows=(5,))


@every_form
def test_the_parallel_form(isa, form, rng, all_rounded):
    check(isa, form, ["vvma 24x36 k=4"], rng, Epilogue(bias=True), rows=(37,), macs=1 << 30)


@every_form
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_rows_are_symbolic(isa, form, rows, rng, all_rounded):
    op, row = EXPRESSIONS["vvma 24x36 k=4"], isa_of(isa)
    program = lower(op, row.lanes, form=form)
    kernel = X86Kernels(row, threads=2).chain(program, PLAIN, 128, op.macs)
    compare(build(row, form, {"k": kernel.func})["k"], op, program, form, rows, rng)


@every_form
def test_every_choice_computes_the_same(isa, form, rng):
    row, rows = isa_of(isa), 43
    op = families.low_rank(rng.normal(size=(300, 17)) / 17, rng.normal(size=(17, 40)))
    program = lower(op, row.lanes, form=form)
    kernel = X86Kernels(row, threads=2).chain(program, PLAIN, rows, op.macs)
    made = {f"k{i}": kernel.space.build(rows, p) for i, p in enumerate(random_picks(rng, 4))}
    library = build(row, form, made)
    for name in made:
        compare(library[name], op, program, form, rows, rng)


@int8
def test_special_rows_stay_apart(rng, all_rounded):
    op = EXPRESSIONS["low_rank 24x36 r=5"]
    program = lower(op, 16, form=BYTES)
    kernel = X86Kernels(ISAS[0]).chain(program, PLAIN, 9, op.macs)
    x = rng.normal(size=(9, op.n_in)).astype(np.float32)
    x[1, 23], x[3, 2], x[5, 17] = np.nan, np.inf, -np.inf
    x[6], x[7], x[8] = 0, 1e-32, x[8] * 1e30
    function = build(ISAS[0], BYTES, {"k": kernel.func})["k"]
    found = call(function, [x, *weights_of(program)], 9, op.n_out)
    assert np.isnan(found[[1, 3, 5]]).all()
    assert not found[[6, 7]].any()
    rest = [0, 2, 4, 8]
    np.testing.assert_array_equal(found[rest], evaluate(fold(op), x[rest], in_int8))


@pytest.mark.isa(NEED[HALVES])
def test_odd_depths_do_not_read_what_lies_behind(rng, all_rounded):
    """Scratch memory that holds NaN: zero weights would not make it zero."""
    op = EXPRESSIONS["lgp_dense 31x23 g=3"]
    program = lower(op, 16, form=HALVES)
    kernel = X86Kernels(ISAS[0]).chain(program, PLAIN, 3, op.macs)
    function = build(ISAS[0], HALVES, {"k": kernel.func})["k"]
    weights = weights_of(program)
    for value in (np.nan, 1.0):
        x = np.full((3, op.n_in), value, np.float32)
        found = call(function, [x, *weights], 3, op.n_out)
        assert np.isnan(found).all() == np.isnan(value)


def test_blocks_are_rounded_with_a_scale_for_each_output(rng):
    w = rng.normal(size=(3, 10, 4)).astype(np.float32)
    w[1] *= 1000
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    error = np.abs(rounded_blocks(w) - w)
    assert (error <= scale / 2 * 1.001).all()
    assert error.any()


def test_small_blocks_stay_in_float():
    assert pays(BYTES, 32, 32)
    assert not pays(BYTES, 4, 4)
    assert not pays(BYTES, 1024, 1)
    assert pays(HALVES, 8, 8)
    assert not pays(HALVES, 128, 2)
    op = ops.BlockDiag(np.ones((4, 3, 64))) @ ops.Dense(np.ones((256, 40)))
    assert [p.form for p in lower(op, 16, form=BYTES).products] == ["float", BYTES]
    assert [p.form for p in lower(op, 16, form=HALVES).products] == [HALVES, HALVES]


def test_terms_of_a_sum_share_the_rounded_input(rng):
    op = ops.Dense(rng.normal(size=(64, 32))) + ops.Dense(rng.normal(size=(64, 32)))
    program = lower(op, 16, form=BYTES)
    assert [type(stage) for stage in program.stages].count(Round) == 1


TILES = {
    "columns of groups": dict(rows=3, groups=2, columns=2, a_group=7, c_group=96),
    "one row, one group": dict(rows=1, groups=1, columns=1, a_group=0, c_group=0),
    "onto old sums": dict(rows=2, groups=1, columns=3, a_group=0, c_group=0, clear=False),
    "over groups": dict(over=True, rows=3, columns=4, c_group=1),
    "over groups, shared": dict(over=True, rows=1, columns=2, c_group=1, shared=True),
}


def tile_of(lanes: int, form: str, case: dict) -> Tile:
    case, each = {"over": False, "shared": False, "clear": True, **case}, EACH[form]
    over, shared, columns = case.pop("over"), case.pop("shared"), case.pop("columns")
    width = columns * (1 if shared else lanes)
    case = {"groups": lanes, "a_group": each, **case}
    return Tile(
        **case, lanes=lanes, over_groups=over, columns=columns if over else columns * lanes,
        depth=((3, 21 * lanes * each), (5, lanes * each)), b_depth=(5 * width, width),
        b_column=(1 if shared else lanes) if over else 1, b_group=int(over and not shared),
        c_column=lanes if over else 1, a_row=9999, c_row=999, form=form,
        b_more=15 * width if form == BYTES else 0, s_row=2,
    )  # fmt: skip


@every_form
@pytest.mark.parametrize("name", TILES)
def test_description_and_implementation_of_a_tile_agree(isa, form, name, rng):
    row = isa_of(isa)
    tile = tile_of(row.lanes, form, TILES[name])
    described = product_alone(tile)
    schedule = tvm.s_tir.Schedule(described)
    schedule.tensorize(schedule.get_sblock("product"), product_tile(row, tile))
    if form == HALVES:  # what it calls comes with a chain
        assert "dpbf16ps" not in schedule.mod["main"].script()
        assert "tvmstruct_bf16_dot16" in schedule.mod["main"].script()
        return
    library = build(row, form, {"described": described, "implemented": schedule.mod["main"]})
    a = rng.integers(0, 256, size=tile.span[0]).astype(np.uint8)
    b = rng.integers(-(2**31), 2**31, size=tile.span[1]).astype(np.int32)
    # the last row of a panel is read as floats
    width = tile.b_depth[-1]
    b[tile.b_more : tile.b_more + width] //= 1 << 12
    b[tile.b_more + width :] = (
        rng.normal(size=len(b) - tile.b_more - width).astype(np.float32).view(np.int32)
    )
    c, s = (rng.normal(size=shape).astype(np.float32) for shape in tile.span[2:])
    results = []
    for function in ("described", "implemented"):
        out = tvm.runtime.tensor(c.copy())
        library[function](*map(tvm.runtime.tensor, (a, b)), out, tvm.runtime.tensor(s))
        results.append(out.numpy())
    assert not np.array_equal(results[0], c)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6 * float(np.abs(results[0]).max()))


@pytest.mark.parametrize(("form", "instruction"), [(BYTES, "vpdpbusd"), (HALVES, "vdpbf16ps")])
def test_the_inner_loop_is_dot_products_on_whole_registers(form, instruction):
    op = families.low_rank(np.ones((1024, 256), np.float32), np.ones((256, 1024), np.float32))
    kernel = X86Kernels(ISAS[0]).chain(lower(op, 16, form=form), PLAIN, 64, op.macs)
    assembly = build(ISAS[0], form, {"k": kernel.func}).inspect_source("asm")
    loop = busiest_loop(re.sub(r"^\.Ltmp\d+:.*\n", "", assembly, flags=re.M), instruction)
    loop = loop[: loop.index("\tj")]
    assert len(re.findall(rf"{instruction}.*zmm", loop)) >= 16
    assert not re.findall(r"\(%rsp\)|call", loop), "sums stay in registers, x is rounded before"


def test_exact_products_are_the_operator(rng):
    """The reference itself: without rounding it is `apply`."""
    for name in FAMILIES:
        op = EXPRESSIONS[name]
        x = rng.normal(size=(3, op.n_in)).astype(np.float32)
        bound = tolerance("float32", op.n_in, scale=scale_of(op, x))
        np.testing.assert_allclose(evaluate(fold(op), x, exactly), op.apply(x), **bound)
