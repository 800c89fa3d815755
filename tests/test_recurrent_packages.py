"""Real recurrent models: a voice detector that streams, a splitter of strings in 8 bits."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

import tvmstruct

onnxruntime = pytest.importorskip("onnxruntime")


def packaged(package, name):
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; it is in requirements/models.txt")
    return str(next(Path(str(f.locate())) for f in files if f.name == name))


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def chunks(count, batch, samples):
    """Return speech-like noise: a few tones whose loudness comes and goes."""
    rng = np.random.default_rng(0)
    time = np.arange(count * samples) / 16000
    wave = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in (140, 280, 420, 2100))
    wave = wave * np.abs(np.sin(5 * time)) * 0.2 + rng.normal(size=(batch, time.size)) * 0.02
    return wave.astype(np.float32).reshape(batch, count, samples).swapaxes(0, 1)


ANY = {"state": (2, "batch", 128)}


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("silero_vad.onnx", 16000, {"constants": {"sr": 16000}, "shapes": ANY}),
        pytest.param(
            *("silero_vad.onnx", 8000, {"constants": {"sr": 8000}, "shapes": ANY}),
            marks=pytest.mark.slow,
        ),
        ("silero_vad_op18_ifless.onnx", 16000, {"constants": {"sr": 16000}}),
        pytest.param("silero_vad_half.onnx", None, {}, marks=pytest.mark.slow),
    ],
)
def test_voice_detector_streams_as_onnx_runtime(name, rate, options):
    path = packaged("silero-vad", name)
    samples = 288 if rate == 8000 else 576  # of a chunk, with those before it that it needs
    shapes = {"input": ("batch", samples), **options.get("shapes", {})}
    source = tvmstruct.from_onnx(path, **{**options, "shapes": shapes})
    assert [s.name for s in source.inputs] == ["input", "state"]
    compiled, peer = tvmstruct.compile(source), session(path)
    rates = {} if rate is None else {"sr": np.array(rate)}
    want, state = np.zeros((2, 2, 128), np.float32), np.zeros((2, 2, 128), np.float32)
    seen = []
    for x in chunks(25, 2, samples):
        probability, want = peer.run(None, {"input": x, "state": want, **rates})
        got = compiled.run({"input": x, "state": state})
        state = got["stateN"]
        np.testing.assert_allclose(got["output"], probability, rtol=0, atol=1e-4)
        np.testing.assert_allclose(state, want, rtol=0, atol=1e-4)
        seen.append(float(probability.max()))
    assert max(seen) > min(seen) + 0.05  # it heard something


def test_voice_detector_takes_a_sequence_of_chunks():
    path = packaged("silero-vad", "silero_vad_16k_sequence.onnx")
    compiled, peer = tvmstruct.compile(tvmstruct.from_onnx(path)), session(path)
    carried = {k: np.zeros((1, 1, 128), np.float32) for k in "hc"}
    for count in (1, 9):
        feeds = {"input": chunks(count, 1, 576)[:, 0], **carried}
        got = compiled.run(feeds)
        for a, b in zip(got.values(), peer.run(None, feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
        carried = {"h": got["hn"], "c": got["cn"]}
    assert "exact sizes (output 'hn' changes" in " ".join(compiled.padder.notes)


WORDS = """
    about after again also always another answer area around back because before best better black
    book bright build business call change chat city clean clear cloud code cold come company cook
    country data daily deal design direct doctor dream drive early earth easy energy family fast
    field film find fire first fish flower food free fresh friend game garden gold good great green
    group grow hand happy health help high home hotel house idea island job kids know land language
    learn letter life light little live local long look love magic mail main market media money
    moon morning mountain music name nature need news night north office online open order paper
    park party people phone photo place plan plant play point power price pro public quick radio
    rain real red rent review river road rock room round run safe sale school science sea search
    second secret service shop short show simple smart social song south space sport star start
    stone store story street studio style summer sun super sure table talk team tech test think
    time today top town trade train travel tree true trust turn under union unit vision voice walk
    wall water way web week west white wild wind winter wise wood word work world yellow young
""".split()


def texts(count, length):
    """Return strings of a length that words make, their last one cut."""
    rng = np.random.default_rng(length)
    return ["".join(rng.choice(WORDS, 10))[:length] for _ in range(count)]


def decide(emissions, crf):
    """Return the most probable tags (rows, steps) of emissions (rows, steps, tags): Viterbi."""
    score, back = crf["start_transitions"] + emissions[:, 0], []
    for step in emissions.swapaxes(0, 1)[1:]:
        paths = score[:, :, None] + crf["transitions"] + step[:, None]
        back.append(paths.argmax(1))
        score = paths.max(1)
    tags = [(score + crf["end_transitions"]).argmax(1)]
    for best in reversed(back):
        tags.append(np.take_along_axis(best, tags[-1][:, None], 1)[:, 0])
    return np.stack(tags[::-1], 1)


LENGTHS = (7, 13, 22, 34)


def decisions(count):
    """Return how many of ``count`` strings are split differently than by ONNX Runtime."""
    path = packaged("dksplit", "dksplit-int8.onnx")
    crf = np.load(packaged("dksplit", "dksplit.npz"))
    source = tvmstruct.from_onnx(path)
    compiled, peer = tvmstruct.compile(source, buckets="exact"), session(path)
    letters = {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")}
    different, errors = 0, []
    for length in LENGTHS:
        ids = np.array([[letters[c] for c in t] for t in texts(count // len(LENGTHS), length)])
        # One row at a time: scales depend on what else is in the batch.
        want = np.concatenate([peer.run(None, {"chars": row[None]})[0] for row in ids])
        got = np.concatenate([compiled(row[None]) for row in ids])
        different += int((decide(got, crf) != decide(want, crf)).any(1).sum())
        errors.append(np.abs(got - want).max())
    return different, max(errors)


@pytest.mark.isa("avx2")
def test_quantised_splitter_decides_as_onnx_runtime():
    different, error = decisions(60)
    assert different == 0
    assert error < 1e-5  # of emissions up to 10: every state is the same to its last bit


@pytest.mark.slow
@pytest.mark.isa("avx2")
def test_quantised_splitter_decides_as_onnx_runtime_a_thousand_times():
    different, error = decisions(1000)
    assert different == 0
    assert error < 1e-5
