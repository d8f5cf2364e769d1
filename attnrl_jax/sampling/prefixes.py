"""Which prefixes are prefilled, for which samples, and in which order. Host code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrl_jax.sampling.requests import Request

ORDERS = ("longest", "given")


@dataclass(frozen=True)
class Sample:
    """One response still to be decoded."""

    request: int
    index: int


@dataclass(frozen=True)
class Group:
    """Samples whose prefixes are cuts of one prefix, prefilled once."""

    prefix: np.ndarray
    samples: list[Sample]


def share_prefixes(requests: Sequence[Request], order: str) -> list[Group]:
    """Least set of prefixes such that every request's prefix is a cut of one.

    In lexicographic order all prefixes that begin with `a` follow `a` directly, so that a prefix
    is a cut of some other exactly if it is a cut of its successor.

    With the order `longest` long budgets come first.
    """
    work = [i for i, request in enumerate(requests) if request.num_samples and request.budget]
    # Big-endian bytes sort as the numbers do.
    keys = {i: np.asarray(requests[i].prefix).astype(">u4").tobytes() for i in work}
    groups: list[list[int]] = []
    successor = b""
    for i in sorted(work, key=lambda i: keys[i], reverse=True):
        if successor.startswith(keys[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
        successor = keys[i]

    def budget(i: int) -> int:
        return requests[i].budget if order == "longest" else 0

    shared = []
    for members in sorted(groups, key=lambda g: (-max(map(budget, g)), min(g))):
        longest = np.asarray(requests[members[0]].prefix, np.int32)
        members = sorted(members, key=lambda i: (-budget(i), i))
        samples = [Sample(i, k) for i in members for k in range(requests[i].num_samples)]
        shared.append(Group(longest, samples))
    return shared
