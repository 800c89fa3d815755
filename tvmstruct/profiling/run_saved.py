"""Run a saved model on fixed random inputs, with one call counted: what callgrind simulates.

``python -m tvmstruct.profiling.run_saved model.tvms``
"""

from __future__ import annotations

import os
import sys

import tvmstruct
from tvmstruct.profiling.prepare import random_inputs
from tvmstruct.profiling.valgrind import Valgrind


def main(path: str) -> None:
    """Run the first bucket of the model at ``path`` twice: once to warm the caches."""
    model = tvmstruct.load(path)
    names = [spec.name for spec in model.inputs]
    shapes = dict(zip(names, next(iter(model.buckets)), strict=True))
    feeds = random_inputs(model.inputs, shapes, model.token_inputs, model.longest(shapes))
    bucket = model.buckets[tuple(shapes.values())]
    arrays = [feeds[name] for name in names]
    valgrind = Valgrind()
    valgrind.start()
    bucket.run(arrays)
    valgrind.zero()
    bucket.run(arrays)
    valgrind.stop()
    os._exit(0)  # valgrind writes what it counted; what Python tidies up takes it minutes


if __name__ == "__main__":
    main(*sys.argv[1:])
