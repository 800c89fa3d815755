"""Relax modules as sources: safe lookups, token inputs and stable weight names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.relax import dpl

from tvmstruct.errors import ModelError
from tvmstruct.frontends.source import SCALES_ATTR, WEIGHTS_ATTR, Dim, Shape, Source, TensorSpec
from tvmstruct.frontends.validate import SMALL

PASSES = frozenset(
    {"relax.astype", "relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.permute_dims"}
)


def from_relax(mod: tvm.IRModule) -> Source:
    """Return the ``Source`` of a Relax module: one bucket, at the shapes of its ``main``."""
    main = _main_function(mod)
    tensors = dict(mod.attrs[WEIGHTS_ATTR]) if _has_names(mod) else name_constants(main)
    scaled = mod.attrs is not None and SCALES_ATTR in mod.attrs
    inputs = tuple(_spec(p.name, p.ty) for p in main.params)
    for spec in inputs:
        if not all(isinstance(d, int) for d in spec.shape):
            raise ModelError(
                f"input {spec.name!r} has the symbolic shape {spec.shape}; bind it first with "
                "tvm.relax.transform.BindSymbolicVars"
            )
    safe, tokens = secure_lookups(mod)
    return Source(
        inputs=inputs,
        outputs=tuple(_spec(f"output_{i}", ty) for i, ty in enumerate(_output_types(main))),
        tensors=tensors,
        build=lambda shapes: safe,
        token_inputs=tokens,
        name="main",
        scales={str(n): t.numpy() for n, t in mod.attrs[SCALES_ATTR].items()} if scaled else {},
    )


def _main_function(mod: tvm.IRModule) -> relax.Function:
    names = [gv.name_hint for gv in mod.get_global_vars()]
    if "main" not in names or not isinstance(mod["main"], relax.Function):
        raise ModelError(f"the IRModule has no Relax function 'main', only {names}")
    return mod["main"]


def _has_names(mod: tvm.IRModule) -> bool:
    return mod.attrs is not None and WEIGHTS_ATTR in mod.attrs


def _output_types(main: relax.Function) -> list[relax.Type]:
    ty = main.ret_ty
    return list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]


def _spec(name: str, ty: relax.Type) -> TensorSpec:
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        raise ModelError(f"{name!r} is {ty}, not a tensor of known rank")
    dims: tuple[Dim, ...] = tuple(
        int(d) if isinstance(d, tvm.tirx.IntImm) else str(d) for d in ty.shape
    )
    return TensorSpec(name, str(ty.dtype), dims)


def name_constants(function: relax.Function) -> dict[str, tvm.runtime.Tensor]:
    """Name the weights of a function ``main.const_0``, ``main.const_1``, ... in order of use."""
    found: dict[str, tvm.runtime.Tensor] = {}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and expr.value.numel() > SMALL:
            if not any(t.same_as(expr.value) for t in found.values()):
                found[f"main.const_{len(found)}"] = expr.value

    relax.analysis.post_order_visit(function, visit)
    return found


def secure_lookups(mod: tvm.IRModule) -> tuple[tvm.IRModule, dict[str, int]]:
    """Clip every lookup whose index is not a constant or an input; return also those inputs."""
    main = mod["main"]
    roots: dict[relax.Var, str] = {p: p.name for p in main.params}
    tokens: dict[str, int] = {}
    unsafe: list[relax.Var] = []
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            op = _op_name(value)
            if op in PASSES and value.args[0] in roots:
                roots[binding.var] = roots[value.args[0]]
            if op == "relax.take" and not _check_take(value, roots, tokens):
                unsafe.append(binding.var)
    return _clip_takes(mod, tokens) if unsafe else mod, tokens


def _op_name(value: relax.Expr) -> str:
    is_op = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)
    return value.op.name if is_op else ""


def _check_take(call: relax.Call, roots: Mapping[relax.Var, str], tokens: dict[str, int]) -> bool:
    data, index = call.args
    rows = _rows(call)
    if str(call.attrs.mode) != "fast":
        return True
    if isinstance(index, tvm.ir.GenericConst):
        values = index.value.numpy()
        return bool(values.size == 0 or (values.min() >= 0 and values.max() < rows))
    if index in roots and isinstance(data, tvm.ir.GenericConst):
        tokens[roots[index]] = min(rows, tokens.get(roots[index], rows))
        return True
    return False


def _rows(call: relax.Call) -> int:
    shape = call.args[0].ty.shape
    axis = call.attrs.axis
    return int(shape[int(axis)]) if axis is not None else int(np.prod([int(d) for d in shape]))


def _clip_takes(mod: tvm.IRModule, tokens: Mapping[str, int]) -> tvm.IRModule:
    """Set ``mode="clip"`` on lookups (also on the proven ones: one pattern, same results)."""
    data, index = dpl.wildcard(), dpl.wildcard()
    pattern = dpl.is_op("relax.take")(data, index)

    def rewrite(call: relax.Call, matched: Mapping[dpl.DFPattern, relax.Expr]) -> relax.Expr:
        del matched
        if str(call.attrs.mode) != "fast":
            return call
        return relax.op.take(call.args[0], call.args[1], _axis(call), mode="clip")

    main = dpl.rewrite_call(pattern, rewrite, mod["main"])
    mod = tvm.IRModule(mod.functions, attrs=mod.attrs)
    mod.update_func(mod.get_global_var("main"), main)
    return mod


def _axis(call: relax.Call) -> int | None:
    return None if call.attrs.axis is None else int(call.attrs.axis)


__all__ = ["Shape", "from_relax", "name_constants", "secure_lookups"]
