"""Rotary tables against the published formulas, and what rotation leaves alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.config import RopeScaling
from attnrl_jax.models.rotary import rotary_tables, rotate

BATCH, TIME, HEADS, DIM = 2, 13, 2, 6


def llama3_frequencies(dim, theta, factor, low, high, original):
    """The published formula of Llama 3.1, by cases of the wavelength."""
    scaled = []
    for i in range(0, dim, 2):
        frequency = theta ** (-i / dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


@pytest.mark.parametrize("kind", ["none", "linear", "llama3"])
def test_rotary_angles(kind):
    dim, theta, positions = 128, 5e5, np.array([[0, 1, 7, 100], [3, 2, 1, 0]], np.int32)
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    scaling, frequencies = {
        "none": (None, plain),
        "linear": (RopeScaling("linear", 4.0), plain / 4),
        "llama3": (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            llama3_frequencies(dim, theta, 8.0, 1.0, 4.0, 8192),
        ),
    }[kind]
    if kind == "llama3":
        kept, stretched = frequencies == plain, frequencies == plain / 8
        assert kept.sum() > 5
        assert stretched.sum() > 5
        assert (~kept & ~stretched).sum() > 5
    cos, sin = rotary_tables(jnp.asarray(positions), dim, theta, scaling)
    angles = positions[:, :, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_rotation_depends_on_distance_only():
    """Scores of rotated queries and keys are unchanged when all positions move together."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, BATCH, TIME, HEADS, DIM)).astype(np.float32)

    def scores(offset):
        positions = jnp.broadcast_to(jnp.arange(TIME)[None] + offset, (BATCH, TIME))
        cos, sin = rotary_tables(positions, DIM, 1e4, None)
        turned = rotate(jnp.asarray(q), cos, sin)
        return jnp.einsum("BTHD,BUHD->BHTU", turned, rotate(jnp.asarray(k), cos, sin))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)
    assert np.abs(scores(0) - np.einsum("BTHD,BUHD->BHTU", q, k)).max() > 0.5
    turned = rotate(jnp.asarray(q), *rotary_tables(jnp.full((BATCH, TIME), 9), DIM, 1e4, None))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
    )
