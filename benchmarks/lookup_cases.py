# pyright: reportMissingImports=false
"""Cases of LookupFFN: a feed-forward block against its lookup form, BH4 alone, the gather alone.

The peers run the dense layers that the structured form replaces; ours gets fresh inputs in turn
where few tokens would otherwise find their rows in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Work
from transformer_cases import Feeds, Graph

from tvmstruct.ops import Array, Op

FEW, INPUTS = 64, 1024  # up to so many tokens, so many of them in turn: all rows of tables
SLICE = 8 * 128 * 2  # bytes of 8 tables' rows in a slice of two cache lines, on two threads


@dataclass(frozen=True)
class LookupFfn:
    """``rows`` tokens through ``h`` tables of 2**tau rows, BH4 with blocks of ``block``.

    The peers' layer is d, ``inner``, d with GELU.
    """

    rows: int
    d: int
    inner: int
    h: int
    tau: int
    block: int

    def work(self) -> Work:
        """Count the hash and the gather; rows of tables come from where a slice of them lies."""
        op = random_bh4(self.d, self.h * self.tau, self.block)
        gathered = self.rows * self.h * self.d
        return Work(
            flops=2.0 * self.rows * op.macs + 2.0 * gathered,
            weight_values=op.params,
            other_bytes=4.0 * self.rows * 2 * self.d + 4.0 * gathered,
            resident=op.params,
            saving=2 * self.d * self.inner / (op.macs + self.h * self.d),
            working_set=SLICE << self.tau if self.rows > FEW else None,
        )

    def feeds(self) -> Feeds:
        """Return random tokens."""
        return {"x": np.random.default_rng(0).standard_normal((self.rows, self.d), np.float32)}

    def model(self) -> tuple[bytes, Feeds]:
        """Return the dense block as an ONNX model, and its inputs."""
        graph = Graph({"w1": weight(self.d, self.inner), "w2": weight(self.inner, self.d)})
        scalars = {"root": 2**0.5, "one": 1.0, "half": 0.5}
        graph.constants |= {name: np.float32(value) for name, value in scalars.items()}
        u = graph.node("MatMul", "x", "w1")
        erf = graph.node("Add", graph.node("Erf", graph.node("Div", u, "root")), "one")
        gelu = graph.node("Mul", graph.node("Mul", u, erf), "half")
        feeds = self.feeds()
        return graph.finish(graph.node("MatMul", gelu, "w2"), feeds), feeds

    def torch(self, *, bf16: bool = False) -> Callable[[], Any]:
        """Return PyTorch's dense block."""
        import torch
        from torch.nn.functional import gelu, linear

        dtype = torch.bfloat16 if bf16 else torch.float32
        weights = (weight(self.d, self.inner), weight(self.inner, self.d))
        w1, w2 = (torch.from_numpy(np.ascontiguousarray(w.T)).to(dtype) for w in weights)
        x = torch.from_numpy(self.feeds()["x"]).to(dtype)
        return torch.inference_mode()(lambda: linear(gelu(linear(x, w1)), w2))

    def source(self) -> Any:
        """Return the lookup form for ours."""
        from tvmstruct.frontends.lookup import emit_lookup
        from tvmstruct.lookup import Lookup

        projection = random_bh4(self.d, self.h * self.tau, self.block)
        lookup = Lookup(projection, random_tables(self), bias=np.zeros(self.d, np.float32))
        return module(self.rows, self.d, lambda bb, x: emit_lookup(bb, x, lookup))


@dataclass(frozen=True)
class Bh4:
    """``rows`` tokens through BH4 from n_in to n_out, against a dense layer of that shape."""

    rows: int
    n_in: int
    n_out: int
    block: int

    def work(self) -> Work:
        """Count multiply-adds; butterflies are additions and not in the bound."""
        op = random_bh4(self.n_in, self.n_out, self.block)
        return Work(
            flops=2.0 * self.rows * op.macs,
            weight_values=op.params,
            other_bytes=4.0 * self.rows * (self.n_in + self.n_out),
            resident=op.params,
            saving=self.n_in * self.n_out / op.macs,
        )

    def feeds(self) -> Feeds:
        """Return random tokens."""
        return {"x": np.random.default_rng(0).standard_normal((self.rows, self.n_in), np.float32)}

    def model(self) -> tuple[bytes, Feeds]:
        """Return the dense layer as an ONNX model, and its inputs."""
        graph, feeds = Graph({"w": weight(self.n_in, self.n_out)}), self.feeds()
        return graph.finish(graph.node("MatMul", "x", "w"), feeds), feeds

    def torch(self) -> Callable[[], Any]:
        """Return PyTorch's dense layer."""
        import torch

        w = torch.from_numpy(np.ascontiguousarray(weight(self.n_in, self.n_out).T))
        x = torch.from_numpy(self.feeds()["x"])
        return torch.inference_mode()(lambda: torch.nn.functional.linear(x, w))

    def source(self) -> Any:
        """Return the structured layer for ours."""
        from tvmstruct.frontends.lookup import emit_operator

        op = random_bh4(self.n_in, self.n_out, self.block)
        return module(self.rows, self.n_in, lambda bb, x: emit_operator(bb, x, op))


@dataclass(frozen=True)
class Gather:
    """The tables of a `LookupFfn` alone on given hashed features: codes, scores, gathers, sums.

    With ``hashed`` codes and scores are given too, and what is left are the gathers and sums.
    """

    rows: int
    d: int
    h: int
    tau: int
    hashed: bool = False

    def work(self) -> Work:
        """Count the bytes gathered, which come from the slice of tables that tokens pass over."""
        return Work(
            flops=2.0 * self.rows * self.h * self.d,
            weight_values=0.0,
            other_bytes=4.0 * self.rows * self.h * self.d,
            resident=0.0,
            working_set=SLICE << self.tau,
        )

    def source(self) -> Any:
        """Return the module for ours, whose projection is an identity that costs nothing."""
        from tvmstruct.frontends.lookup import emit_lookup
        from tvmstruct.lookup import Lookup
        from tvmstruct.ops import Permute

        width = self.h * self.tau
        lookup = Lookup(Permute((width,), (0,)), random_tables(self))
        return module(self.rows, width, lambda bb, x: emit_lookup(bb, x, lookup))

    def kernel(self, threads: int) -> Callable[[], Any]:
        """Return the kernel's gathers alone, each thread with codes of its own."""
        import tvm

        import tvmstruct
        from tvmstruct.schedules.compute.dense import Epilogue
        from tvmstruct.schedules.compute.hash_tables import Tables
        from tvmstruct.schedules.x86.hash_tables import gather_alone, laid_out
        from tvmstruct.weights import WeightStore

        spec = tvmstruct.resolve_target("host")
        tables = Tables(self.h, self.tau, self.d, 0, True, "f32", Epilogue())
        func, chunk = gather_alone(spec.isa, tables, self.rows, threads)
        library = tvm.compile(
            tvm.IRModule({"gather": func.with_attr("global_symbol", "gather")}), target=spec.target
        ).mod
        rng, base = np.random.default_rng(4), np.arange(self.h, dtype=np.int32) << self.tau
        codes = rng.integers(0, 1 << self.tau, (threads, chunk, self.h), np.int32) + base
        scores = rng.random((threads, chunk, self.h), np.float32)
        given = [np.stack([laid_out(tables, one) for one in a]) for a in (codes, scores)]
        given += tables.pack(random_tables(self), spec.isa.lanes).values()
        store = WeightStore()  # as a model keeps its tables: on large pages
        arguments = [store.tensor(str(i), lambda a=a: a) for i, a in enumerate(given)]
        y, call = tvm.runtime.empty((self.rows, self.d)), library["gather"]
        return lambda: call(*arguments, y)

    def feeds(self) -> Feeds:
        """Return random hashed features."""
        shape = (self.rows, self.h * self.tau)
        return {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}


LookupCase = LookupFfn | Bh4 | Gather


def module(rows: int, n_in: int, body: Callable[..., Any]) -> Any:
    """Return a Relax module of ``x`` (rows, n_in)."""
    from tvm import relax

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, n_in), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(body(bb, x))
        bb.emit_func_output(out)
    return bb.get()


def random_tables(case: LookupFfn | Gather) -> Array:
    """Return tables of normal entries."""
    shape = (case.h, 1 << case.tau, case.d)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def random_bh4(n_in: int, n_out: int, block: int) -> Op:
    """Return a BH4 operator with random blocks that keeps the size of its input."""
    from tvmstruct import families
    from tvmstruct.ops import next_power_of_two

    width = next_power_of_two(n_in)
    shape = (-(-n_out // width), 4, width // block, block, block)
    blocks = np.random.default_rng(2).standard_normal(shape, np.float32)
    return families.bh4(blocks / np.float32((block * width) ** 0.5), n_in, n_out)


def weight(k: int, n: int) -> Array:
    """Return a random weight that keeps the size of its input."""
    return np.random.default_rng(k).standard_normal((k, n), np.float32) / np.float32(k**0.5)
