"""PyTorch modules: torch.export at each bucket's shapes, then TVM's importer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmstruct.errors import (
    MissingDependencyError,
    ModelError,
    TvmstructError,
    UnsupportedOperatorError,
)
from tvmstruct.frontends import torch_lookup, torch_structured
from tvmstruct.frontends.relax import from_relax, secure_lookups
from tvmstruct.frontends.source import Dim, Shape, Source, TensorSpec, new_tensor
from tvmstruct.frontends.torch_recurrent import RecurrentLayers, decompose
from tvmstruct.frontends.validate import SMALL

Axes = Mapping[int, str]


def from_torch(
    model: Any,
    example_args: Sequence[Any] = (),
    *,
    dynamic_shapes: Mapping[str, Axes] | None = None,
) -> Source:
    """Return the ``Source`` of a torch ``Module`` or ``ExportedProgram``.

    ``dynamic_shapes`` names symbolic axes per argument, as ``{"x": {0: "batch"}}``; a module is
    exported again at every bucket's shapes. Without it the shapes of ``example_args`` are fixed.
    Weights carry their state-dict names.
    """
    torch = _load_torch()
    exported = isinstance(model, torch.export.ExportedProgram)
    if exported and dynamic_shapes:
        raise ModelError("dynamic_shapes needs the module itself: an ExportedProgram is fixed")
    if not exported and not isinstance(model, torch.nn.Module):
        raise ModelError(f"from_torch got {type(model).__name__}; give a Module or ExportedProgram")
    if not exported and not all(isinstance(a, torch.Tensor) for a in example_args):
        raise ModelError("example_args must be tensors; wrap other arguments in the module")
    program = model if exported else _export(torch, model, tuple(example_args))
    importer = _Importer(torch, program)
    first = from_relax(importer.module(program))
    inputs = _symbolic(first.inputs, dynamic_shapes or {})

    def build(shapes: dict[str, Shape]) -> tvm.IRModule:
        if all(shapes[s.name] == s.shape for s in first.inputs):
            return first.build(shapes)
        args = tuple(
            torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in first.inputs
        )
        return secure_lookups(importer.module(_export(torch, model, args)))[0]

    return Source(
        inputs=inputs,
        outputs=_outputs(first, inputs, build),
        tensors=importer.tensors,
        build=build,
        token_inputs=first.token_inputs,
        name=type(model).__name__,
    )


def _load_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(
            "from_torch needs PyTorch: pip install tvmstruct[torch]"
        ) from error


def _export(torch: Any, model: Any, args: tuple[Any, ...]) -> Any:
    if model.training:
        raise ModelError("the module is in training mode; call model.eval() first")
    try:
        with torch.no_grad():
            return torch.export.export(model, args)
    except Exception as error:
        shapes = [tuple(a.shape) for a in args]
        raise ModelError(f"torch.export fails at shapes {shapes}: {str(error)[:500]}") from error


class _Importer:
    """Imports exported programs of one model so that all share one copy of the weights."""

    def __init__(self, torch: Any, program: Any) -> None:
        self.torch = torch
        self.tensors: dict[str, tvm.runtime.Tensor] = {}
        for name, value in program.state_dict.items():
            if value.numel() > SMALL and value.dtype.is_floating_point:
                self.tensors[name] = new_tensor(_numpy(torch, value))
        self.recurrent = RecurrentLayers(partial(_numpy, torch), self.tensors)

    def module(self, program: Any) -> tvm.IRModule:
        """Import ``program`` and bind the shared weights."""
        from tvm.relax.frontend.torch import from_exported_program

        try:
            program = decompose(self.torch, program)
            mod = from_exported_program(
                program,
                keep_params_as_input=True,
                unwrap_unit_return_tuple=True,
                run_ep_decomposition=False,
                custom_convert_map={
                    **self.recurrent.converters(program),
                    **torch_lookup.CONVERTERS,
                    torch_structured.NAME: torch_structured.convert_structured,
                },
            )
        except TvmstructError:
            raise
        except (AssertionError, NotImplementedError) as error:
            raise UnsupportedOperatorError(f"the exported program: {error}") from error
        except Exception as error:
            raise ModelError(f"the exported program cannot be imported: {error}") from error
        self.recurrent.drop_sources()
        return self._bind(program, mod)

    def _bind(self, program: Any, mod: tvm.IRModule) -> tvm.IRModule:
        count = len(program.graph_signature.user_inputs)
        params = dict(program.named_parameters())
        binding = {}
        for var, (name, value) in zip(mod["main"].params[count:], params.items(), strict=True):
            if name in self.recurrent.taken:  # no longer read: any value will do
                binding[var] = tvm.runtime.empty(tuple(value.shape), var.ty.dtype.dtype)
                continue
            shared = self.tensors.get(name)
            binding[var] = new_tensor(_numpy(self.torch, value)) if shared is None else shared
        if binding:
            mod = relax.transform.BindParams("main", binding)(mod)
        main = mod["main"].without_attr("params").with_attr("num_input", count)
        mod = tvm.IRModule(mod.functions)
        mod.update_func(mod.get_global_var("main"), main)
        return relax.transform.DeadCodeElimination(["main"])(mod)


def _numpy(torch: Any, value: Any) -> np.ndarray:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _symbolic(
    inputs: tuple[TensorSpec, ...], dynamic: Mapping[str, Axes]
) -> tuple[TensorSpec, ...]:
    unknown = set(dynamic) - {s.name for s in inputs}
    if unknown:
        known = ", ".join(s.name for s in inputs)
        raise ModelError(f"dynamic_shapes names {sorted(unknown)}; the inputs are: {known}")
    specs = []
    for spec in inputs:
        axes = dynamic.get(spec.name, {})
        shape: tuple[Dim, ...] = tuple(axes.get(i, d) for i, d in enumerate(spec.shape))
        specs.append(TensorSpec(spec.name, spec.dtype, shape))
    return tuple(specs)


def _outputs(
    first: Source,
    inputs: tuple[TensorSpec, ...],
    build: Callable[[dict[str, Shape]], tvm.IRModule],
) -> tuple[TensorSpec, ...]:
    """Find output symbols by importing once more with every symbol one larger or more."""
    sizes: dict[str, int] = {}
    for spec, fixed in zip(inputs, first.inputs, strict=True):
        for dim, size in zip(spec.shape, fixed.shape, strict=True):
            if isinstance(dim, str) and isinstance(size, int):
                sizes[dim] = size
    if not sizes:
        return first.outputs
    grown = {s: n + 1 + i for i, (s, n) in enumerate(sizes.items())}
    shapes = {
        s.name: tuple(grown[d] if isinstance(d, str) else int(d or 1) for d in s.shape)
        for s in inputs
    }
    second = from_relax(build(shapes))
    return tuple(
        TensorSpec(a.name, a.dtype, _pair(a.shape, b.shape, sizes, grown))
        for a, b in zip(first.outputs, second.outputs, strict=True)
    )


def _pair(
    a: tuple[Dim, ...], b: tuple[Dim, ...], sizes: Mapping[str, int], grown: Mapping[str, int]
) -> tuple[Dim, ...]:
    dims: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        symbols = [s for s in sizes if sizes[s] == x and grown[s] == y]
        dims.append(symbols[0] if symbols else x if x == y else None)
    return tuple(dims)
