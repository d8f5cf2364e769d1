"""Checksums of arrays, the same however they are cut over devices.

They are taken of what a checkpoint is to hold before it is written, and again of what was read. So
a bit that changed on the way, on disk or in a buffer that was used again too soon, is noticed, on
any mesh and without a second look at the files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num, UInt32

from attnrl_jax import processes


def _checksum(x: Num[Array, "*shape"]) -> UInt32[Array, ""]:
    """Σ_i (2 i + 1) bits_i modulo 2^32, where i counts the elements of x.

    An odd factor keeps any change of one element; sums of integers do not depend on their order.
    """
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = x.astype(kind) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, kind)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place, stride = place + along * np.uint32(stride % 2**32), stride * x.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> tuple[Any, Bool[Array, ""]]:
    """Of all arrays in one program: several, launched one after the other, may meet their exchanges
    in another order in every process."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jax.tree.map(_checksum, tree), jnp.all(jnp.stack(finite))


def array_checksums(tree: Any, prefix: str) -> tuple[dict[str, int], bool]:
    """Checksum of every array of a pytree, by its path below `prefix`; whether all is finite.

    Args:
      tree: of jax arrays, whole or cut over the devices of all processes, or of numpy arrays.
      prefix: begins every name.
    """
    sums, finite = processes.to_host(_checksums(tree))
    named = {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(sums)
    }
    return named, bool(finite)


def row_checksums(rows: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, int]:
    """CRC-32 of the bytes of host arrays, `rows[name][field]`, by `name/field`."""
    return {
        f"{name}/{field}": zlib.crc32(np.ascontiguousarray(x).tobytes())
        for name, arrays in rows.items()
        for field, x in arrays.items()
    }


def text_checksum(values: Any) -> int:
    """CRC-32 of values as JSON."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
