"""Checkpoints of the public word2ket code against its forward pass, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.embedding_reference import ket_row
from tvmstruct.embeddings import Word2Ket, Word2KetXS
from tvmstruct.errors import ModelError
from tvmstruct.frontends.tensors import read_tensors
from tvmstruct.testing import tolerance

rng = np.random.default_rng(4)
VOCABULARY, DIMENSION = 23, 50
XS = rng.standard_normal((3, 2, 3, 4), np.float32)  # order 3: 27 x 64, cut
KET = rng.standard_normal((4, 2, VOCABULARY, 3), np.float32)  # order 4: 81 features, cut


def forward_xs(leaves: np.ndarray) -> np.ndarray:
    """The whole table of EmbeddingKetXS: a Kronecker product, built block by block, and its sum."""
    product = leaves[0]
    for factor in leaves[1:]:
        rank, rows, columns = product.shape
        _, t, q = factor.shape
        made = np.zeros((rank, rows * t, columns * q))
        for i in range(rows):
            for j in range(columns):
                block = product[:, i, j, None, None] * factor
                made[:, i * t : (i + 1) * t, j * q : (j + 1) * q] = block
        product = made
    return product.sum(0)[:VOCABULARY, :DIMENSION]


def forward_ket(leaves: np.ndarray) -> np.ndarray:
    """The whole table of EmbeddingKet: pairs of leaves, then pairs of pairs, and their sum."""
    rank, rows = leaves.shape[1:3]
    level = [leaf.astype(np.float64) for leaf in leaves]
    while len(level) > 1:
        level = [
            (a[:, :, :, None] * b[:, :, None, :]).reshape(rank, rows, -1)
            for a, b in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0].sum(0)[:, :DIMENSION]


CASES = {"xs": (XS, Word2KetXS, forward_xs), "ket": (KET, Word2Ket, forward_ket)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_gives_the_rows_of_the_public_code(tmp_path, case, suffix: str) -> None:
    leaves, kind, forward = case
    path = tmp_path / f"model{suffix}"
    state = {"encoder.embedding.weight_leafs": leaves, "other.weight": np.ones((2, 2), np.float32)}
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({n: torch.from_numpy(a) for n, a in state.items()}, path)
    else:
        pytest.importorskip("safetensors.numpy").save_file(state, path)
    table = tvmstruct.from_word2ket(path, vocabulary=VOCABULARY, dimension=DIMENSION)
    assert isinstance(table, kind)
    want = forward(leaves)
    ids = rng.integers(0, VOCABULARY, (4, 6))
    np.testing.assert_allclose(table.rows(ids), want[ids], **tolerance("float32", 64, scale=4))
    np.testing.assert_allclose(
        table.inner(3, np.arange(VOCABULARY)), want @ want[3], **tolerance("float32", 99, scale=99)
    )
    assert table.params == leaves.size


def test_layer_norm_of_the_paper_is_asked_for() -> None:
    table = tvmstruct.from_word2ket(
        {"weight_leafs": KET}, vocabulary=VOCABULARY, dimension=DIMENSION, norm=1e-5
    )
    want = ket_row(KET[:, :, 7].transpose(1, 0, 2), DIMENSION, 1e-5)
    np.testing.assert_allclose(table.rows(7), want, **tolerance("float32", 81, scale=4))


def test_one_of_several_modules_is_named() -> None:
    state = {"source.weight_leafs": KET, "target.weight_leafs": XS}
    sizes = {"vocabulary": VOCABULARY, "dimension": DIMENSION}
    assert isinstance(tvmstruct.from_word2ket(state, name="target", **sizes), Word2KetXS)
    assert isinstance(tvmstruct.from_word2ket(state, name="source.weight_leafs", **sizes), Word2Ket)


def state(**changes):
    return {"state": {"weight_leafs": XS}, "vocabulary": 23, "dimension": 50, **changes}


BAD = {
    "no name and 0 tensors called 'weight_leafs'; the state dict has": state(
        state={"weight": np.ones(3)}
    ),
    r"no name and 2 tensors .*; the state dict has \['a.weight_leafs', 'b.weight_leafs'\]": state(
        state={"a.weight_leafs": XS, "b.weight_leafs": XS}
    ),
    "name='c' and 0 tensors": state(name="c"),
    r"is float32 of shape \(3, 2, 12\); want floats": state(
        state={"weight_leafs": XS.reshape(3, 2, 12)}
    ),
    "is int64 of shape": state(state={"weight_leafs": XS.astype(int)}),
    r"is float32 of shape \(0, 2, 3, 4\)": state(state={"weight_leafs": XS[:0]}),
    "has NaN or infinite entries": state(state={"weight_leafs": XS * np.float32(np.inf)}),
    "3 leaves of 4 features make 64; dimension=65": state(dimension=65),
    "3 factors of 3 rows make a table of 27; .*vocabulary=28 rows": state(vocabulary=28),
    "1 factors of 3 rows": state(state={"weight_leafs": XS[:1]}, dimension=4, vocabulary=3),
    "norm=1e-05, but word2ketXS has no LayerNorm": state(norm=1e-5),
}


@pytest.mark.parametrize("message", BAD)
def test_state_dicts_that_make_no_table_are_refused(message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tvmstruct.from_word2ket(BAD[message].pop("state"), **BAD[message])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files_are_named(tmp_path, suffix: str) -> None:
    if suffix == ".pt":
        pytest.importorskip("torch")
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(b"PK\x03\x04 short")
    with pytest.raises(ModelError, match=r"cut\..*cannot be read as"):
        read_tensors(path)


def test_other_objects_in_a_pytorch_file_are_refused(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds a list; save"):
        read_tensors(tmp_path / "list.pt")
    torch.save({"state_dict": {"w": torch.ones(2, dtype=torch.bfloat16)}}, tmp_path / "x.ckpt")
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.ckpt")["w"], np.ones(2, np.float32))


# --- into a model ----------------------------------------------------------------------------


def lookup_model():
    """``words[ids] + 1``."""
    n = models.helper.make_node
    arrays = {"words": models.weight(VOCABULARY, DIMENSION), "one": np.ones(DIMENSION, np.float32)}
    ids = models.value("ids", ["batch", "length"], models.INT64)
    graph = [n("Gather", ["words", "ids"], ["x"]), n("Add", ["x", "one"], ["y"])]
    return models.make_model(graph, [ids], [models.value("y", None)], arrays)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_imported_table_takes_the_place_of_a_models_own(case) -> None:
    leaves, _, forward = case
    table = tvmstruct.from_word2ket(
        {"weight_leafs": leaves}, vocabulary=VOCABULARY, dimension=DIMENSION
    )
    source = tvmstruct.from_onnx(lookup_model()).with_tables({"words": table})
    model = tvmstruct.compile(source)
    ids = rng.integers(0, VOCABULARY, (3, 4))
    want = forward(leaves)[ids] + 1
    np.testing.assert_allclose(model(ids), want, **tolerance("float32", 64, scale=4))
    record = next(r for r in model.report().layers if r.name == "words")
    assert (record.form, record.params) == (table.family, leaves.size)
    assert "given with the source" in record.reason
    with pytest.raises(tvmstruct.errors.InputError, match="ids"):
        model(ids + VOCABULARY)  # ids at an input are checked before anything runs


def test_tables_that_fit_no_weight_are_refused() -> None:
    source = tvmstruct.from_onnx(lookup_model())
    table = Word2KetXS(tuple(XS), VOCABULARY, DIMENSION - 1)
    with pytest.raises(ModelError, match=r"no weight is called 'word'; the weights are: .*words"):
        source.with_tables({"word": table})
    with pytest.raises(ModelError, match=r"'words' has the shape \(23, 50\), its table is 23x49"):
        source.with_tables({"words": table})
