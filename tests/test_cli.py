"""The command line against a fake compiler: options, output, exit codes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tvmstruct
from tvmstruct import cli, models, progress
from tvmstruct.commands.shapes import complete, default_buckets
from tvmstruct.errors import InputError, ModelError
from tvmstruct.skip_analysis import SkipStatistics
from tvmstruct.skipping import Skip


class FakeReport:
    def to_json(self):
        return '{"layers": []}'

    def show(self):
        sys.stdout.write("the report\n")

    def _repr_html_(self):
        return "<table></table>"


class FakeModel:
    inputs = (
        SimpleNamespace(name="input_ids", dtype="int64", shape=("batch", "length")),
        SimpleNamespace(name="attention_mask", dtype="int64", shape=("batch", "length")),
        SimpleNamespace(name="scale", dtype="float32", shape=("batch", 3)),
    )

    default_ones, default_zeros, token_inputs = ("attention_mask",), (), {"input_ids": 7}

    def longest(self, shapes):
        return {}

    def __init__(self):
        self.buckets, self.feeds, self.options = [], {}, {}

    def compile_bucket(self, shapes):
        self.buckets.append(shapes)

    def run(self, feeds):
        self.feeds = feeds
        return {"sum": feeds["input_ids"].sum(axis=1), "nan": np.array([np.nan, 1.0])}

    def report(self, measure=False):
        return FakeReport()

    def measure_skip(self, feeds):
        self.feeds = feeds
        busy = {"head-first": 0.4, "chunk-first": 0.5, "random": 0.6, "dynamic": 0.9}
        return {"attention.0": SkipStatistics(0.71, 0.45, 1.2e-3, 0.999, 0.25, busy, 32, 12, 48)}

    def save(self, path):
        path.write_bytes(b"compiled")


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()

    def compile_source(source, target="host", **options):
        fake.options = {"source": source, "target": target, **options}
        return fake

    monkeypatch.setattr(tvmstruct, "from_onnx", lambda path: ("onnx", path), raising=False)
    monkeypatch.setattr(tvmstruct, "from_pretrained", lambda path: ("hf", path), raising=False)
    monkeypatch.setattr(tvmstruct, "compile", compile_source, raising=False)
    monkeypatch.setattr(tvmstruct, "load", lambda path: fake, raising=False)
    return fake


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    return path


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # or messages are broken into lines

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_info.value.code, out=captured.out, err=captured.err)

    return run


ONE = {"input_ids": (1, 16), "attention_mask": (1, 16), "scale": (1, 3)}
TWO = {"input_ids": (8, 128), "attention_mask": (8, 128), "scale": (8, 3)}


def test_compile_saves_the_buckets_named(model, onnx_file, tmp_path, call):
    out = tmp_path / "out.tvms"
    shapes = ["--shape", "input_ids=1x16", "--shape", "input_ids=8x128"]
    result = call("compile", onnx_file, "-o", out, "--target", "llvm -mcpu=znver2", *shapes)
    assert result.code == 0
    assert model.buckets == [ONE, TWO]
    assert model.options["target"] == "llvm -mcpu=znver2"
    assert model.options["source"] == ("onnx", onnx_file)
    assert out.read_bytes() == b"compiled"
    assert str(out) in result.out


def test_compile_without_shapes_has_default_buckets(model, onnx_file, tmp_path, call):
    assert call("compile", onnx_file, "-o", tmp_path / "out.tvms").code == 0
    assert [bucket["input_ids"] for bucket in model.buckets] == [(1, 16), (1, 128)]


def test_compile_prints_json(model, onnx_file, tmp_path, call):
    result = call("compile", onnx_file, "-o", tmp_path / "out.tvms", "--json")
    summary = json.loads(result.out)
    assert summary["bytes"] == 8
    assert summary["report"] == {"layers": []}
    assert summary["buckets"][0]["scale"] == [1, 3]


def test_compile_takes_a_folder_and_a_plan(model, tmp_path, call):
    plan = tmp_path / "plan.json"
    plan.write_text('{"layers": {}}')
    result = call("compile", tmp_path, "-o", tmp_path / "out.tvms", "--plan", plan)
    assert result.code == 0
    assert model.options["source"] == ("hf", tmp_path)
    assert model.options["plan"] == {"layers": {}}


def test_a_plan_that_is_not_json_is_an_error(model, onnx_file, tmp_path, call):
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    result = call("compile", onnx_file, "-o", tmp_path / "out.tvms", "--plan", plan)
    assert (result.code, "plan.json is not JSON" in result.err) == (1, True)


def test_run_reads_and_writes_arrays(model, onnx_file, tmp_path, call):
    np.save(tmp_path / "ids.npy", np.arange(6).reshape(2, 3))
    result = call(
        *("run", onnx_file, "--input", f"input_ids={tmp_path / 'ids.npy'}"),
        *("--random", "attention_mask=2x3", "--random", "scale=2x3"),
        *("--output", tmp_path / "out.npz", "--json"),
    )
    assert result.code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["sum"], [3, 12])
    described = {row["name"]: row for row in json.loads(result.out)["outputs"]}
    assert described["sum"] == {
        **{"name": "sum", "dtype": "int64", "shape": [2], "min": 3.0, "mean": 7.5, "max": 12.0}
    }
    assert described["nan"]["max"] is None
    assert (model.feeds["attention_mask"] == 1).all()
    assert model.feeds["scale"].dtype == np.float32


def test_run_prints_a_table(model, tmp_path, call):
    saved = tmp_path / "model.tvms"
    saved.write_bytes(b"")
    result = call("run", saved, "--random", "input_ids=2x3")
    assert result.code == 0
    assert "sum" in result.out


def test_report_as_text_json_and_page(model, onnx_file, tmp_path, call):
    assert call("report", onnx_file).out == "the report\n"
    result = call("report", onnx_file, "--json", "--html", tmp_path / "page.html")
    assert json.loads(result.out) == {"layers": []}
    assert "<table>" in (tmp_path / "page.html").read_text()


SKIPS = [
    ("8", Skip(8)),
    ("0.5", Skip(0.5)),
    ("raw:0.0", Skip(0, raw=True)),
    ("8,1", Skip(8, zero_ratio=1)),
]


@pytest.mark.parametrize(("text", "skip"), SKIPS)
def test_skip_and_memory_go_to_compile(model, onnx_file, tmp_path, call, text, skip):
    out, options = tmp_path / "out.tvms", ["--skip", text, "--memory", "minimal"]
    for command in (["compile", "-o", out], ["run", "--random", "input_ids=2x3"], ["report"]):
        assert call(*command, onnx_file, *options).code == 0
        assert model.options["skip"] == skip
        assert model.options["memory"] == "minimal"


def test_a_negative_raw_threshold_needs_no_quotes(model, onnx_file, call):
    assert call("report", onnx_file, "--skip", "raw:-2").code == 0
    assert model.options["skip"] == Skip(-2, raw=True)


@pytest.mark.parametrize("option", [("--skip", "8"), ("--memory", "minimal")])
def test_a_compiled_model_has_its_skip_and_memory(model, tmp_path, call, option):
    saved = tmp_path / "model.tvms"
    saved.write_bytes(b"")
    for command in (["run", saved, "--random", "input_ids=2x3"], ["report", saved]):
        result = call(*command, *option)
        assert (result.code, f"give {option[0]} to tvmstruct compile" in result.err) == (2, True)


def test_report_measures_what_is_skipped(model, onnx_file, call):
    command = ["report", onnx_file, "--shape", "input_ids=2x9", "--skip", "8", "--measure"]
    table = call(*command).out
    for text in (
        "the report",
        "attention.0",
        "71.0%",
        "55.0%",
        "1.2e-03",
        "25.0%",
        "12 of",
        "40.0%",
    ):
        assert text in table
    assert {name: a.shape for name, a in model.feeds.items()} == {
        "input_ids": (2, 9),
        "scale": (2, 3),
    }
    assert model.feeds["input_ids"].max() < 7
    found = json.loads(call(*command, "--json").out)
    assert found["layers"] == []
    assert found["skip"]["attention.0"]["utilisation"]["dynamic"] == 0.9


def test_a_built_in_model_is_measured_on_its_own_inputs(tiny, call):
    assert call("report", TINY, "--skip", "8", "--measure").code == 0
    for name, array in tiny.config.inputs().items():
        np.testing.assert_array_equal(tiny.model.feeds[name], array)


MISUSE = [
    (["report", "MODEL", "--skip", "far"], "want a number such as 8, or raw:0.0"),
    (["report", "MODEL", "--skip", "0"], "want a positive distance"),
    (["report", "MODEL", "--skip", "nan"], "want a finite"),
    (["report", "MODEL", "--skip", "8,1.5"], "zero_ratio is 1.5; want a share"),
    (["report", "MODEL", "--skip", "8,"], "a zero ratio as in 8,0.99"),
    (["report", "MODEL", "--memory", "least"], "'auto', 'minimal', 'baseline'"),
    (["compile", "MODEL"], "--output"),
    (["compile", "MODEL", "-o", "/no/such/folder/out.tvms"], "folder"),
    (["compile", "/no/such/model.onnx", "-o", "out.tvms"], "does not exist"),
    (["compile", "MODEL", "-o", "out.tvms", "--shape", "input_ids"], "NAME=VALUE"),
    (["compile", "MODEL", "-o", "out.tvms", "--shape", "input_ids=1,2"], "1x128"),
    (["compile", "MODEL", "-o", "out.tvms", "--shape", "input_ids=0x2"], "1x128"),
    (["compile", "MODEL", "-o", "out.tvms", "--threads", "0"], "--threads"),
    (["run", "MODEL"], "--random"),
    (["run", "MODEL", "--random", "a=1", "--random", "a=2"], "twice"),
    (["fly", "MODEL"], "fly"),
]


@pytest.mark.parametrize(("arguments", "hint"), MISUSE, ids=lambda value: str(value))
def test_misuse_exits_with_two(model, onnx_file, call, arguments, hint):
    result = call(*(onnx_file if a == "MODEL" else a for a in arguments))
    assert result.code == 2
    assert hint in result.err


def test_a_compiled_model_is_not_compiled_again(model, tmp_path, call):
    saved = tmp_path / "model.tvms"
    saved.write_bytes(b"")
    assert call("compile", saved, "-o", tmp_path / "out.tvms").code == 2


def test_our_errors_are_one_line_and_exit_with_one(model, monkeypatch, onnx_file, tmp_path, call):
    def fail(path):
        raise ModelError("model.onnx: truncated at byte 7")

    monkeypatch.setattr(tvmstruct, "from_onnx", fail)
    result = call("compile", onnx_file, "-o", tmp_path / "out.tvms")
    assert (result.code, result.out) == (1, "")
    assert result.err == "tvmstruct: model.onnx: truncated at byte 7\n"


@pytest.mark.parametrize("option", ["--shape", "--random"])
def test_an_unknown_input_is_named(model, onnx_file, tmp_path, call, option):
    command = "run" if option == "--random" else "report"
    result = call(command, onnx_file, option, "pixels=1x16")
    assert result.code == 1
    assert "no input 'pixels'; the inputs are input_ids, attention_mask, scale" in result.err


def test_an_array_file_must_be_an_array(model, onnx_file, tmp_path, call):
    (tmp_path / "x.npy").write_bytes(b"not an array")
    result = call("run", onnx_file, "--input", f"input_ids={tmp_path / 'x.npy'}")
    assert (result.code, "not an .npy file" in result.err) == (1, True)


@pytest.fixture
def tiny(model, monkeypatch):
    """The fake compiler, ready for the built-in model that ``TINY`` names."""
    config = models.parse(TINY.removeprefix("random:"))
    inputs = [(entry.name, entry.dims) for entry in config.specs()]
    model.inputs = [SimpleNamespace(name=n, dtype="int64", shape=s) for n, s in inputs]
    monkeypatch.setattr(models, "source", lambda config: ("built in", config))
    return SimpleNamespace(model=model, config=config)


TINY = "random:bert-s4x?layers=1&seq=3&hidden=8&heads=2&ffn=5&vocabulary=11"


def test_run_makes_a_built_in_model_and_its_inputs(tiny, call):
    result = call("run", TINY)
    assert result.code == 0
    assert tiny.model.options["source"] == ("built in", tiny.config)
    for name, array in tiny.config.inputs().items():
        np.testing.assert_array_equal(tiny.model.feeds[name], array)


def test_run_takes_other_inputs_for_a_built_in_model(tiny, call):
    assert call("run", TINY, "--random", "input_ids=2x5").code == 0
    assert {name: a.shape for name, a in tiny.model.feeds.items()} == {"input_ids": (2, 5)}


def test_a_built_in_model_is_compiled_for_its_own_shape(tiny, tmp_path, call):
    assert call("compile", TINY, "-o", tmp_path / "out.tvms").code == 0
    assert tiny.model.buckets == [tiny.config.shapes()]
    assert call("report", TINY, "--shape", "input_ids=2x7").code == 0
    assert tiny.model.buckets[1] == dict.fromkeys(tiny.config.shapes(), (2, 7))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bart", "no built-in model 'bart'; there are: memory-network, memory-network-s4x"),
        ("bert?depth=2", "unknown option 'depth'; known: seq, hidden, ffn, heads, layers"),
        ("bert?layers", "'layers' is no option; want bert?key=value&key=value"),
        ("bert?layers=two", "layers is 'two', want an integer"),
        ("bert?embeddings=maybe", "embeddings is 'maybe', want true or false"),
        ("bert?layers=1&layers=2", "option 'layers' comes twice"),
        ("bert?heads=7", "hidden 1024 is no multiple of heads 7"),
    ],
)
def test_a_wrong_built_in_model_is_misuse(call, name, message):
    for command in (["run", f"random:{name}"], ["models", name]):
        result = call(*command)
        assert (result.code, message in result.err) == (2, True), result.err


def test_models_lists_every_model(call):
    rows = json.loads(call("models", "--json").out)["models"]
    assert [row["name"] for row in rows] == list(models.names())
    assert rows[0]["inputs"]["keys"] == [100_000, 64]
    table = call("models").out
    assert all(row["name"] in table for row in rows)


def test_models_writes_one(tmp_path, call):
    out = tmp_path / "tiny.onnx"
    result = call("models", TINY, "-o", out, "--seed", "3", "--json")
    config = models.parse(TINY.removeprefix("random:"))
    assert json.loads(result.out)["models"][0]["parameters"] == config.params
    assert out.read_bytes() == models.build(config, 3).SerializeToString()


def test_models_must_know_which_to_write(tmp_path, call):
    result = call("models", "-o", tmp_path / "x.onnx")
    assert (result.code, "say which" in result.err) == (2, True)


def test_a_model_too_large_for_onnx_is_an_error(tmp_path, call):
    result = call("models", "bert?layers=99", "-o", tmp_path / "x.onnx")
    assert (result.code, "take fewer layers" in result.err) == (1, True)


def test_complete_fills_what_the_symbols_fix():
    assert complete({"input_ids": (8, 128)}, FakeModel.inputs) == TWO
    with pytest.raises(InputError, match="dimension length of input_ids is open"):
        complete({"scale": (8, 3)}, FakeModel.inputs)
    with pytest.raises(InputError, match="rank 2"):
        complete({"scale": (8,)}, FakeModel.inputs)


def test_default_buckets_of_fixed_inputs_are_one():
    fixed = [SimpleNamespace(name="x", dtype="float32", shape=(4, 3))]
    assert default_buckets(fixed) == [{"x": (4, 3)}]


@pytest.mark.parametrize(
    "command", [[], ["compile"], ["run"], ["report"], ["models"], ["profile"], ["demo"]], ids=str
)
def test_help_has_an_example(command, call):
    result = call(*command, "--help")
    assert result.code == 0
    assert "Example: tvmstruct" in result.out


def test_version(call):
    assert call("--version").out.startswith("tvmstruct 0.")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from tvmstruct import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'tvm', 'numpy', 'onnx', 'torch', 'xgboost', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_runs_as_program():
    command = [sys.executable, "-m", "tvmstruct", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tvmstruct ")


def test_long_work_says_so_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.working("compiling [1x16]"):
        wait_for(lambda: "compiling [1x16] ..." in capsys.readouterr().err)


def test_short_work_is_silent(capsys):
    with progress.working("compiling"):
        pass
    assert capsys.readouterr().err == ""


def wait_for(condition, seconds=5.0):
    import time

    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.01)


def test_calibration_batches_go_to_compile(model, onnx_file, tmp_path, call):
    np.savez(tmp_path / "a.npz", input_ids=np.ones((2, 3)))
    for command in (["compile", "-o", tmp_path / "out"], ["run"], ["report"]):
        more = ["--random", "input_ids=2x3"] if command == ["run"] else []
        options = ["--target", "vta -config=c.json", "--calibration", tmp_path / "a.npz"]
        result = call(*command, onnx_file, *options, *more)
        assert result.code == 0, result.err
        (batch,) = model.options["calibration"]
        assert batch["input_ids"].shape == (2, 3)
