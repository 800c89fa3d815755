"""The command line: each command imports heavy modules when it is used."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvmstruct.calibration_option import CalibrationOption, calibrated
from tvmstruct.errors import InputError, PlanError, TvmstructError
from tvmstruct.model_argument import PREFIX, ModelArgument, parse_model
from tvmstruct.skip_option import LEGEND, Memory, SkipOption, chosen, skip_rows
from tvmstruct.vta.command import vta

if TYPE_CHECKING:
    from tvmstruct.energy_report import EnergyReport
    from tvmstruct.models import Config, Counts
    from tvmstruct.report import Report
    from tvmstruct.sentence import Spec
    from tvmstruct.skip_analysis import SkipStatistics

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

DEFAULT_LENGTHS = (16, 128)
FAILED, MISUSED = 1, 2

app = typer.Typer(
    help="Compile trained NLP models to small, fast ones.",
    epilog="Example: tvmstruct compile model.onnx -o model.tvms",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(vta, name="vta")

BUILT_IN = "or a built-in model such as 'random:bert?layers=2' (see tvmstruct models)"

Model = Annotated[
    ModelArgument,
    typer.Argument(
        metavar="MODEL",
        parser=parse_model,
        help=f"An .onnx file, a Hugging Face folder, a .tvms file or VTA package, {BUILT_IN}.",
    ),
]
SourceModel = Annotated[
    ModelArgument,
    typer.Argument(
        metavar="MODEL",
        parser=parse_model,
        help=f"An .onnx file, a Hugging Face folder, {BUILT_IN}.",
    ),
]
Target = Annotated[
    str, typer.Option(help="Where the model will run: host, llvm -mcpu=<name>, vta -config=<file>.")
]
Plan = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSON: which layer becomes what."),
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=AxB",
        help="Shape to compile for; naming an input again starts the next shape bucket.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of dense and structured layers: f32, bf16, bf16-weights or int8; the last three lose."
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Time each layer on random data; with --skip, say what it does."
    ),
]
EnergyOption = Annotated[
    bool, typer.Option("--energy", help="Estimate the bytes that a call moves and their energy.")
]
CachesOption = Annotated[
    str | None,
    typer.Option(
        metavar="L1,L2,L3", help="With --energy, such as 48K,2M,32M; default: this CPU's."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit 1 on an error of ours or of the system, 2 on misuse."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tvmstruct")
    except (TvmstructError, OSError) as error:
        sys.stderr.write(f"tvmstruct: {error}\n")
        sys.exit(FAILED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tvmstruct {version('tvmstruct')} (apache-tvm {version('apache-tvm')})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
) -> None:
    """Compile trained NLP models to small, fast ones."""


@app.command(
    "compile",
    epilog="Example: tvmstruct compile model.onnx -o model.tvms "
    "--shape input_ids=1x16 --shape input_ids=8x128 --skip 8",
)
def compile_model(
    model: SourceModel,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="What to write: a .tvms file, or for VTA a folder or a .zip."
        ),
    ],
    target: Target = "host",
    plan: Plan = None,
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL for some shapes and save it as one file, for VTA as a folder or a zip."""
    if model.compiled:
        raise typer.BadParameter(f"{model} is compiled already; give its .onnx file or folder")
    _check_folder(output)
    from tvmstruct.progress import working

    started = time.perf_counter()
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = _open(model, target, plan, threads, precision, **options)
    wanted = _parse_shapes(shape) or _own_buckets(model, compiled.inputs)
    buckets = _compile_buckets(compiled, wanted)
    with working(f"writing {output}"):
        compiled.save(output)
    size, seconds = _size(output), round(time.perf_counter() - started, 3)
    summary = {
        "output": str(output),
        "bytes": size,
        "seconds": seconds,
        "target": target,
        "buckets": [{name: list(dims) for name, dims in bucket.items()} for bucket in buckets],
    }
    if as_json:
        _print_json(summary | {"report": json.loads(compiled.report().to_json())})
    else:
        shapes = "; ".join(map(_describe, buckets))
        typer.echo(f"{output}: {size / 1e6:.1f} MB in {seconds:.1f} s, for {shapes}")
        typer.echo(f"what became of each layer: tvmstruct report {output}")


@app.command(
    epilog="Example: tvmstruct run model.tvms --input input_ids=ids.npy --output out.npz; or "
    "tvmstruct run model.onnx --random input_ids=1x128 --memory minimal"
)
def run(
    model: Model,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=FILE.npy", help="An input array; repeatable."),
    ] = None,
    random: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AxB",
            help="A made-up input: masks are ones, integers 0 to 99, floats normal; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to an .npz file.")
    ] = None,
    target: Target = "host",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run MODEL once and describe or save what comes out."""
    from tvmstruct.progress import working

    files, shapes = _named(inputs, "--input"), _merge(_parse_shapes(random, "--random"))
    made_up = model.config is not None and not files and not shapes
    if not files and not shapes and not made_up:
        raise typer.BadParameter("give the inputs: --input NAME=FILE.npy or --random NAME=AxB")
    _check_folder(output)
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = _open(model, target, None, threads, **options)
    feeds = {name: _read_array(name, Path(file)) for name, file in files}
    feeds |= _random_arrays(compiled.inputs, shapes)
    if made_up:
        feeds = model.config.inputs()
    with working(f"running {model}"):
        results = compiled.run(feeds)
    if output is not None:
        import numpy as np

        np.savez(output, **results)
    described = [_summary(name, array) for name, array in results.items()]
    if as_json:
        _print_json({"outputs": described})
    else:
        _print_table(described)


@app.command(
    epilog="Example: tvmstruct report model.tvms --html report.html; or, what skipping saves and "
    "loses, tvmstruct report 'random:bert?layers=1' --skip 8 --measure"
)
def report(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the table as a web page too.")
    ] = None,
    target: Target = "host",
    plan: Plan = None,
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    measure: Measure = False,
    energy: EnergyOption = False,
    caches: CachesOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say for every layer of MODEL what it became, what it costs, and why."""
    _check_folder(html)
    if energy and model.compiled:
        raise typer.BadParameter(f"{model} does not know what it moves; give its .onnx file")
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = _open(model, target, plan, threads, precision, **options)
    skipped: dict[str, SkipStatistics] = {}
    if not model.compiled:
        wanted = _parse_shapes(shape) or _own_buckets(model, compiled.inputs)[-1:]
        buckets = _compile_buckets(compiled, wanted)
        if measure and skip is not None:
            skipped = compiled.measure_skip(_typical(model, compiled, buckets[-1]))
    found = compiled.report(measure=True) if measure else compiled.report()
    if html is not None:
        title = f"<!doctype html><meta charset=utf-8><title>{Path(model.text).name}</title>"
        html.write_text(title + found._repr_html_(), encoding="utf-8")
    moved = _energy(compiled, caches, threads) if energy else None
    _show_report(found, _counts(model), moved, skipped, as_json=as_json)


def _show_report(
    found: Report,
    counts: Counts | None,
    moved: EnergyReport | None,
    skipped: Mapping[str, SkipStatistics],
    *,
    as_json: bool,
) -> None:
    """Print the table of layers and what else was asked for."""
    if as_json:
        more: dict[str, Any] = {} if counts is None else {"counts": counts.rows()}
        if moved is not None:
            more["energy"] = json.loads(moved.to_json())
        if skipped:
            more["skip"] = {name: asdict(statistics) for name, statistics in skipped.items()}
        _print_json(json.loads(found.to_json()) | more)
        return
    found.show()
    if counts is not None:
        typer.echo(f"parameters, norms and biases included: {counts}")
    if moved is not None:
        moved.show()
    if skipped:
        _print_table(skip_rows(skipped))
        typer.echo(LEGEND)


def _energy(compiled: Any, caches: str | None, threads: int | None) -> EnergyReport:
    """Return the energy report of the shapes that were compiled last."""
    from tvmstruct.caches import parse_caches

    known = None if caches is None else parse_caches(caches, threads or compiled.spec.threads)
    return compiled.energy(caches=known)


def _counts(model: ModelArgument) -> Counts | None:
    """Return the parameters of a built-in model by part."""
    if model.config is None:
        return None
    from tvmstruct import models

    return models.count(model.config)


@app.command(
    epilog="Example: tvmstruct tune model.onnx --shape input_ids=1x128 --trials 200 "
    "--database tuned/"
)
def tune(
    model: SourceModel,
    target: Target = "host",
    shape: ShapeOption = None,
    precision: Precision = "f32",
    trials: Annotated[
        int, typer.Option(help="Schedules to measure for each kernel and shape.")
    ] = 200,
    database: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of the records; kept and added to.")
    ] = Path("tuned"),
    tracker: Annotated[
        str | None,
        typer.Option(
            "--rpc-tracker", metavar="HOST:PORT", help="Measure on the servers of a TVM tracker."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--rpc-key", help="Which servers of the tracker.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    calibration: CalibrationOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure schedules of every kernel of MODEL, keep the best; an interrupted run goes on."""
    rpc = _tracker(tracker, key)
    options = calibrated(model, target, calibration)
    from tvmstruct.progress import working

    with working(f"reading {model}"):
        import tvmstruct

        source = model.source()
    wanted = _parse_shapes(shape) or _own_buckets(model, source.inputs)
    report = tvmstruct.tune(
        source,
        target,
        shapes=[complete(bucket, source.inputs) for bucket in wanted],
        precision=precision,
        trials=trials,
        database=database,
        rpc=rpc,
        seed=seed,
        **options,
    )
    if as_json:
        typer.echo(report.to_json())
    else:
        report.show()
        given = "" if precision == "f32" else f"precision={precision!r}, "
        how = f"compile(..., {given}database={str(database)!r})"
        typer.echo(f"records: {database}; use them with {how}")


def _tracker(address: str | None, key: str | None) -> tuple[str, int, str] | None:
    """Return (host, port, key) of --rpc-tracker and --rpc-key, which come together."""
    if address is None and key is None:
        return None
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdecimal() and key):
        raise typer.BadParameter("give both: --rpc-tracker HOST:PORT and --rpc-key KEY")
    return host, int(port), key


@app.command(
    "models",
    epilog="Example: tvmstruct models 'bert-s4x?layers=1&seq=64' -o bert.onnx; or, without a file, "
    "tvmstruct report 'random:bert-s4x?layers=1&seq=64'",
)
def list_models(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One model, with options after ? as key=value&...."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .onnx file to write NAME to.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the built-in models, which have random weights, or write one as ONNX."""
    if output is not None and name is None:
        raise typer.BadParameter("-o writes one model: say which, as in tvmstruct models bert -o")
    _check_folder(output)
    from tvmstruct import models

    try:
        wanted = list(models.names()) if name is None else [name.removeprefix(PREFIX)]
        configs = {text: models.parse(text) for text in wanted}
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if output is not None:
        _write_random(configs[wanted[0]], seed, output)
    rows = [_model_row(text, config) for text, config in configs.items()]
    if as_json:
        _print_json({"models": rows})
    else:
        _print_table([row | {"inputs": _described(row["inputs"])} for row in rows])


def _write_random(config: Config, seed: int, output: Path) -> None:
    from tvmstruct import models
    from tvmstruct.progress import working

    with working(f"writing {output}"):
        output.write_bytes(models.build(config, seed).SerializeToString())


def _model_row(text: str, config: Config) -> dict[str, Any]:
    """Return a row of the table of built-in models."""
    inputs = {name: list(shape) for name, shape in config.shapes().items()}
    return {"name": text, "what": config.title, "parameters": config.params, "inputs": inputs}


def _described(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


@app.command(epilog="Example: tvmstruct demo --json > demo.json")
def demo(as_json: AsJson = False) -> None:
    """Compile a real sentence encoder, check it and compare its speed with ONNX Runtime."""
    from tvmstruct.demo import run_demo, show

    result = run_demo()
    if as_json:
        _print_json(result.to_dict())
    else:
        show(result)


@app.command(
    epilog="Example: tvmstruct profile 'random:bert?layers=2' --sweep seq,hidden,ffn "
    "--html bert.html --csv bert.csv"
)
def profile(
    model: SourceModel,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="seq,hidden,ffn",
            help="Profile variants too, one size scaled in each; seq alone for a trained model.",
        ),
    ] = None,
    factor: Annotated[int, typer.Option(min=2, help="Of --sweep.")] = 4,
    mode: Annotated[
        str, typer.Option(help="Count too: cachestat (last-level misses) or custom (--events).")
    ] = "default",
    events: Annotated[
        str | None, typer.Option(metavar="cycles,dTLB-load-misses", help="With --mode custom.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write shares and roofline as PNG.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write plots and tables as a web page.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a line for each class.")
    ] = None,
    cachegrind: Annotated[
        bool, typer.Option("--cachegrind", help="Simulate the caches with valgrind; minutes.")
    ] = False,
    cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Last cache level that --cachegrind simulates.")
    ] = "2MB",
    target: Target = "host",
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    runs: Annotated[int | None, typer.Option(min=1, help="Runs that medians are over.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say where the time of MODEL goes, by operation class, and how near the roofline it is."""
    if model.compiled:
        raise typer.BadParameter(f"{model} is compiled already; give its .onnx file or folder")
    if cachegrind and (sweep or plot or html or csv or runs or threads or mode != "default"):
        raise typer.BadParameter(
            "--cachegrind only counts, one call of one thread: leave --sweep, --mode, --runs, "
            "--threads and files out"
        )
    if cachegrind and target != "host":
        raise typer.BadParameter(f"--cachegrind compiles for AVX2: leave --target {target} out")
    for output in (plot, html, csv):
        _check_folder(output)
    given = _parse_shapes(shape)
    if len(given) > 1:
        raise typer.BadParameter("--shape: profile takes one shape of each input")
    from tvmstruct.profiling import command
    from tvmstruct.profiling.plots import check_matplotlib

    if plot or html:
        check_matplotlib()  # now, not after minutes
    asked = command.Command(model)
    try:
        asked.check(_split(sweep), mode, _split(events))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    shapes = complete(given[0], asked.inputs) if given else None
    if cachegrind:
        found = asked.simulate(shapes, cache, {"precision": precision, "memory": memory})
        typer.echo(found.to_json() if as_json else str(found))
        return
    options = {"target": target, "precision": precision, "memory": memory, "threads": threads}
    profiles = asked.profile(shapes, factor, {**options, "runs": runs})
    command.write(profiles, plot, html, csv)
    command.show(profiles, as_json=as_json)


def _split(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in text.split(",")] if text else []


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_folder(output: Path | None) -> None:
    """Say at once, not after a minute of compiling, that the folder to write to is missing."""
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"{output}: there is no folder {output.parent}")


def _open(
    model: ModelArgument,
    target: str,
    plan: Path | None,
    threads: int | None,
    precision: str = "f32",
    **options: Any,
) -> Any:
    """Return the CompiledModel of MODEL, whatever it names."""
    from tvmstruct.progress import working

    with working(f"reading {model}"):
        import tvmstruct

        if model.compiled:
            return tvmstruct.load(model.path)
        options |= {} if precision == "f32" else {"precision": precision}
        return tvmstruct.compile(
            model.source(), target, plan=plan and _read_plan(plan), threads=threads, **options
        )


def _read_plan(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"--plan: {path} is not JSON ({error})") from error


def _compile_buckets(compiled: Any, wanted: list[Shapes]) -> list[Shapes]:
    """Compile ``compiled`` for every bucket and return them in full."""
    from tvmstruct.progress import working

    buckets = [complete(bucket, compiled.inputs) for bucket in wanted]
    for number, bucket in enumerate(buckets, 1):
        with working(f"compiling {_describe(bucket)} ({number} of {len(buckets)})"):
            compiled.compile_bucket(bucket)
    return buckets


def _own_buckets(model: ModelArgument, inputs: Sequence[Spec]) -> list[Shapes]:
    """Return the shape that a built-in model is configured for, or the default buckets."""
    return default_buckets(inputs) if model.config is None else [model.config.shapes()]


def default_buckets(inputs: Sequence[Spec]) -> list[Shapes]:
    """Return one row of 16 and of 128 tokens; the one bucket there is where nothing varies."""
    varies = any(isinstance(dim, str) for spec in inputs for dim in spec.shape)
    buckets: list[Shapes] = []
    for length in DEFAULT_LENGTHS if varies else DEFAULT_LENGTHS[:1]:
        sizes: dict[str, int] = {}
        for spec in inputs:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str):
                    sizes.setdefault(dim, 1 if axis == 0 else length)
        buckets.append({spec.name: _sized(spec, sizes) for spec in inputs})
    return buckets


def complete(bucket: Mapping[str, Shape], inputs: Sequence[Spec]) -> Shapes:
    """Return ``bucket`` with the inputs it leaves out, whose symbols the given ones fix."""
    known = {spec.name: spec for spec in inputs}
    sizes: dict[str, int] = {}
    for name, shape in bucket.items():
        if name not in known:
            raise InputError(f"--shape: no input {name!r}; the inputs are {', '.join(known)}")
        dims = known[name].shape
        if len(shape) != len(dims):
            raise InputError(
                f"--shape: {name} has rank {len(dims)}, {'x'.join(map(str, shape))} {len(shape)}"
            )
        sizes |= {dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str)}
    return {spec.name: bucket.get(spec.name) or _sized(spec, sizes) for spec in inputs}


def _sized(spec: Spec, sizes: Mapping[str, int]) -> Shape:
    for dim in spec.shape:
        if not isinstance(dim, int) and dim not in sizes:
            raise InputError(
                f"--shape: dimension {dim} of {spec.name} is open; add --shape {spec.name}=..."
            )
    return tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in spec.shape)


def _parse_shapes(texts: Iterable[str] | None, option: str = "--shape") -> list[Shapes]:
    """Return shape buckets: ``NAME=AxB`` in order, a name that comes again opens the next one."""
    buckets: list[Shapes] = []
    for name, text in _named(texts, option):
        try:
            shape = tuple(int(size) for size in text.split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise typer.BadParameter(f"{option} {name}={text}: want sizes like 1x128")
        if not buckets or name in buckets[-1]:
            buckets.append({})
        buckets[-1][name] = shape
    return buckets


def _merge(buckets: list[Shapes]) -> Shapes:
    if len(buckets) > 1:
        raise typer.BadParameter(f"--random names {next(iter(buckets[1]))} twice")
    return buckets[0] if buckets else {}


def _named(texts: Iterable[str] | None, option: str) -> list[tuple[str, str]]:
    """Split every ``NAME=VALUE``; names may hold ``=``, values may not."""
    pairs: list[tuple[str, str]] = []
    for text in texts or ():
        name, equals, value = text.rpartition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} {text}: want NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _read_array(name: str, path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{name}: {path} is not an .npy file ({error})") from error


def _random_arrays(inputs: Sequence[Spec], shapes: Shapes) -> dict[str, Any]:
    import numpy as np

    rng, known = np.random.default_rng(0), {spec.name: spec for spec in inputs}
    arrays: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise InputError(f"--random: no input {name!r}; the inputs are {', '.join(known)}")
        dtype = np.dtype(known[name].dtype)
        if dtype.kind == "b" or "mask" in name:
            arrays[name] = np.ones(shape, dtype)
        elif dtype.kind in "iu":
            arrays[name] = rng.integers(0, 100, shape).astype(dtype)
        else:
            arrays[name] = rng.standard_normal(shape).astype(dtype)
    return arrays


def _typical(model: ModelArgument, compiled: Any, shapes: Shapes) -> dict[str, Any]:
    """Return inputs of ``shapes``: a built-in model's own, or random ones without what may miss."""
    if model.config is not None and shapes == model.config.shapes():
        return model.config.inputs()
    optional = {*compiled.default_ones, *compiled.default_zeros}
    wanted = {name: shape for name, shape in shapes.items() if name not in optional}
    arrays = _random_arrays(compiled.inputs, wanted)
    for name, array in arrays.items():
        if array.dtype.kind in "iu":
            array %= compiled.token_inputs.get(name, 100)
    for name, steps in compiled.longest(shapes).items():
        arrays[name][...] = steps
    return arrays


def _summary(name: str, array: Any) -> dict[str, Any]:
    """Return name, dtype, shape and range of an output; null where the range is not finite."""
    import numpy as np

    values: dict[str, float | None] = dict.fromkeys(("min", "mean", "max"))
    if array.size and np.isfinite(array.astype("float64")).all():
        wide = array.astype("float64")
        values = {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
    return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), **values}


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0]) if rows else Table()
    for row in rows:
        cells = (f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def _describe(bucket: Shapes) -> str:
    """Return ``input_ids 1x128`` for a bucket: the first input stands for all."""
    name, shape = next(iter(bucket.items()))
    return f"{name} {'x'.join(map(str, shape))}"
