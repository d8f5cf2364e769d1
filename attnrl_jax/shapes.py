"""Few shapes: every array shape that reaches a jitted function is compiled once."""

from __future__ import annotations

import numpy as np


def bucket_length(length: int, multiple: int) -> int:
    """The least positive multiple of `multiple` that holds `length`."""
    return max(1, -(-length // multiple)) * multiple


def pad_rows(x: np.ndarray, rows: int, width: int | None, fill: int | float) -> np.ndarray:
    """Pads with `fill` to `rows` rows, and cuts or pads the second axis to `width` if given."""
    if width is not None:
        x = x[:, :width]
    widths = [(0, rows - x.shape[0])]
    if width is not None:
        widths.append((0, width - x.shape[1]))
    widths += [(0, 0)] * (x.ndim - len(widths))
    return np.pad(x, widths, constant_values=fill)
