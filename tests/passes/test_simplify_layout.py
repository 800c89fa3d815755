# pyright: reportInvalidTypeForm=false
"""Reshapes and transposes that cancel, before and after."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tests import models
from tests.relax_modules import module, operators, random_inputs, transform
from tvmstruct.passes.simplify_layout import SimplifyLayout


@I.ir_module
class ReshapeOfReshape:
    @R.function
    def main(x: R.Tensor((2, 3, 4), "float32")) -> R.Tensor((4, 6), "float32"):
        with R.dataflow():
            a = R.reshape(x, (6, 4))
            b = R.reshape(a, (4, 6))
            R.output(b)
        return b


@I.ir_module
class OneReshape:
    @R.function
    def main(x: R.Tensor((2, 3, 4), "float32")) -> R.Tensor((4, 6), "float32"):
        with R.dataflow():
            b = R.reshape(x, (4, 6))
            R.output(b)
        return b


@I.ir_module
class TransposeOfTranspose:
    @R.function
    def main(x: R.Tensor((2, 3, 4, 5), "float32")) -> R.Tensor((5, 2, 4, 3), "float32"):
        with R.dataflow():
            a = R.permute_dims(x, axes=[0, 2, 1, 3])
            b = R.permute_dims(a, axes=[3, 0, 1, 2])
            R.output(b)
        return b


@I.ir_module
class OneTranspose:
    @R.function
    def main(x: R.Tensor((2, 3, 4, 5), "float32")) -> R.Tensor((5, 2, 4, 3), "float32"):
        with R.dataflow():
            b = R.permute_dims(x, axes=[3, 0, 2, 1])
            R.output(b)
        return b


@I.ir_module
class MovesOnes:
    @R.function
    def main(x: R.Tensor((1, 3, 1, 5), "float32")) -> R.Tensor((3, 1, 1, 5), "float32"):
        with R.dataflow():
            a = R.permute_dims(x, axes=[1, 0, 2, 3])
            R.output(a)
        return a


@I.ir_module
class ReshapesOnes:
    @R.function
    def main(x: R.Tensor((1, 3, 1, 5), "float32")) -> R.Tensor((3, 1, 1, 5), "float32"):
        with R.dataflow():
            a = R.reshape(x, (3, 1, 1, 5))
            R.output(a)
        return a


PAIRS = [
    (ReshapeOfReshape, OneReshape),
    (TransposeOfTranspose, OneTranspose),
    (MovesOnes, ReshapesOnes),
    (OneReshape, OneReshape),
]


@pytest.mark.parametrize(("before", "expected"), PAIRS)
def test_before_and_expected(before, expected):
    after, _ = transform(before, SimplifyLayout())
    tvm.ir.assert_structural_equal(after, expected)


def test_there_and_back_is_nothing():
    def body(emit, x):
        there = emit(tvm.relax.op.permute_dims(x, [0, 2, 1]))
        back = emit(tvm.relax.op.permute_dims(there))
        last = emit(tvm.relax.op.permute_dims(back, [2, 0, 1]))
        return tvm.relax.op.nn.relu(last)

    mod = module(body, (2, 3, 4))
    after, _ = transform(mod, SimplifyLayout(), SimplifyLayout())
    (x,) = random_inputs(mod)
    np.testing.assert_array_equal(models.run_module(mod, [x])[0], models.run_module(after, [x])[0])
    assert len(operators(after)) <= 2


@st.composite
def chains(draw):
    """Return a shape and a list of reshapes and transposes that fit it."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=1, max_size=4)))
    steps, now = [], shape
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            axes = draw(st.permutations(range(len(now))))
            steps.append(("permute", tuple(axes)))
            now = tuple(now[a] for a in axes)
        else:
            parts = [p for n in now for p in ((2, n // 2) if n % 2 == 0 and n > 2 else (n,))]
            merged = [1]
            for part in parts:
                if draw(st.booleans()):
                    merged.append(part)
                else:
                    merged[-1] *= part
            steps.append(("reshape", tuple(merged)))
            now = tuple(merged)
    return shape, steps


@settings(max_examples=40, deadline=None)
@given(chains())
def test_any_chain_gives_the_same_values(case):
    """Checked by running the operators in numpy, before and after, so without a compiler."""
    shape, steps = case

    def body(emit, x):
        for kind, what in steps:
            step = tvm.relax.op.permute_dims if kind == "permute" else tvm.relax.op.reshape
            x = emit(step(x, list(what)))
        return tvm.relax.op.nn.relu(x)

    mod = module(body, shape)
    after, _ = transform(mod, *[SimplifyLayout() for _ in range(3)])
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(_run(after, x), _run(mod, x))
    assert len(operators(after)) <= len(operators(mod))


def _run(mod, x):
    values = {mod["main"].params[0]: x}
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, tvm.relax.Call):
                values[binding.var] = values[value]
                continue
            array, out = values[value.args[0]], tuple(int(d) for d in binding.var.ty.shape)
            if value.op.name == "relax.permute_dims":
                axes = value.attrs.axes
                array = array.transpose(None if axes is None else [int(a) for a in axes])
            values[binding.var] = array.reshape(out)
            assert value.op.name != "relax.permute_dims" or array.shape == out
    return values[mod["main"].body.body]
