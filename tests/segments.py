"""Packed sequences and padding, said by segment ids, as the model's interval of each key."""

from __future__ import annotations

import numpy as np


def segment_ends(segments: np.ndarray) -> np.ndarray:
    """Index after the last token of each token's own segment; 0 for padding (segment 0)."""
    index = np.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    ends = np.where(same, index + 1, 0).max(axis=-1)
    return np.where(segments > 0, ends, 0).astype(np.int32)
