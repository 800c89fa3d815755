"""Weights in bfloat16 and int8: rounding, packing in words of 32 bits, and the error of it.

x86 multiplies words: a dot product instruction takes a word of x (two bfloat16 or four bytes),
and adds its product with the words of a vector of columns. So a weight is packed as panels
``[ceil(n / width)][ceil(k / group)][width]`` of words with ``group`` consecutive k in each.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tvmstruct.rounding import BYTES, HALVES

DYNAMIC = "dynamic-int8"  # the precision of weights that come as integers, for rounded x
LARGEST = 127  # of a symmetric int8; -128 is not used, so that negation is exact
OFFSET = 128  # makes bytes of x unsigned
ROUNDER = 1.5 * 2**23 + OFFSET  # added to v, its low byte is rint(v) + 128 in two's complement
SMALLEST = 1e-30  # magnitude below which the reciprocal of a row's scale could overflow


def round_bf16(w: np.ndarray) -> np.ndarray:
    """Return ``w`` rounded to the nearest bfloat16, ties to even."""
    with np.errstate(over="ignore"):
        return np.asarray(w, np.float32).astype(ml_dtypes.bfloat16)


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return q (k, n) int8 and scale (n) with ``w`` about ``q * scale``, one scale per column."""
    scale = (np.abs(w).max(axis=0) / LARGEST).astype(np.float32)
    inverse = np.divide(1.0, scale, out=np.zeros(scale.shape), where=scale > 0)
    q = np.rint(w * inverse).clip(-LARGEST, LARGEST)
    return q.astype(np.int8), scale


def recover_integers(w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, int]:
    """Return q (k, n) int8 and a shift with ``w = (q + shift) * scale`` before w was rounded.

    ``w`` are integers of 8 bits less their zero points, times the scale (n) of their column: 256
    neighbours at most, which int8 holds once they are shifted.
    """
    whole = np.divide(w, scale, out=np.zeros(w.shape, np.float32), where=scale != 0)
    q = np.rint(whole).astype(np.int32)
    low, high = int(q.min(initial=0)), int(q.max(initial=0))
    shift = 0 if low >= -128 and high <= 127 else high - 127
    return (q - shift).astype(np.int8), shift


def pack_words(w: np.ndarray, width: int, *, multiple: int = 1) -> np.ndarray:
    """Return a (k, n) array of 1 or 2 bytes an element as panels of int32 words, zero padded.

    The number of words along k is rounded up to ``multiple``.
    """
    k, n = w.shape
    group = 4 // w.dtype.itemsize
    words, panels = -(-k // (group * multiple)) * multiple, -(-n // width)
    padded = np.zeros((words * group, panels * width), w.dtype)
    padded[:k, :n] = w
    order = padded.reshape(words, group, panels, width).transpose(2, 0, 3, 1)
    return np.ascontiguousarray(order).view(np.int32).reshape(panels, words, width)


def pair_vectors(w: np.ndarray, lanes: int) -> np.ndarray:
    """Return flat float32 ``w`` as words of bfloat16: vector 2i of ``lanes`` low, 2i + 1 high."""
    halves = round_bf16(w).view(np.uint16).reshape(-1, 2, lanes).astype(np.uint32)
    return (halves[:, 0] | halves[:, 1] << 16).reshape(-1).view(np.int32)


def pack_product(w: np.ndarray, form: str, words: int, width: int) -> np.ndarray:
    """Return the words of a product's flat float32 weight in a form of `stages.MatMul`."""
    if form == BYTES:
        return byte_panels(w, words, width)
    if form == HALVES:
        return round_bf16(w).view(np.int32)
    return pair_vectors(w, width)


def byte_panels(w: np.ndarray, words: int, width: int) -> np.ndarray:
    """Return float32 panels ``[..][words][width][4]`` as rows of ``width`` words, flat.

    Each panel is its words of four int8, then where the sums start, ``-OFFSET`` times the sum of
    a column, for bytes of x are that much too large, then the bits of the scales of its columns.
    """
    panels = w.reshape(-1, words, width, 4)
    q, scale = quantize(panels.transpose(1, 3, 0, 2).reshape(words * 4, -1))
    start = -OFFSET * q.sum(axis=0, dtype=np.int32)
    whole = np.empty((len(panels), words + 2, width), np.int32)
    bytes_of_words = q.reshape(words, 4, -1, width).transpose(2, 0, 3, 1)
    whole[:, :words] = np.ascontiguousarray(bytes_of_words).view(np.int32)[..., 0]
    whole[:, words], whole[:, words + 1] = (
        row.reshape(-1, width) for row in (start, scale.view(np.int32))
    )
    return whole.reshape(-1)


def pad_columns(row: np.ndarray, width: int) -> np.ndarray:
    """Return ``row`` (n) with zeros up to whole panels."""
    return np.pad(row, (0, -len(row) % width))


def rounded_blocks(w: np.ndarray) -> np.ndarray:
    """Return blocks (.., p, q) in float64 as int8 keeps them, one scale per block and column."""
    flat = np.moveaxis(w, -2, 0).reshape(w.shape[-2], -1)
    q, scale = quantize(flat.astype(np.float32))
    whole = (q * scale.astype(np.float64)).reshape(w.shape[-2], *w.shape[:-2], w.shape[-1])
    return np.moveaxis(whole, 0, -2)


def stored_error(w: np.ndarray, precision: str) -> float:
    """Return the relative Frobenius error of the weight as it is stored."""
    if precision == "int8":
        q, scale = quantize(w)
        stored = q * scale.astype(np.float64)
    else:
        stored = round_bf16(w).astype(np.float64)
    norm = float(np.linalg.norm(w.astype(np.float64)))
    return float(np.linalg.norm(stored - w)) / norm if norm else 0.0
