"""Every spelling of attention becomes one kernel, with the numbers of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.attention_spellings import SPELLINGS
from tvmstruct.testing import tolerance

BOUND = tolerance("float32", 256)


def attention_of(model):
    """Return the one record of an attention, and check that no other was refused."""
    records = model.report().layers
    assert not [r for r in records if "fuse_attention" in r.form], records
    (record,) = [r for r in records if r.form == "attention"]
    return record


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling(spelling):
    proto, inputs = spelling.model()
    model = tvmstruct.compile(tvmstruct.from_onnx(proto), buckets="exact")
    (found,) = model.run(inputs).values()
    record = attention_of(model)
    assert record.shape == spelling.shape
    for words in spelling.says:
        assert words in record.reason
    assert ("causal" in record.reason) == ("causal" in spelling.says)
    (want,) = models.run_onnx(proto, inputs)
    empty = np.isnan(want)
    assert empty.any() == (spelling.name == "rows_without_keys")
    np.testing.assert_allclose(found, np.where(empty, 0, want), **BOUND)


# PyTorch


def torch_module(name):
    """Return a module that attends from 5 positions of 2 sentences, in one of torch's ways."""
    torch = pytest.importorskip("torch")
    attend = torch.nn.functional.scaled_dot_product_attention

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(12, 36)
            self.whole = torch.nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x, hide):
            q, k, v = self.project(x).reshape(2, -1, 3, 3, 4).permute(2, 0, 3, 1, 4)
            return ways[name](self, x, q, k, v, hide[:, None, None, :])

    def eager(self, x, q, k, v, hide):
        scores = (q @ k.mT / 2).masked_fill(hide, float("-inf"))
        p = torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32), 0.1, self.training)
        return p @ v

    def einsum(self, x, q, k, v, hide):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(hide, -1e9)
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)

    ways = {
        "sdpa": lambda self, x, q, k, v, hide: attend(q, k, v),
        "sdpa causal": lambda self, x, q, k, v, hide: attend(q, k, v, is_causal=True),
        "sdpa mask": lambda self, x, q, k, v, hide: attend(q, k, v, attn_mask=~hide),
        "sdpa bias": lambda self, x, q, k, v, hide: attend(
            q, k, v, attn_mask=hide.float() * -3.0, scale=0.3
        ),
        "sdpa groups": lambda self, x, q, k, v, hide: attend(
            q, k[:, :1], v[:, :1], enable_gqa=True
        ),
        "eager": eager,
        "einsum": einsum,
        "MultiheadAttention": lambda self, x, q, k, v, hide: self.whole(
            x, x, x, key_padding_mask=hide[:, 0, 0], need_weights=False
        )[0],
    }
    torch.manual_seed(0)
    return torch, Layer().eval()


TORCH = {
    "sdpa": "mask none",
    "sdpa causal": "mask none, causal",
    "sdpa mask": "mask keys",
    "sdpa bias": "mask keys",
    "sdpa groups": "mask none, 1 key head",
    "eager": "mask keys",
    "einsum": "mask keys",
    "MultiheadAttention": "mask full",
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    torch, module = torch_module(name)
    x = torch.from_numpy(models.weight(2, 5, 12, seed=1))
    hide = torch.tensor([[False] * 4 + [True], [False, True, True, True, True]])
    model = tvmstruct.compile(tvmstruct.from_torch(module, (x, hide)))
    record = attention_of(model)
    assert TORCH[name] in record.reason
    with torch.no_grad():
        want = module(x, hide).numpy()
    np.testing.assert_allclose(model(x.numpy(), hide.numpy()), want, **BOUND)
