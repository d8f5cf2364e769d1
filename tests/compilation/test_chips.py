"""Names of slices."""

from __future__ import annotations

import pytest

from attnrl_jax.compilation.chips import parse_topology


@pytest.mark.parametrize(
    ("name", "devices", "accelerator"),
    [
        ("v5e:2x4", 8, "v5litepod-8"),
        ("v5e:4x4", 16, "v5litepod-16"),
        ("v6e:4x4", 16, "v6e-16"),
        ("v5p:2x2x2", 8, "v5p-16"),
        ("v4:2x2x1", 4, "v4-8"),
    ],
)
def test_slices_are_named_by_chips_or_by_cores(name, devices, accelerator):
    topology = parse_topology(name)
    assert (topology.devices, topology.accelerator_type) == (devices, accelerator)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "form v5e:4x4"),
        ("v5e:4x0", "form v5e:4x4"),
        ("h100:2x4", "known: v4, v5e, v5p, v6e"),
        ("v5p:2x4", "v5p has 3 dimensions; got 2"),
        ("v5e:2x2x2", "v5e has 2 dimensions; got 3"),
    ],
)
def test_other_names_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        parse_topology(name)
