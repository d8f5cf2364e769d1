"""Few shapes: every array shape that reaches a jitted function is compiled once."""

from __future__ import annotations


def bucket_length(length: int, multiple: int) -> int:
    """The least positive multiple of `multiple` that holds `length`."""
    return max(1, -(-length // multiple)) * multiple


def few_lengths(length: int, multiple: int) -> int:
    """The least of `multiple` times 1, 2, 3, 4, 6, 8, 12, 16, ... that holds `length`.

    Lengths up to n multiples have about 2 log2(n) of these, at the price of at most half as much
    again for padding (beyond the first multiple).
    """
    needed = bucket_length(length, multiple) // multiple
    power = 1 << (needed - 1).bit_length()
    # Three quarters of the power of two above, where that is enough and a whole number.
    return multiple * (power * 3 // 4 if power >= 4 and needed <= power * 3 // 4 else power)
