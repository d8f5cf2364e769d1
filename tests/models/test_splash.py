"""The TPU kernels in Pallas' interpreter against the whole map."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models import splash
from attnrl_jax.models.attention import Route
from attnrl_jax.models.blockwise import forward
from attnrl_jax.models.tiling import StepWeights
from tests.models.test_attention import compute, random_qkv, step_weights
from tests.segments import segment_ends

TIME, DIM = 256, 128


def packed_rows():
    """Rows of 100, 28 and 90 tokens with padding behind; one row with padding before."""
    segments = np.zeros((2, TIME), np.int32)
    for number, (start, end) in enumerate([(0, 100), (100, 128), (128, 218)]):
        segments[0, start:end] = number + 1
    segments[1, 20:] = 1
    steps = np.where(segments > 0, np.arange(TIME) // 9, -1)
    steps[1] = np.where(segments[1] > 0, (np.arange(TIME) - 20) // 5, -1)
    return segment_ends(segments), steps


def test_kernels_equal_the_whole_map():
    until, steps = packed_rows()
    inputs = (*random_qkv(time=TIME, dim=DIM), jnp.asarray(until), jnp.asarray(steps))
    expected = compute(Route("plain"), *inputs)
    got = compute(Route("splash", layout="packed", interpret=True), *inputs)
    real = until > 0
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all()
        # Columns of padding mean nothing.
        if a.shape == got[1].shape:
            a, b = a * real[:, None], b * real[:, None]
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("steps_of", ["rows", "tokens"])
def test_column_sums_of_any_layout(steps_of, monkeypatch):
    """Several blocks of keys and queries; rows, and a tree of two branches below a prompt."""
    monkeypatch.setattr(splash, "LONGEST_BLOCK", splash.LANES)
    rows, steps = packed_rows()
    tree = np.full((2, TIME), TIME, np.int32)
    tree[:, 60:150] = 150
    if steps_of == "tokens":
        steps = np.tile(np.arange(TIME), (2, 1))
    q, k, v = random_qkv(time=TIME, dim=DIM)
    q = np.moveaxis(q.reshape(2, TIME, 2, 2, DIM), 1, 3)
    for until in (rows, tree):
        arrays = (jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(until))
        _, logsumexp, columns = forward(*arrays, 64, step_weights(steps, 4))
        got = splash.column_sums(
            arrays[0], arrays[1], logsumexp, arrays[3], step_weights(steps, 4), interpret=True
        )
        real = (until > 0)[:, None, None]
        assert np.abs(columns).max() > 0.5
        np.testing.assert_allclose(got * real, columns * real, atol=1e-5)


def test_first_queries_by_hand():
    """Padding behind does not go back: its queries weigh nothing."""
    steps = jnp.array([[-1, -1, 0, 0, 1, 2, 2, 3], [0, 1, 1, 2, 4, -1, -1, -1]])
    weights = StepWeights(steps, jnp.ones(steps.shape), 2)
    assert splash.first_queries(weights).tolist() == [
        [4, 4, 5, 5, 7, 8, 8, 8],
        [3, 4, 4, 4, 8, 1, 1, 1],
    ]


@pytest.mark.parametrize(("time", "block"), [(128, 128), (384, 384), (640, 128), (4096, 512)])
def test_blocks_divide_the_length(time, block):
    assert splash._block(time) == block
