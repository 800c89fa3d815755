"""A saved model gives the same numbers in a process without a compiler, or is refused."""

import subprocess
import sys

import numpy as np
import pytest

import tvmstruct
from tests.models import dense_model
from tvmstruct.errors import ArtifactError, InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tvmstruct.compile(tvmstruct.from_onnx(dense_model()), buckets="exact")
    shapes = {s.name: tuple(d if isinstance(d, int) else 3 for d in s.shape) for s in model.inputs}
    model.compile_bucket(shapes)
    path = tmp_path_factory.mktemp("saved") / "model.tvms"
    model.save(path)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return model, path, feeds


def test_a_model_of_nothing_but_kernels_comes_back(saved):
    model, path, feeds = saved
    again = tvmstruct.load(path)
    want, found = model.run(feeds), again.run(feeds)
    assert list(found) == list(want)
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])
    assert [layer.name for layer in again.report().layers] == [
        layer.name for layer in model.report().layers
    ]
    assert again.inputs == model.inputs


def test_it_loads_without_a_compiler(saved, tmp_path):
    _, path, feeds = saved
    np.savez(tmp_path / "feeds.npz", **feeds)
    code = (
        "import sys, numpy as np, tvmstruct\n"
        "feeds = dict(np.load(sys.argv[2]))\n"
        "print(float(next(iter(tvmstruct.load(sys.argv[1]).run(feeds).values())).sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "feeds.npz")],
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    want = float(next(iter(saved[0].run(feeds).values())).sum())
    assert float(done.stdout) == pytest.approx(want)


def test_other_shapes_are_refused_with_the_fix(saved):
    _, path, feeds = saved
    bigger = {name: np.concatenate([a, a]) for name, a in feeds.items()}
    with pytest.raises(InputError):
        tvmstruct.load(path).run(bigger)


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    model, path, feeds = saved
    tvmstruct.load(path).save(tmp_path / "again.tvms")
    found = tvmstruct.load(tmp_path / "again.tvms").run(feeds)
    for name, want in model.run(feeds).items():
        np.testing.assert_array_equal(found[name], want)


def test_a_changed_byte_is_found_before_anything_runs(saved, tmp_path):
    _, path, _ = saved
    data = bytearray(path.read_bytes())
    for place in (40, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[place] ^= 1
        (tmp_path / "broken.tvms").write_bytes(broken)
        with pytest.raises(ArtifactError):
            tvmstruct.load(tmp_path / "broken.tvms")
