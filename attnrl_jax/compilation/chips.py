"""TPU chips and slices: what the compiler's numbers are held against."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    Attributes:
      name: as topologies call it.
      accelerator: how the names of slices begin.
      axes: of a topology.
      cores: by which slices are counted, per chip.
      hbm: bytes of memory.
      flops: bfloat16 operations per second.
      hbm_rate: bytes per second from and to memory.
      ici_rate: bytes per second that the chip can send to others, over all its links.
    """

    name: str
    accelerator: str
    axes: int
    cores: int
    hbm: int
    flops: float
    hbm_rate: float
    ici_rate: float


# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, as of 2025: peak compute per chip
# (bf16), HBM capacity and bandwidth, interchip interconnect bandwidth (v5e 1,600, v5p 4,800, v6e
# 3,200 Gbit/s; where the pages say "bidirectional" they give twice as much). v4: six links of
# 50 GB/s (arXiv 2304.01433). Memory is what XLA lets programs have, "... of 15.75G hbm" where it
# says that something does not fit: the rest of what is sold is the runtime's own.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", 3, 2, int(30.75 * 2**30), 275e12, 1.20e12, 300e9),
        Chip("v5e", "v5litepod", 2, 1, int(15.75 * 2**30), 197e12, 0.819e12, 200e9),
        Chip("v5p", "v5p", 3, 2, int(95.74 * 2**30), 459e12, 2.765e12, 600e9),
        Chip("v6e", "v6e", 2, 1, int(31.25 * 2**30), 918e12, 1.60e12, 400e9),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice of chips.

    Attributes:
      name: such as `v5e:4x4`.
      chip: of which kind.
      devices: how many.
    """

    name: str
    chip: Chip
    devices: int

    @property
    def accelerator_type(self) -> str:
        """The slice's name by its chips or, for v4 and v5p, by its cores: `v5p-16`."""
        return f"{self.chip.accelerator}-{self.devices * self.chip.cores}"


def parse_topology(name: str) -> Topology:
    """Reads `CHIP:AxB`, or `CHIP:AxBxC` for chips in three dimensions.

    Raises:
      ValueError: another form, an unknown chip, or the wrong number of dimensions.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None:
        raise ValueError(f"topology {name!r} is not of the form v5e:4x4 or v5p:2x2x2")
    chip = CHIPS.get(match[1])
    if chip is None:
        raise ValueError(f"topology {name!r}: unknown chip {match[1]!r}; known: {', '.join(CHIPS)}")
    sizes = [int(size) for size in match[2].split("x")]
    if len(sizes) != chip.axes:
        raise ValueError(
            f"topology {name!r}: {chip.name} has {chip.axes} dimensions; got {len(sizes)}"
        )
    return Topology(name, chip, math.prod(sizes))
