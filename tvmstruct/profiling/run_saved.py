"""Run a saved model some times on fixed random inputs: what cachegrind simulates.

``python -m tvmstruct.profiling.run_saved model.tvms 3``
"""

from __future__ import annotations

import sys

import tvmstruct
from tvmstruct.profiling.prepare import random_inputs


def main(path: str, calls: str) -> None:
    """Run the first bucket of the model at ``path`` as often as ``calls`` says."""
    model = tvmstruct.load(path)
    names = [spec.name for spec in model.inputs]
    shapes = dict(zip(names, next(iter(model.buckets)), strict=True))
    feeds = random_inputs(model.inputs, shapes, model.token_inputs, model.longest(shapes))
    bucket = model.buckets[tuple(shapes.values())]
    arrays = [feeds[name] for name in names]
    for _ in range(int(calls)):
        bucket.run(arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
