"""Checkpoints resume bit for bit, and bad files are named."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import pytest

from tvmstruct.errors import ArtifactError
from tvmstruct.recurrent_forms import antman

pytest.importorskip("torch")

import torch

from tvmstruct.training import LanguageModel, load_checkpoint, save_checkpoint
from tvmstruct.training.checkpoint import DIGEST, MAGIC


class Loop:
    """A training loop with everything that must be restored: dropout, schedule, carried state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        forms = antman("lgp_shuffle", g_im=2, g_hm=3)
        self.model = LanguageModel.of(13, 12, 2, forms=forms, dropout=0.3).train()
        self.optimiser = torch.optim.Adam(self.model.parameters(), 0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, 2, 0.5)
        self.parts = {"optimiser": self.optimiser, "schedule": self.schedule}
        self.state, self.step = None, 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            ids = torch.randint(13, (4, 3))
            logits, state = self.model(ids, self.state)
            self.state = [s.detach() for s in state]
            self.optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
            self.optimiser.step()
            self.schedule.step()
            self.step += 1

    def save(self, path: Path) -> None:
        extra = {"state": self.state, "note": "x", "losses": [1.5, 2.5]}
        save_checkpoint(path, self.model, step=self.step, parts=self.parts, extra=extra)

    def load(self, path: Path) -> None:
        self.step, extra = load_checkpoint(path, self.model, parts=self.parts)
        assert (extra["note"], extra["losses"]) == ("x", [1.5, 2.5])
        self.state = extra["state"]


def same(a: Loop, b: Loop) -> bool:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Loop()
    whole.run(7)
    first = Loop()
    first.run(3)
    first.save(tmp_path / "a.ckpt")
    second = Loop()
    second.run(1)  # must not matter
    second.load(tmp_path / "a.ckpt")
    assert second.step == 3
    second.run(4)
    assert same(whole, second)
    assert whole.schedule.get_last_lr() == second.schedule.get_last_lr()


def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    loop, path = Loop(), tmp_path / "a.ckpt"
    loop.run(1)
    loop.save(path)
    before = path.read_bytes()
    loop.run(1)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        loop.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "cut short", "flipped", "empty", "other", "appended"])
def test_damaged_files_are_named_and_change_nothing(tmp_path: Path, damage: str) -> None:
    path, loop = tmp_path / "a.ckpt", Loop()
    loop.run(1)
    loop.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= damage == "flipped"
    cut = {"cut": len(data) // 2, "cut short": len(MAGIC) + 3, "empty": 0}.get(damage)
    data = data[:cut] + (b"x" if damage == "appended" else b"")
    path.write_bytes(b"PK\x03\x04 something" if damage == "other" else data)
    other = Loop()
    fresh, random = Loop(), torch.get_rng_state()
    with pytest.raises(ArtifactError, match=r"a\.ckpt: is (damaged|no checkpoint)"):
        other.load(path)
    assert same(other, fresh)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.ckpt: cannot be read"):
        Loop().load(tmp_path / "none.ckpt")


def write(path: Path, payload: bytes) -> None:
    path.write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)
    assert len(hashlib.sha256(payload).digest()) == DIGEST


class Hostile:
    """What a pickle would call when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def archive(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (pickle.dumps(Hostile(), protocol=2), "more than tensors"),
        (archive({"model": Hostile()}), "more than tensors"),
        (archive({"model": {}}), "other entries"),
        (archive([1, 2]), "other entries"),
        (archive({"model": {}, "parts": {}, "rng": 1, "step": 1, "extra": {}}), "rng is a int"),
        (b"", "more than tensors"),
    ],
    ids=["pickle", "archive", "entries", "list", "kinds", "nothing"],
)
def test_hostile_files_are_not_executed(tmp_path: Path, payload: bytes, message: str) -> None:
    write(tmp_path / "a.ckpt", payload)
    with pytest.raises(ArtifactError, match=message):
        Loop().load(tmp_path / "a.ckpt")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    loop, path = Loop(), tmp_path / "a.ckpt"
    loop.run(1)
    loop.save(path)
    wider, deeper = LanguageModel.of(13, 18, 2), LanguageModel.of(13, 12, 3)
    forms = antman("lgp_shuffle", g_im=2, g_hm=3)
    for model, message in (
        (wider, "embedding.weight is"),
        (deeper, "it lacks .*layers.2"),
        (LanguageModel.of(14, 12, 2, forms=forms), "embedding.weight is"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_checkpoint(path, model, parts=loop.parts)


def test_parts_must_be_those_of_the_file(tmp_path: Path) -> None:
    loop, path = Loop(), tmp_path / "a.ckpt"
    loop.run(1)
    loop.save(path)
    with pytest.raises(ArtifactError, match="holds the parts"):
        load_checkpoint(path, loop.model)
    other = torch.optim.SGD(loop.model.recurrent.parameters(), 0.1)
    wrong = {"optimiser": other, "schedule": loop.schedule}
    before = other.state_dict()
    random = torch.get_rng_state()
    with pytest.raises(ArtifactError, match="do not fit"):
        load_checkpoint(path, loop.model, parts=wrong)
    assert other.state_dict() == before
    assert torch.equal(torch.get_rng_state(), random)
