# pyright: reportMissingImports=false
"""Rows of a word2ketXS table of order 2, looked up by ours, by PyTorch, and from a dense table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Work
from peers import OURS

from tvmstruct.embeddings import Word2KetXS
from tvmstruct.families.word2ket_xs import factor_sides
from tvmstruct.ops import Array

Call = Callable[[], Any]
TORCH_ROWS = ("torch-einsum", "torch-bmm")  # the same rows from the same factors
DENSE_ROWS = ("torch-gather", "tvmstruct-gather")  # from the whole table
OURS_CALL = "tvmstruct-call"  # a whole model, with its checks of ids and its result's memory


@dataclass(frozen=True)
class Lookup:
    """``rows`` random ids of a table of ``rank`` terms."""

    rows: int = 512
    vocabulary: int = 30522
    dimension: int = 384
    rank: int = 10

    def table(self) -> Word2KetXS:
        """Return the table with random factors."""
        rng = np.random.default_rng(0)
        sides = factor_sides(self.vocabulary, self.dimension, order=2, r=self.rank)
        factors = (rng.standard_normal((self.rank, *sides), np.float32) for _ in range(2))
        return Word2KetXS(tuple(factors), self.vocabulary, self.dimension)

    def ids(self) -> Array:
        """Return the ids."""
        return np.random.default_rng(1).integers(0, self.vocabulary, self.rows)

    @property
    def saving(self) -> float:
        """How many times smaller the factors are than the dense table."""
        return self.vocabulary * self.dimension / self.table().params

    def work(self) -> Work:
        """Count one multiply-add for each term of each feature, factors read once, rows written."""
        params = float(self.table().params)
        features = self.rows * self.dimension
        return Work(
            flops=2.0 * self.rank * features,
            weight_values=params,
            other_bytes=4.0 * features + 8.0 * self.rows,
            resident=params,
            saving=self.saving,
        )

    def contender(self, name: str, threads: int) -> Call:
        """Return what a contender calls."""
        if name in (OURS, "tvmstruct-gather"):
            return self._kernel(dense=name != OURS)
        return self._model() if name == OURS_CALL else self._torch(name, threads)

    def _kernel(self, *, dense: bool) -> Call:
        import tvm

        import tvmstruct
        from tvmstruct.schedules.compute.embedding import (
            EmbeddingSum,
            Rows,
            pack_table,
            tensors_of,
        )
        from tvmstruct.schedules.x86.embedding_rows import embedding_rows

        spec, table = tvmstruct.resolve_target("host"), self.table()
        term = Rows(self.vocabulary, "int64") if dense else tensors_of(table, "int64")
        kernel = embedding_rows(spec.isa, EmbeddingSum(self.dimension, (term,)))
        library = tvm.compile(tvm.IRModule({kernel.symbol: kernel.func}), target=spec.target).mod
        arrays = [self._dense()] if dense else pack_table(table)
        arguments = [tvm.runtime.tensor(a) for a in (*arrays, self.ids())]
        out, call = tvm.runtime.empty((self.rows, self.dimension)), library[kernel.symbol]
        call(*arguments, out)
        self._check(out.numpy())
        return lambda: call(*arguments, out)

    def _model(self) -> Call:
        import tvmstruct
        from tvmstruct.arrays import aligned_empty

        source = tvmstruct.from_onnx(self._onnx()).with_tables({"words": self.table()})
        model = tvmstruct.compile(source, buckets="exact")
        ids = aligned_empty((self.rows,), np.int64)
        ids[...] = self.ids()
        self._check(model(ids))
        return lambda: model(ids)

    def _onnx(self) -> bytes:
        """Return a gather from a table that takes another's place: its values do not matter."""
        from onnx import TensorProto, helper, numpy_helper

        empty = np.zeros((self.vocabulary, self.dimension), np.float32)
        graph = helper.make_graph(
            [helper.make_node("Gather", ["words", "ids"], ["y"])],
            "lookup",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [self.rows])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(empty, "words")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        return model.SerializeToString()

    def _torch(self, name: str, threads: int) -> Call:
        import torch

        torch.set_num_threads(threads)
        table, ids = self.table(), torch.from_numpy(self.ids())
        if name == "torch-gather":
            dense = torch.from_numpy(self._dense())
            return torch.inference_mode()(lambda: torch.nn.functional.embedding(ids, dense))
        left, right = (torch.from_numpy(f).transpose(0, 1).contiguous() for f in table.factors)
        columns = left.transpose(1, 2).contiguous()  # (t, q, rank): as bmm reads it
        base, q, p = right.shape[0], left.shape[2], right.shape[2]

        @torch.inference_mode()
        def call() -> Any:
            high, low = torch.div(ids, base, rounding_mode="floor"), ids % base
            if name == "torch-bmm":
                rows = torch.bmm(columns[high], right[low])
            else:
                rows = torch.einsum("nra,nrb->nab", left[high], right[low])
            return rows.reshape(self.rows, q * p)[:, : self.dimension]

        self._check(call().numpy())
        return call

    def _dense(self) -> Array:
        return self.table().rows(np.arange(self.vocabulary))

    def _check(self, found: Array) -> None:
        """Raise where a contender computes something else."""
        want = self.table().rows(self.ids())
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))
