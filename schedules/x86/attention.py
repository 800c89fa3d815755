"""Exact fused attention on x86: ``softmax(scale * q @ k.T + mask) @ v`` with a running maximum.

The work is cut into (batch, head, tile of queries); `attention_tile` says what happens in one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tvmstruct.schedules import builder
from tvmstruct.schedules.registry import KERNEL
from tvmstruct.schedules.x86.attention_tile import Operands, Problem, View
from tvmstruct.schedules.x86.dynamic import hand_out
from tvmstruct.schedules.x86.query_tile import declare_tile
from tvmstruct.targets import Isa

PARALLEL_FLOPS = 500_000  # some 5 us on one core: below, waking a second one costs more
MASK_DIMS = ("batch", "heads", "queries")


@dataclass(frozen=True)
class Heads:
    """Attention of all heads on row buffers: the static side of every kernel around a tile.

    q, k and v are row buffers (batch * length, width); a layout is (width, offset): head h is
    columns ``offset + h * head_dim`` on, so that all three may be slices of one buffer. Query
    head h reads key and value head ``h // (heads // kv_heads)``; 0 is as many as queries have.
    The mask is added to the scaled scores: "keys" is (batch, key_length), "full" is (batch,
    heads, query_length, key_length) with extent 1 for what is not in ``mask_dims``. ``causal``
    hides key j from query i < j. A row whose scores are all -inf gives zeros.
    """

    isa: Isa
    heads: int
    head_dim: int
    query_length: int
    key_length: int
    scale: float
    q_layout: tuple[int, int]
    k_layout: tuple[int, int]
    v_layout: tuple[int, int]
    value_dim: int = 0  # 0: that of q and k
    mask: str = "none"
    mask_dims: Collection[str] = ("batch", "queries")
    causal: bool = False
    kv_heads: int = 0
    skip: tuple[float, bool] | None = None  # see `skipping`

    def __post_init__(self) -> None:
        if self.mask not in ("none", "keys", "full"):
            raise ValueError(f'attention: mask is "{self.mask}", want "none", "keys" or "full"')
        if unknown := set(self.mask_dims) - set(MASK_DIMS):
            raise ValueError(f"attention: unknown mask_dims {sorted(unknown)}, known: {MASK_DIMS}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"attention: {self.heads} heads of q do not share {self.kv_heads} of k and v "
                "evenly; heads must be a multiple of kv_heads"
            )

    @property
    def key(self) -> tuple:
        """What tells these heads from all others."""
        return (self.isa.name, *(getattr(self, f.name) for f in fields(self) if f.name != "isa"))

    @property
    def words(self) -> str:
        """The same but for the instruction set, for the key of a record."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "isa"}
        kept = {f.name: values[f.name] for f in fields(self)[1:] if values[f.name] != f.default}
        return " ".join(f"{name}={_plain(value)}" for name, value in kept.items())

    @property
    def width(self) -> int:
        """Features of a head's result."""
        return self.value_dim or self.head_dim

    @property
    def problem(self) -> Problem:
        """What one tile computes."""
        by_query = self.mask == "full" and "queries" in self.mask_dims
        return Problem(
            self.isa, self.head_dim, self.width, self.query_length, self.key_length, self.scale,
            self.mask != "none", by_query, self.causal, skip=self.skip,
        )  # fmt: skip

    @property
    def flops(self) -> int:
        """Floating point operations of the two products, for one element of the batch."""
        pairs = self.query_length * self.key_length
        return 2 * self.heads * pairs * (self.head_dim + self.width)

    def arguments(self) -> dict[str, tirx.Buffer]:
        """Declare q, k, v and the mask if there is one."""
        rows, key_rows = builder.symbol("rows"), builder.symbol("key_rows")
        buffers = {
            "q": builder.argument("q", (rows, self.q_layout[0])),
            "k": builder.argument("k", (key_rows, self.k_layout[0])),
            "v": builder.argument("v", (key_rows, self.v_layout[0])),
        }
        if self.mask != "none":
            buffers["mask"] = builder.argument("mask", self.mask_shape())
        return buffers

    def operands(self, buffers: dict, batch: Expr, head: Expr, start: Expr, out: View) -> Operands:
        """Return where the operands of a tile lie that starts at query ``start``."""
        shared = head // (self.heads // (self.kv_heads or self.heads))
        row, key_row = batch * self.query_length + start, batch * self.key_length
        return Operands(
            View(buffers["q"], row, head * self.head_dim + self.q_layout[1]),
            View(buffers["k"], key_row, shared * self.head_dim + self.k_layout[1]),
            View(buffers["v"], key_row, shared * self.width + self.v_layout[1]),
            out,
            self.mask_view(buffers, batch, head, start),
        )

    def mask_shape(self) -> tuple:
        """Return the mask's shape; its batch is a variable of its own or 1."""
        if self.mask == "keys":
            return builder.symbol("mask_batch"), self.key_length
        sizes = {"batch": None, "heads": self.heads, "queries": self.query_length}
        dims = [sizes[n] if n in self.mask_dims else 1 for n in MASK_DIMS]
        dims[0] = builder.symbol("mask_batch") if dims[0] is None else 1
        return (*dims, self.key_length)

    def mask_view(self, buffers: dict, batch: Expr, head: Expr, start: Expr) -> View | None:
        """Return the mask of a tile that starts at query ``start``, None without a mask."""
        if self.mask == "none":
            return None
        if self.mask == "keys":
            return View(buffers["mask"], batch)
        place = {"batch": batch, "heads": head, "queries": start}
        index = [place[n] if n in self.mask_dims else T.int64(0) for n in MASK_DIMS]
        return View(buffers["mask"], index[2], lead=tuple(index[:2]))


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def attention(h: Heads, threads: int = 1) -> PrimFunc:
    """Return the kernel ``(q, k, v[, mask], out)`` for a symbolic batch.

    ``out`` is (batch * query_length, heads * value_dim). With zero skipping, tiles go to
    whichever of ``threads`` threads is idle, else each thread has its share.
    """

    def body() -> None:
        buffers = h.arguments()
        rows = buffers["q"].shape[0]
        buffers["out"] = builder.argument("out", (rows, h.heads * h.width))
        _emit_tasks(h, buffers, rows // h.query_length, threads)

    func = builder.prim_func(body).with_attr("global_symbol", "attention")
    return func.with_attr("tirx.is_scheduled", True).with_attr(KERNEL, "attention")


def _emit_tasks(h: Heads, buffers: dict[str, tirx.Buffer], batch: Expr, threads: int) -> None:
    """Loop over (batch, head, tile); on one thread where the work is small."""
    tiles = -(-h.query_length // h.problem.tile)
    tasks = batch * (h.heads * tiles)

    def emit(task: Expr) -> None:
        head = task // tiles
        _emit_tile(h, buffers, head // h.heads, head % h.heads, task % tiles)

    def loop(kind: Callable) -> None:
        if h.skip is not None and kind is T.parallel:  # tiles skip more or less: uneven work
            hand_out(tasks, threads, emit)
            return
        with kind(T.int64(0), tasks) as task:
            emit(task)

    if h.flops >= PARALLEL_FLOPS:
        loop(T.parallel)
        return
    with T.If(batch * h.flops < PARALLEL_FLOPS):
        with T.Then():
            loop(T.serial)
        with T.Else():
            loop(T.parallel)


def _emit_tile(h: Heads, buffers: dict, batch: Expr, head: Expr, tile: Expr) -> None:
    problem = h.problem
    start = tile * problem.tile
    out = View(buffers["out"], batch * h.query_length + start, head * h.width)
    operands = h.operands(buffers, batch, head, start, out)
    emit_ragged(
        problem, tile, lambda queries: declare_tile(problem, operands, start, queries).attend()
    )


def emit_ragged(problem: Problem, tile: Expr, emit: Callable[[int], None]) -> None:
    """Emit a full tile, and the ragged last one where there is one."""
    full, rest = divmod(problem.query_length, problem.tile)
    if not full or not rest:
        emit(problem.tile if full else rest)
        return
    with T.If(tile < full):
        with T.Then():
            emit(problem.tile)
        with T.Else():
            emit(rest)
