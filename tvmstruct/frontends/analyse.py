"""What can be learnt from a graph before a shape is chosen: token inputs, outputs, limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnx import NodeProto

from tvmstruct.errors import ModelError
from tvmstruct.frontends.fold import Folded, fold, try_fold
from tvmstruct.frontends.nodes import attribute
from tvmstruct.frontends.source import Dim, Shape, TensorSpec, symbol_places
from tvmstruct.frontends.validate import Graph

PASSES = frozenset(
    "Cast Identity Reshape Squeeze Unsqueeze Transpose Expand Flatten Slice Split".split()
)
LONGEST = 1 << 16
PRIMES = ((2, 3, 5, 7, 11, 13, 17), (19, 23, 29, 31, 37, 41, 43))


def find_token_inputs(graph: Graph) -> dict[str, int]:
    """Return the integer inputs that index a table, with the number of ids it has rows for.

    An id that is divided first, as a factored table does, names several to a row.
    """
    roots = {s.name: s.name for s in graph.inputs if s.dtype.startswith(("int", "uint"))}
    shares: dict[str, int] = {}  # how many ids make one index, where more than one
    tokens: dict[str, int] = {}
    producers = {o: n for n in graph.nodes for o in n.output}
    for node in graph.nodes:
        if (root := _root_of(node, roots, producers)) is not None:
            roots.update(dict.fromkeys(node.output, root))
            shares[node.output[0]] = shares.get(node.input[0], 1)
        elif (by := _divisor(graph, node)) and node.input[0] in roots:
            roots[node.output[0]] = roots[node.input[0]]
            shares[node.output[0]] = by * shares.get(node.input[0], 1)
        if node.op_type == "Gather" and node.input[1] in roots:
            rows = _table_rows(graph, node)
            if rows is not None:
                name = roots[node.input[1]]
                rows *= shares.get(node.input[1], 1)
                tokens[name] = min(rows, tokens.get(name, rows))
    return tokens


def _divisor(graph: Graph, node: NodeProto) -> int:
    """Return the whole number above 0 that a node divides by, or 0."""
    if node.op_type != "Div":
        return 0
    by = graph.constants.get(node.input[1])
    if by is None or by.size != 1 or by.dtype.kind not in "iu":
        return 0
    return max(0, int(by.reshape(-1)[0]))


def _root_of(
    node: NodeProto, roots: Mapping[str, str], producers: Mapping[str, NodeProto]
) -> str | None:
    if not node.input:
        return None
    if node.op_type in PASSES:
        return roots.get(node.input[0])
    if node.op_type != "Where":
        return None
    condition, other = producers.get(node.input[0]), producers.get(node.input[1])
    root = roots.get(node.input[2])
    if condition is None or other is None or root is None:
        return None
    wraps = condition.op_type == "Less" and roots.get(condition.input[0]) == root
    adds = other.op_type == "Add" and root in (roots.get(i) for i in other.input)
    return root if wraps and adds else None


def _table_rows(graph: Graph, node: NodeProto) -> int | None:
    name, axis = node.input[0], attribute(node, "axis", 0)
    if name in graph.tensors:
        shape = tuple(int(d) for d in graph.tensors[name].shape)
    elif name in graph.constants:
        shape = graph.constants[name].shape
    else:
        return None
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def shapes_at(inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the input shapes where each symbol has the given size."""
    return {
        s.name: tuple(sizes[d] if isinstance(d, str) else int(d or 1) for d in s.shape)
        for s in inputs
    }


def _probe_sizes(graph: Graph) -> Iterator[dict[str, int]]:
    """Yield sizes to try: one prime per symbol, then one per axis, then all ones."""
    places = symbol_places(graph.inputs)
    orders = [list(range(len(places))), [spots[0][1] for spots in places.values()]]
    for order in orders:
        for primes in PRIMES:
            yield {s: primes[i % len(primes)] for s, i in zip(places, order, strict=True)}
    yield dict.fromkeys(places, 1)


def fold_at_probes(graph: Graph, tokens: Mapping[str, int]) -> list[tuple[dict[str, int], Folded]]:
    """Return one or two sets of sizes with the graph folded at each: two where any size may vary.

    Also the first real check of the model: it raises where no probe folds.
    """
    found: list[tuple[dict[str, int], Folded]] = []
    error: ModelError | None = None
    for sizes in _probe_sizes(graph):
        try:
            found.append((sizes, fold(graph, shapes_at(graph.inputs, sizes), tokens)))
        except ModelError as reason:
            error = reason
        if len(found) == 2 or (found and not sizes):
            break
    if not found:
        assert error is not None
        if not symbol_places(graph.inputs):
            raise error
        raise type(error)(
            f"{error}. No sizes that were tried fit this model; if it takes certain ones only, fix "
            "them: from_onnx(..., shapes={input: (size or name, ...)})"
        ) from error
    return found


def describe_outputs(
    graph: Graph, found: Sequence[tuple[dict[str, int], Folded]]
) -> tuple[TensorSpec, ...]:
    """Return the outputs with symbols, from the graph folded at two sets of sizes."""
    sizes = [s for s, _ in found]
    specs = []
    for spec in graph.outputs:
        shapes = [folded.shapes[folded.aliases[spec.name]] for _, folded in found]
        if len(set(map(len, shapes))) != 1:
            raise ModelError(f"output {spec.name!r} changes its rank with the input shapes")
        shape = tuple(_matched(values, sizes) for values in zip(*shapes, strict=True))
        specs.append(TensorSpec(spec.name, spec.dtype, shape))
    return tuple(specs)


def _matched(values: Sequence[int], sizes: Sequence[Mapping[str, int]]) -> Dim:
    """Return the symbol that has these values at these sizes, the one value, or None."""
    for symbol in sizes[0]:
        if len(sizes) > 1 and [s[symbol] for s in sizes] == list(values):
            return symbol
    fixed = len(set(values)) == 1 and (len(sizes) > 1 or not sizes[0])
    return values[0] if fixed else None


def find_length_inputs(
    graph: Graph, found: Sequence[tuple[dict[str, int], Folded]]
) -> dict[str, Dim]:
    """Return the inputs that say how many steps of each row a recurrent layer takes.

    With the dimension that bounds them; those for which none is found are left out.
    """
    steps = [_length_bounds(graph, folded) for _, folded in found]
    sizes = [s for s, _ in found]
    matched = {
        name: _matched([s[name] for s in steps], sizes)
        for name in steps[0]
        if all(name in s for s in steps)
    }
    return {name: dim for name, dim in matched.items() if dim is not None}


def _length_bounds(graph: Graph, folded: Folded) -> dict[str, int]:
    """Return the fewest steps of the layers that an input gives the lengths of."""
    producers = {o: n for n in folded.nodes for o in n.output}
    inputs = {s.name for s in graph.inputs}
    bounds: dict[str, int] = {}
    for node in folded.nodes:
        if (layer := graph.layers.get(node.name)) is None:
            continue
        x, root = node.input[0], node.input[1]
        while root in producers and producers[root].op_type in PASSES:
            root = producers[root].input[0]
        if root in inputs:
            steps = folded.shapes[x][1 if layer.batch_first else 0]
            bounds[root] = min(steps, bounds.get(root, steps))
    return bounds


def find_limits(graph: Graph, tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the largest accepted size per symbol, by bisection with the others small."""
    limits: dict[str, int] = {}
    probes = _probe_sizes(graph)
    base = next((s for s in probes if try_fold(graph, shapes_at(graph.inputs, s), tokens)), {})
    for symbol in base:
        low, high = base[symbol], LONGEST + 1

        def accepts(size: int, symbol: str = symbol) -> bool:
            shapes = shapes_at(graph.inputs, {**base, symbol: size})
            return try_fold(graph, shapes, tokens)

        if accepts(LONGEST):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if accepts(middle) else (low, middle)
        limits[symbol] = low
    return limits
