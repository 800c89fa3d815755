"""The attention kernel against float64 numpy, on every ISA that this machine has."""

import re

import numpy as np
import pytest
import tvm

from tests.attention_reference import as_rows, random_heads, reference
from tvmstruct.schedules.x86.attention import PARALLEL_FLOPS, Heads
from tvmstruct.schedules.x86.attention import attention as kernel
from tvmstruct.targets import ISAS, host_features

CPUS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "sse": "x86-64"}
TOLERANCE = 3e-6  # float32, sums of up to 512 terms of size 1
LOWEST = np.finfo("float32").min


def isa_params():
    missing = {isa.name: isa.needs - host_features() for isa in ISAS}
    return [
        pytest.param(
            isa,
            id=isa.name,
            marks=pytest.mark.skipif(bool(m := missing[isa.name]), reason=f"host lacks {m}"),
        )
        for isa in ISAS
    ]


every_isa = pytest.mark.parametrize("isa", isa_params())


def attention(isa, **heads):
    return kernel(Heads(isa, **heads))


def build(isa, func):
    target = tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa.name], "num-cores": 2})
    return tvm.compile(tvm.IRModule({"main": func}), target=target).mod


def run(isa, q, k, v, *, scale=0.3, mask=None, kind="none", **options):
    """Compile and call the kernel; inputs and result are (batch, heads, length, dim)."""
    (batch, heads, length, dim), value_dim = q.shape, v.shape[3]
    func = attention(
        isa, heads=heads, head_dim=dim, value_dim=value_dim, query_length=length,
        key_length=k.shape[2], q_layout=(heads * dim, 0), k_layout=(k.shape[1] * dim, 0),
        v_layout=(k.shape[1] * value_dim, 0), scale=scale, mask=kind, **options,
    )  # fmt: skip
    arrays = [as_rows(q), as_rows(k), as_rows(v), *([] if mask is None else [mask])]
    out = tvm.runtime.tensor(np.full((batch * length, heads * value_dim), 7, "float32"))
    build(isa, func)["main"](*map(tvm.runtime.tensor, arrays), out)
    return out.numpy().reshape(batch, length, heads, value_dim).transpose(0, 2, 1, 3)


# batch, heads, queries, keys, dim of q and k, dim of v
SIZES = [
    (2, 3, 7, 7, 20, 20),
    (1, 2, 1, 1, 32, 32),
    (3, 1, 1, 100, 32, 16),
    (1, 2, 100, 7, 8, 64),
    (2, 2, 33, 300, 20, 20),
    (2, 2, 5, 13, 7, 3),
]


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(isa, size):
    batch, heads, queries, keys, dim, value_dim = size
    q, k, v = random_heads(
        (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, value_dim)
    )
    got = run(isa, q, k, v, scale=dim**-0.5)
    np.testing.assert_allclose(got, reference(q, k, v, dim**-0.5), atol=TOLERANCE)


@every_isa
@pytest.mark.parametrize(("value", "keys"), [(-10000.0, 300), (LOWEST, 9), (-np.inf, 300)], ids=str)
def test_keys_mask(isa, keys, value):
    q, k, v = random_heads((3, 2, 20, 20), (3, 2, keys, 20), (3, 2, keys, 20))
    mask = np.zeros((3, keys), "float32")
    mask[0, keys // 2 :] = value
    mask[1, :-3] = value  # the first chunk is masked as a whole
    mask[2] = value  # and here every key
    got = run(isa, q, k, v, mask=mask, kind="keys")
    want = reference(q, k, v, 0.3, mask[:, None, None, :])
    # Next to -1e4 float32 scores are 1e-3 apart, and which way they round is a matter of order.
    np.testing.assert_allclose(got, want, atol=1e-3 if value == -10000.0 else TOLERANCE)
    if value == LOWEST:
        uniform = np.broadcast_to(v[2].mean(1, keepdims=True), got[2].shape)
        np.testing.assert_allclose(got[2], uniform, atol=TOLERANCE)


@every_isa
@pytest.mark.parametrize(
    "dims",
    [(), ("heads",), ("batch", "queries")],
    ids=str,
)
def test_full_mask(isa, dims):
    batch, heads, queries, keys = 2, 3, 21, 150
    q, k, v = random_heads(
        (batch, heads, queries, 16), (batch, heads, keys, 16), (batch, heads, keys, 16)
    )
    sizes = {"batch": batch, "heads": heads, "queries": queries}
    (mask,) = random_heads((*(n if d in dims else 1 for d, n in sizes.items()), keys), seed=1)
    mask[..., :140][mask[..., :140] > 0.5] = -np.inf
    if "queries" in dims:
        mask[..., 4, :] = -np.inf
    got = run(isa, q, k, v, mask=mask, kind="full", mask_dims=dims)
    np.testing.assert_allclose(got, reference(q, k, v, 0.3, mask), atol=TOLERANCE)
    if "queries" in dims:
        assert not got[:, :, 4].any()


@every_isa
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (40, 300)])
def test_causal(isa, queries, keys):
    q, k, v = random_heads((1, 2, queries, 16), (1, 2, keys, 16), (1, 2, keys, 16))
    got = run(isa, q, k, v, causal=True)
    np.testing.assert_allclose(got, reference(q, k, v, 0.3, causal=True), atol=TOLERANCE)
    mask = np.zeros((1, keys), "float32")
    mask[0, 5:] = LOWEST
    got = run(isa, q, k, v, causal=True, mask=mask, kind="keys")
    want = reference(q, k, v, 0.3, mask[:, None, None], causal=True)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@every_isa
def test_merged_qkv_buffer(isa):
    heads, dim, length, batch = 3, 20, 37, 2
    width = 3 * heads * dim
    (qkv,) = random_heads((batch * length, width))
    func = attention(
        isa, heads=heads, head_dim=dim, query_length=length, key_length=length, scale=0.2,
        q_layout=(width, 0), k_layout=(width, heads * dim), v_layout=(width, 2 * heads * dim),
    )  # fmt: skip
    merged, out = tvm.runtime.tensor(qkv), tvm.runtime.tensor(qkv[:, : heads * dim].copy())
    build(isa, func)["main"](merged, merged, merged, out)
    q, k, v = qkv.reshape(batch, length, 3, heads, dim).transpose(2, 0, 3, 1, 4)
    np.testing.assert_allclose(out.numpy(), as_rows(reference(q, k, v, 0.2)), atol=TOLERANCE)


@every_isa
@pytest.mark.parametrize("keys", [300])
def test_large_scores_stay_finite(isa, keys):
    q, k, v = random_heads((1, 1, 20, 16), (1, 1, keys, 16), (1, 1, keys, 16))
    q[0, 0, :, 0], k[0, 0, :, 0] = 1e17, np.linspace(-1e17, 1e17, keys)
    got = run(isa, q, k, v)
    np.testing.assert_allclose(got, np.broadcast_to(v[:, :, -1:], got.shape), atol=TOLERANCE)


@every_isa
@pytest.mark.parametrize("keys", [20, 300])
def test_nan_reaches_its_rows_and_no_other(isa, keys):
    q, k, v = random_heads((2, 2, 20, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    want = reference(q, k, v, 0.3)
    q[0, 0, 3, 5] = np.nan
    k[1, 0, 7, 2] = np.nan
    v[1, 1, 9, 4] = np.nan
    got = run(isa, q, k, v)
    nan = np.zeros(want.shape, bool)
    nan[0, 0, 3] = nan[1, 0] = nan[1, 1, :, 4] = True
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_allclose(got[~nan], want[~nan], atol=TOLERANCE)


def test_one_kernel_serves_every_batch():
    isa = next(isa for isa in ISAS if isa.needs <= host_features())
    heads, dim, length = 2, 16, 24
    layout = (heads * dim, 0)
    func = attention(
        isa, heads=heads, head_dim=dim, query_length=length, key_length=length, scale=0.25,
        q_layout=layout, k_layout=layout, v_layout=layout,
    )  # fmt: skip
    lib = build(isa, func)
    per_batch = 4 * heads * dim * length**2
    for batch in (0, 1, 3, PARALLEL_FLOPS // per_batch + 2):  # the last one runs in parallel
        q, k, v = random_heads(*[(batch, heads, length, dim)] * 3)
        out = tvm.runtime.tensor(np.zeros((batch * length, heads * dim), "float32"))
        lib["main"](*(tvm.runtime.tensor(as_rows(x)) for x in (q, k, v)), out)
        np.testing.assert_allclose(out.numpy(), as_rows(reference(q, k, v, 0.25)), atol=TOLERANCE)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("length", [16, 300])
def test_hot_loops_stay_in_registers(isa, length):
    layout = (64, 0)
    func = attention(
        isa, heads=2, head_dim=32, query_length=length, key_length=length, scale=0.2, mask="keys",
        q_layout=layout, k_layout=layout, v_layout=layout,
    )  # fmt: skip
    assembly = build(isa, func).inspect_source("asm")
    assert not re.findall(r"call\w*\s+\S*(?:exp|fma|max|min)", assembly)
    loops = [
        body for body in innermost_loops(assembly) if products(body) >= 8 and "max" not in body
    ]
    assert loops
    for body in loops:
        assert "call" not in body
        assert not re.search(r"mov\w+\s+%[xyz]mm\d+, [^%]", body), (
            body
        )  # accumulators are not stored


def innermost_loops(assembly):
    """Return the text of each loop whose body holds no other label."""
    lines, labels, loops = assembly.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels = {label[1]: number}  # an earlier label would enclose this one
        elif (jump := re.match(r"\s+j\w+\s+(\.LBB\w+)", line)) and jump[1] in labels:
            loops.append("\n".join(lines[labels[jump[1]] : number]))
    return loops


def products(body):
    return len(re.findall(r"fmadd\w*ps|mulps", body))


@every_isa
@pytest.mark.parametrize("keys", [30, 300])
def test_heads_of_q_share_those_of_k_and_v(isa, keys):
    (q,) = random_heads((2, 6, 21, 20))
    k, v = random_heads((2, 2, keys, 20), (2, 2, keys, 16), seed=1)
    func = attention(
        isa, heads=6, kv_heads=2, head_dim=20, value_dim=16, query_length=21, key_length=keys,
        q_layout=(120, 0), k_layout=(40, 0), v_layout=(32, 0), scale=0.3,
    )  # fmt: skip
    out = tvm.runtime.tensor(np.zeros((42, 96), "float32"))
    build(isa, func)["main"](*(tvm.runtime.tensor(as_rows(x)) for x in (q, k, v)), out)
    want = reference(q, k.repeat(3, 1), v.repeat(3, 1), 0.3)
    np.testing.assert_allclose(out.numpy(), as_rows(want), atol=TOLERANCE)


def test_rejects_heads_that_do_not_share_evenly():
    layout = (20, 0)
    with pytest.raises(ValueError, match="5 heads of q do not share 2 of k and v"):
        attention(
            ISAS[0], heads=5, kv_heads=2, head_dim=4, query_length=3, key_length=3, scale=1.0,
            q_layout=layout, k_layout=layout, v_layout=layout,
        )  # fmt: skip


def test_rejects_unknown_masks():
    isa, layout = ISAS[0], (8, 0)
    sizes = {"heads": 1, "head_dim": 8, "query_length": 4, "key_length": 4, "scale": 1.0}
    layouts = {"q_layout": layout, "k_layout": layout, "v_layout": layout}
    with pytest.raises(ValueError, match='mask is "rows", want'):
        attention(isa, **sizes, **layouts, mask="rows")
    with pytest.raises(ValueError, match="1 heads of q do not share 2 of k and v"):
        attention(isa, **sizes, **layouts, kv_heads=2)
    with pytest.raises(ValueError, match="unknown mask_dims"):
        attention(isa, **sizes, **layouts, mask="full", mask_dims=("keys",))
