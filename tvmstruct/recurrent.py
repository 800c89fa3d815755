"""Recurrent layers with structured matrices: LSTM, GRU and RNN, one direction of one layer.

``u_t = h_{t-1} @ hidden + hidden_bias`` meets ``z_t = x_t @ input + bias``, gate by gate:

* ``lstm``, gates i, f, g, o: ``c' = f * c + i * g`` and ``h' = o * tanh(c')`` of
  ``i, f, o = sigmoid(z + u + peephole * c)``, ``g = tanh(z + u)``; o sees c', not c;
* ``gru``, gates r, z, n: ``h' = (1 - z) * n + z * h`` of ``n = tanh(z_n + r * u_n)``, or of
  ``tanh(z_n + (r * h) @ hidden_n)`` unless ``reset_after``;
* ``rnn``, one gate: ``h' = tanh(z + u)``.

Gates are stacked in that order, PyTorch's, so that input and hidden matrices are one
``n_in x gates h`` operator each: AntMan's factors (Rajbhandari et al. 2019, Table 8) need that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.ops import Array, Op

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
DEFAULTS = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}
UNIT = frozenset({"sigmoid", "hardsigmoid"})  # activations from 0 to 1
SIGNED = UNIT | {"tanh", "softsign"}  # from -1 to 1
PARAMETERS: dict[str, tuple[float, ...]] = {  # alpha, beta that a name without them means
    "sigmoid": (),
    "tanh": (),
    "relu": (),
    "softsign": (),
    "softplus": (),
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}


@dataclass(frozen=True)
class Activation:
    """An activation by its ONNX name in small letters, with its alpha and beta.

    Raises UnsupportedOperatorError for a name that ONNX does not know, ModelError for a wrong
    number of parameters.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = PARAMETERS.get(self.name)
        if known is None:
            raise UnsupportedOperatorError(
                f"activation {self.name!r} is not known; known are {', '.join(PARAMETERS)}"
            )
        if len(self.parameters) > len(known):
            raise ModelError(
                f"activation {self.name!r} takes {len(known)} parameters, not {self.parameters}"
            )
        given = (*self.parameters, *known[len(self.parameters) :])
        object.__setattr__(self, "parameters", tuple(float(p) for p in given))

    def __call__(self, x: Array) -> Array:
        """Return the activation of each element."""
        return _ACTIVATIONS[self.name](x, *self.parameters)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


_ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softplus": lambda x: np.logaddexp(x, 0),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a: np.where(x < 0, a * x, x),
    "thresholdedrelu": lambda x, a: np.where(x > a, x, 0),
    "scaledtanh": lambda x, a, b: a * np.tanh(b * x),
    "hardsigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "elu": lambda x, a: np.where(x < 0, a * np.expm1(np.minimum(x, 0)), x),
}


@dataclass(frozen=True)
class Cell:
    """What one step does with the sums of its gates; all but the matrices and vectors.

    ``activations`` are those of the gates, the candidate (``lstm``, ``gru``) and the output
    (``lstm``). ``clip`` bounds every sum before its activation; ``coupled`` means
    ``f = 1 - i``; ``reverse`` runs from the last step to the first.
    """

    kind: str
    activations: tuple[Activation, ...] = ()
    clip: float | None = None
    reset_after: bool = True
    coupled: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise UnsupportedOperatorError(
                f"recurrent layer of kind {self.kind!r}; known are {', '.join(GATES)}"
            )
        defaults = tuple(map(Activation, DEFAULTS[self.kind]))
        if not self.activations:
            object.__setattr__(self, "activations", defaults)
        if len(self.activations) != len(defaults):
            raise ModelError(
                f"{self.kind}: {len(self.activations)} activations; want {len(defaults)}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ModelError(f"{self.kind}: clip={self.clip}; want more than 0")

    @property
    def gates(self) -> int:
        """Number of stacked gates."""
        return GATES[self.kind]

    @property
    def bounded(self) -> bool:
        """Whether no element of the state gets over 1, or over the first state's maximum."""
        inner = self.activations[:1] if self.kind == "rnn" else self.activations[1:]
        gates = () if self.kind == "rnn" else self.activations[:1]
        return all(a.name in UNIT for a in gates) and all(a.name in SIGNED for a in inner)

    @property
    def split_reset(self) -> bool:
        """Whether the last gate's sum needs the others' results first."""
        return self.kind == "gru" and not self.reset_after


@dataclass(frozen=True, eq=False)
class Recurrent:
    """One direction of a recurrent layer.

    ``input`` is an operator from ``n_in`` to ``gates * h``, ``hidden`` from ``h`` to
    ``gates * h``; ``bias`` and ``hidden_bias`` are (gates * h,) or None, ``peepholes`` (3, h)
    for i, f and o or None. With ``projection`` from ``h`` to ``n_out`` an ``lstm`` yields, and
    ``hidden`` takes, ``o * tanh(c') @ projection`` (Sak et al. 2014, PyTorch's ``proj_size``).
    Raises ModelError for shapes that do not go together.
    """

    cell: Cell
    input: Op
    hidden: Op
    bias: Array | None = None
    hidden_bias: Array | None = None
    peepholes: Array | None = None
    projection: Op | None = None

    def __post_init__(self) -> None:
        cell, h = self.cell, self.h
        want = cell.gates * h
        self._check_projection()
        for name, op in (("input", self.input), ("hidden", self.hidden)):
            if op.n_out != want:
                raise ModelError(
                    f"{cell.kind}: the {name} matrix yields {op.n_out} features; want "
                    f"{cell.gates} gates of {h} = {want}"
                )
        for name, array, shape in (
            ("bias", self.bias, (want,)),
            ("hidden_bias", self.hidden_bias, (want,)),
            ("peepholes", self.peepholes, (3, h)),
        ):
            if array is not None and array.shape != shape:
                raise ModelError(f"{cell.kind}: {name} has shape {array.shape}; want {shape}")
        if self.peepholes is not None and cell.kind != "lstm":
            raise ModelError(f"{cell.kind}: only an lstm has peepholes")

    def _check_projection(self) -> None:
        cell, projection = self.cell, self.projection
        if projection is None:
            return
        if cell.kind != "lstm":
            raise ModelError(f"{cell.kind}: only an lstm has a projection")
        if projection.n_out != self.hidden.n_in:
            raise ModelError(
                f"{cell.kind}: the projection yields {projection.n_out} features, the hidden "
                f"matrix takes {self.hidden.n_in}"
            )

    @property
    def h(self) -> int:
        """Hidden size: units of the cell."""
        return self.hidden.n_in if self.projection is None else self.projection.n_in

    @property
    def n_out(self) -> int:
        """Features of a step's result."""
        return self.hidden.n_in

    @property
    def n_in(self) -> int:
        """Features of a step's input."""
        return self.input.n_in

    @property
    def params(self) -> int:
        """Stored parameters: matrices, biases, peepholes."""
        vectors = (self.bias, self.hidden_bias, self.peepholes)
        matrices = sum(op.params for op in self._operators)
        return matrices + sum(v.size for v in vectors if v is not None)

    @property
    def macs(self) -> int:
        """Multiply-adds of the matrices for one step of one row."""
        return sum(op.macs for op in self._operators)

    @property
    def _operators(self) -> list[Op]:
        return [op for op in (self.input, self.hidden, self.projection) if op is not None]

    def apply(
        self,
        x: Array,
        h: Array | None = None,
        c: Array | None = None,
        lengths: Array | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """Return y (s, b, n_out), the last h (b, n_out) and c (b, h) of x (s, b, n_in).

        Row r takes its first ``lengths[r]`` steps; y is 0 after them, h and c are those of the
        last one taken, zeros where there is none, as in ONNX Runtime. c is None but for ``lstm``.
        """
        steps, rows = x.shape[:2]
        z = self.input.apply(x)
        if self.bias is not None:
            z = z + self.bias
        h = np.zeros((rows, self.n_out), z.dtype) if h is None else h.astype(z.dtype)
        c = np.zeros((rows, self.h), z.dtype) if c is None else c.astype(z.dtype)
        lengths = np.full(rows, steps) if lengths is None else np.asarray(lengths)
        y = np.zeros((steps, rows, self.n_out), z.dtype)
        for t in range(steps):
            active = np.flatnonzero(t < lengths)
            at = lengths[active] - 1 - t if self.cell.reverse else np.full(len(active), t)
            new_h, new_c = self.step(z[at, active], h[active], c[active])
            y[at, active] = h[active] = new_h
            c[active] = new_c
        h[lengths < 1] = c[lengths < 1] = 0
        return y, h, c if self.cell.kind == "lstm" else None

    def step(self, z: Array, h: Array, c: Array) -> tuple[Array, Array]:
        """Return h' and c' (c itself but for ``lstm``) of z (b, gates * h), h and c."""
        cell = self.cell
        u = self.hidden.apply(h)
        if self.hidden_bias is not None:
            u = u + self.hidden_bias
        z, u = (v.reshape(*v.shape[:-1], cell.gates, self.h) for v in (z, u))
        act = cell.activations
        if cell.kind == "lstm":
            p = np.zeros((3, self.h), z.dtype) if self.peepholes is None else self.peepholes
            total = z + u
            i = act[0](self._clip(total[:, 0] + p[0] * c))
            f = 1 - i if cell.coupled else act[0](self._clip(total[:, 1] + p[1] * c))
            new_c = f * c + i * act[1](self._clip(total[:, 2]))
            o = act[0](self._clip(total[:, 3] + p[2] * new_c))
            new_h = o * act[2](new_c)
            return new_h if self.projection is None else self.projection.apply(new_h), new_c
        if cell.kind == "rnn":
            return act[0](self._clip(z[:, 0] + u[:, 0])), c
        r, keep = (act[0](self._clip(z[:, k] + u[:, k])) for k in (0, 1))
        if cell.reset_after:
            inner = r * u[:, 2]
        else:
            inner = self.hidden.apply(r * h)[..., 2 * self.h :]
            if self.hidden_bias is not None:
                inner = inner + self.hidden_bias[2 * self.h :]
        n = act[1](self._clip(z[:, 2] + inner))
        return (1 - keep) * n + keep * h, c

    def _clip(self, x: Array) -> Array:
        return x if self.cell.clip is None else np.clip(x, -self.cell.clip, self.cell.clip)
