"""The only file that names TVM symbols which move between releases."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

Constant = type(relax.const(0.0, "float32"))
Call = relax.Call
DPS = "relax.call_dps_packed"


def is_constant(expr: relax.Expr) -> bool:
    """Return whether an expression is a constant tensor."""
    return isinstance(expr, Constant) and isinstance(expr.value, tvm.runtime.Tensor)


def constant_tensor(expr: relax.Expr) -> tvm.runtime.Tensor:
    """Return the tensor inside a constant, not a copy."""
    return expr.value


def constant_array(expr: relax.Expr) -> np.ndarray:
    """Return the value of a constant, without a copy where DLPack can show it."""
    tensor = constant_tensor(expr)
    try:
        return np.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError):  # bfloat16 and the like
        return tensor.numpy()


def address(tensor: tvm.runtime.Tensor) -> int:
    """Return the address of a tensor's data: what identifies a weight through every pass."""
    return tensor.data_ptr()


def op_name(expr: relax.Expr) -> str:
    """Return the name of the operator that a call calls, or an empty string."""
    return expr.op.name if isinstance(expr, Call) and isinstance(expr.op, tvm.ir.Op) else ""


def external_symbol(expr: relax.Expr) -> str | None:
    """Return the external function that a call in destination-passing style names, or None."""
    if op_name(expr) != DPS or not hasattr(expr.args[0], "global_symbol"):
        return None
    return str(expr.args[0].global_symbol)


def tensor_type(shape: tuple[int, ...], dtype: str) -> relax.TensorType:
    """Return the Relax type of a static tensor."""
    return relax.TensorType(shape, dtype)


def type_of(expr: relax.Expr):
    """Return the Relax type of an expression."""
    return expr.ty


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """Return the shape of a tensor expression, or None where it is not all integers."""
    shape = getattr(type_of(expr), "shape", None)
    values = getattr(shape, "values", None)
    if values is None:
        return None
    sizes = tuple(getattr(v, "value", None) for v in values)
    return None if None in sizes else tuple(int(v) for v in sizes)


def result_shapes(call: relax.Call) -> list[tuple[int, ...]]:
    """Return the static shapes of what a call yields: of one tensor, or of each of a tuple."""
    ty = type_of(call)
    types = list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]
    return [tuple(int(d) for d in t.shape.values) for t in types]


def dtype_of(expr: relax.Expr) -> str:
    """Return the dtype of a tensor expression."""
    return str(getattr(type_of(expr), "dtype", ""))


def tune_context(mod: tvm.IRModule, target: tvm.target.Target):
    """Return MetaSchedule's context, which cost models read, without its constructor.

    That imports all of TVM's tensor intrinsics, which takes up to two minutes.
    """
    from tvm.s_tir.meta_schedule import TuneContext, _ffi_api
    from tvm.s_tir.meta_schedule.logging import get_logger, get_logging_func

    context = TuneContext.__new__(TuneContext)
    logging = get_logging_func(get_logger(__name__))
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext, mod, target, None, None, "main", 1, 0, logging
    )
    _ffi_api.TuneContextInitialize(context)
    return context
