"""Lengths that arrays are padded to."""

from __future__ import annotations

from attnrl_jax.shapes import few_lengths


def test_few_lengths_by_hand():
    assert [few_lengths(n, 10) for n in (0, 1, 10, 11, 20, 21, 31, 41, 61, 81, 121)] == [
        10, 10, 10, 20, 20, 30, 40, 60, 80, 120, 160,
    ]  # fmt: skip


def test_few_lengths_hold_and_pad_little():
    lengths = {few_lengths(n, 16) for n in range(1, 2049)}
    assert len(lengths) == 14
    assert all(n <= few_lengths(n, 16) < max(16, 1.5 * n) + 16 for n in range(1, 2049))
