"""Rows in sequences of one fixed length: the layout of updates and of scoring.

Rows of one problem form a tree: they share its prompt, and a continuation shares the first tokens
of its response with the response it branched from. Laid out depth first, each token once, what
hangs below a token is one interval, so that "key p is visible to query q exactly if
p <= q < visible_until[p]" is all that attention needs to know. A row packed on its own is a tree
of one path.

    leaves of a problem, depth first (the longest shared prefix first):
        row 0   prompt a b c d e f      a whole response
        row 4   prompt a b c d g h      a continuation of its first 4 tokens
        row 2   prompt a b i j k        a continuation of its first 2 tokens
    laid out, with the rows through each token (`count`) and the token before (`previous`):
        prompt a b c d e f g h i j k
             3 3 3 2 2 1 1 1 1 1 1 1
        g follows d, i follows b, every other token the one to its left

Trees are packed into sequences, best fit decreasing. A tree above the capacity, or one that fills
room that is left, is cut between leaves into sub-trees that repeat their prefix. Tokens are shared
because rows were branched, never because their ids happen to be equal.

Host code on numpy arrays, without a loop over tokens.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from attnrl_jax.types import Leaves, PackedTokens, Paths, Rollouts


def row_paths(rows: Rollouts | Leaves, initial: Bool[np.ndarray, "row"]) -> Paths:
    """What the rows have in common.

    Args:
      rows: all or some rows of a step; `root` tells continuations of one response from those of
        another, whether or not that response is among the rows.
      initial: which rows are initial responses.
    """
    return Paths(
        prompt_length=rows.prompt_length,
        length=rows.length,
        problem=rows.problem,
        root=rows.root,
        shared=np.where(initial, rows.length, rows.prompt_length + rows.split),
    )


@dataclass(frozen=True)
class Layout:
    """Where every token of some rows lies in sequences of one length.

    Attributes:
      row, index: the row and the index in it that a token is taken from; -1 and 0 for padding.
      visible_until: end of what hangs below the token; 0 for padding.
      previous: where in its sequence the token before lies (for the first of a path, and for
        padding, any place).
      count: rows through the token; 0 for padding.
      length: tokens of each row.
      bounds: of each row, index in it from which its tokens lie at the first, the second and the
        third of its `offsets`.
      offsets: what is added to an index in the row to get a place in all sequences together.
      shares: whether tokens are shared; otherwise each row stands on its own.
    """

    row: Int[np.ndarray, "batch time"]
    index: Int[np.ndarray, "batch time"]
    visible_until: Int[np.ndarray, "batch time"]
    previous: Int[np.ndarray, "batch time"]
    count: Int[np.ndarray, "batch time"]
    length: Int[np.ndarray, "row"]
    bounds: Int[np.ndarray, "row 3"]
    offsets: Int[np.ndarray, "row 3"]
    shares: bool

    @property
    def padding(self) -> float:
        """Share of places that hold no token."""
        return float(np.mean(self.row < 0))

    def gather(self, x: np.ndarray, fill: float = 0) -> np.ndarray:
        """What `x` `[row, time]` says of every token, `[batch, time]`; `fill` for padding."""
        if not len(x):
            return np.full(self.row.shape, fill, x.dtype)
        return np.where(self.row >= 0, x[self.row, self.index], np.asarray(fill, x.dtype))

    def spread(self, packed: np.ndarray, time: int) -> np.ndarray:
        """The inverse: `[row, time]`, shared tokens in every row that has them; 0 for padding."""
        index = np.arange(time)[None, :]
        place = np.broadcast_to(self.offsets[:, :1], (len(self.length), time))
        for k in (1, 2):
            place = np.where(index >= self.bounds[:, k : k + 1], self.offsets[:, k : k + 1], place)
        inside = index < self.length[:, None]
        return np.where(inside, packed.reshape(-1)[np.where(inside, place + index, 0)], 0)

    def packed_tokens(self, tokens: Int[np.ndarray, "row time"]) -> PackedTokens:
        """What the model is given."""
        return PackedTokens(
            tokens=self.gather(tokens),
            positions=self.index,
            visible_until=self.visible_until,
            previous=self.previous,
            layout="tree" if self.shares else "packed",
        )


@dataclass(frozen=True)
class Placement:
    """Where every row goes, by lengths alone; leaves are in the order in which they are laid out.

    Attributes:
      paths: of the rows.
      order: row of each leaf.
      sequence, start: where the leaf's own tokens begin.
      common: tokens that it has in common with the leaf before it in its tree, laid out there.
      begins: whether it is the first of its tree.
      holds_prompt, holds_root: leaf whose tokens are the prompt's, and those shared with the root.
      leaves: of the leaf's tree.
      used: tokens in each sequence.
      capacity: places of a sequence.
      shares: as in `Layout`.
    """

    paths: Paths
    order: Int[np.ndarray, "row"]
    sequence: Int[np.ndarray, "row"]
    start: Int[np.ndarray, "row"]
    common: Int[np.ndarray, "row"]
    begins: Bool[np.ndarray, "row"]
    holds_prompt: Int[np.ndarray, "row"]
    holds_root: Int[np.ndarray, "row"]
    leaves: Int[np.ndarray, "row"]
    used: Int[np.ndarray, "sequence"]
    capacity: int
    shares: bool

    def own_places(self) -> tuple[Int[np.ndarray, "row"], Int[np.ndarray, "row"]]:
        """Of each row its sequence, and what takes an index of an own token to its place in it."""
        by_row = np.argsort(self.order)
        return self.sequence[by_row], (self.start - self.common)[by_row]

    def lay_out(
        self, sequences: Int[np.ndarray, "sequence"]
    ) -> tuple[Int[np.ndarray, "row"], Layout]:
        """Every token of some sequences.

        Args:
          sequences: which ones, in which order; -1 for an empty one.

        Returns:
          the rows in them, ascending, and the layout of these rows.
        """
        place_of = np.full(len(self.used), -1)
        place_of[sequences[sequences >= 0]] = np.flatnonzero(sequences >= 0)
        there = place_of[self.sequence] >= 0
        # Trees lie whole in a sequence, so what holds a leaf's prefix is there with the leaf.
        renumbered = np.cumsum(there) - 1
        order, begins, common, start = (
            x[there] for x in (self.order, self.begins, self.common, self.start)
        )
        holds_prompt, holds_root = (
            renumbered[x[there]] for x in (self.holds_prompt, self.holds_root)
        )
        sequence, leaves = place_of[self.sequence[there]], self.leaves[there]
        rows, prompt = np.sort(order), self.paths.prompt_length[order]
        own = self.paths.length[order] - common
        taken = np.cumsum(own) - own

        # From leaves to tokens. `token` counts them in the order of the leaves, without padding.
        of = np.repeat(np.arange(len(order)), own)
        token = np.arange(len(of))
        index = token - taken[of] + common[of]
        holder = np.where(common > prompt, holds_root, holds_prompt)
        behind = common - 1 - common[holder]
        branches = np.bincount((taken[holder] + behind)[~begins], minlength=len(of))
        total = np.cumsum(branches)
        last = (taken + own - 1)[of]
        below = total[last] - total + branches
        count = np.where(index < prompt[of], leaves[of], 1 + below)
        place = start[of] + token - taken[of]
        previous = np.where(token == taken[of], (start[holder] + behind)[of], place - 1)
        previous = np.where((token == taken[of]) & begins[of], place, previous)
        at = sequence[of] * self.capacity + place

        def laid_out(x: np.ndarray, fill: int = 0) -> np.ndarray:
            flat = np.full(len(sequences) * self.capacity, fill, np.int32)
            flat[at] = x
            return flat.reshape(len(sequences), self.capacity)

        by_row = np.argsort(order)
        holders = np.stack([holds_prompt, holds_root, np.arange(len(order))], axis=1)
        offsets = sequence[:, None] * self.capacity + start[holders] - common[holders]
        return rows, Layout(
            row=laid_out(np.searchsorted(rows, order)[of], -1),
            index=laid_out(index),
            visible_until=laid_out((start + own)[of + count - 1]),
            previous=laid_out(previous),
            count=laid_out(count),
            length=self.paths.length[rows],
            bounds=common[holders][by_row],
            offsets=offsets[by_row],
            shares=self.shares,
        )


def place_paths(paths: Paths, capacity: int, share: bool) -> Placement:
    """Puts rows into as few sequences as best fit decreasing finds.

    Args:
      paths: of the rows.
      capacity: tokens of a sequence.
      share: lay shared tokens out once; otherwise each row stands on its own.

    Raises:
      ValueError: a row does not fit, has no prompt, or is shorter than what it shares; or the
        prompts of a problem differ in length.
    """
    _check(paths, capacity)
    rows = len(paths.length)
    # The leaves in the order in which they are laid out; arrays below are in that order.
    order = np.lexsort((-paths.shared, paths.root, paths.problem)) if share else np.arange(rows)
    length, prompt = (np.asarray(x)[order] for x in (paths.length, paths.prompt_length))
    problem, root = (np.asarray(x)[order] for x in (paths.problem, paths.root))
    other_problem, other_root = np.ones(rows, bool), np.ones(rows, bool)
    if share:
        other_problem[1:] = problem[1:] != problem[:-1]
        other_root[1:] = other_problem[1:] | (root[1:] != root[:-1])
    # Tokens that a leaf has in common with the one before it.
    common = np.where(other_problem, 0, np.where(other_root, prompt, paths.shared[order]))
    trees = _place(length, common, other_problem, capacity)
    begins = np.isin(np.arange(rows), trees[:, 0])
    common[begins] = 0

    # Trees, and in them the leaves of one root; the first leaf of each holds what is shared.
    leaf = np.arange(rows)
    tree = np.cumsum(begins) - 1
    sequence = trees[tree, 1]
    holds_prompt = np.maximum.accumulate(np.where(begins, leaf, 0))
    holds_root = np.maximum.accumulate(np.where(begins | other_root, leaf, 0))
    own = length - common
    taken = np.cumsum(own) - own
    return Placement(
        paths=paths,
        order=order,
        sequence=sequence,
        start=trees[tree, 2] + taken - taken[holds_prompt],
        common=common,
        begins=begins,
        holds_prompt=holds_prompt,
        holds_root=holds_root,
        leaves=np.bincount(tree)[tree],
        used=np.bincount(sequence, own).astype(np.int64),
        capacity=capacity,
        shares=share,
    )


def _check(paths: Paths, capacity: int) -> None:
    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"row {row} {what}: prompt {paths.prompt_length[row]}, length {paths.length[row]}, "
                f"shared {paths.shared[row]} tokens"
            )

    refuse(paths.length > capacity, f"does not fit a sequence of {capacity} tokens")
    refuse(paths.prompt_length < 1, "has no prompt")
    refuse(paths.shared < paths.prompt_length, "shares less than its prompt")
    refuse(paths.length < paths.shared, "is shorter than what it shares")
    _, first, group = np.unique(paths.problem, return_index=True, return_inverse=True)
    others = paths.prompt_length != paths.prompt_length[first[group]]
    refuse(others, "has a prompt of another length than its problem's first row")


def _place(
    length: np.ndarray, common: np.ndarray, other_problem: np.ndarray, capacity: int
) -> Int[np.ndarray, "tree 3"]:
    """Best fit decreasing of trees: first leaf, sequence and start in it, in the order of leaves.

    A tree that fits a sequence but no room that is left fills the largest room with its first
    leaves, if that room is then at least half used by tokens that need not be laid out again for
    the others; otherwise, and if it exceeds a sequence, it begins a new one. What is left over
    waits for its turn as a tree of its own.
    """
    lengths, repeated = length.tolist(), common.tolist()
    total = np.concatenate([[0], np.cumsum(length - common)]).tolist()

    def size(begin: int, end: int) -> int:
        return lengths[begin] + total[end] - total[begin + 1]

    def most(begin: int, end: int, room: int) -> int:
        """End of the leaves from `begin` on that fit; `begin` if none does."""
        bound = room - lengths[begin] + total[begin + 1]
        return bisect.bisect_right(total, bound, begin + 1, end + 1) - 1

    firsts = np.flatnonzero(other_problem).tolist()
    waiting = [
        (-size(begin, end), begin, end)
        for begin, end in zip(firsts, [*firsts, len(lengths)][1:], strict=True)
    ]
    heapq.heapify(waiting)
    rooms: list[tuple[int, int]] = []
    sequences = 0
    placed = []
    while waiting:
        wanted, begin, end = heapq.heappop(waiting)
        found = bisect.bisect_left(rooms, (-wanted, -1))
        cut = end
        if found == len(rooms):
            found = -1
            room = rooms[-1][0] if rooms and -wanted <= capacity else 0
            cut = most(begin, end, room)
            if cut == begin or 2 * (size(begin, cut) - repeated[cut]) < room:
                rooms.append((capacity, sequences))
                sequences += 1
                cut = most(begin, end, capacity)
        room, sequence = rooms.pop(found)
        placed.append((begin, sequence, capacity - room))
        room -= size(begin, cut)
        if room:
            bisect.insort(rooms, (room, sequence))
        if cut < end:
            heapq.heappush(waiting, (-size(cut, end), cut, end))
    return np.array(sorted(placed), np.int64).reshape(-1, 3)


def deal_batches(
    placement: Placement, tokens: int, devices: int
) -> list[Int[np.ndarray, "sequence"]]:
    """Cuts sequences into batches of about `tokens` tokens, of at most three sizes.

    Batches are whole, but for the last: a half, a quarter, or one of each. In a batch, sequences
    are dealt to the devices so that each has about as many tokens to work on.

    Args:
      placement: of the rows.
      tokens: places of a whole batch, at most (one sequence a device at least).
      devices: that share the batch axis, each with as many sequences of a batch.

    Returns:
      the sequences of each batch, device by device; -1 where there is none.
    """
    sequences, used = len(placement.used), placement.used
    whole = max(tokens // placement.capacity // devices, 1)
    half, quarter = -(-whole // 2), -(-whole // 4)
    needed = -(-sequences // devices)
    sizes = [whole] * (needed // whole)
    rest = needed % whole
    if rest:
        ends = ([quarter], [half], [half, quarter], [whole])
        sizes += next(end for end in ends if sum(end) >= rest)
    batches, begin = [], 0
    for size in sizes:
        batch = np.full(size * devices, -1)
        there = np.arange(begin, min(begin + size * devices, sequences))
        batch[: len(there)] = there
        if devices > 1:
            # The most tokens first, there and back again over the devices.
            batch[: len(there)] = there[np.argsort(-used[there], kind="stable")]
            rounds = batch.reshape(size, devices)
            rounds[1::2] = rounds[1::2, ::-1].copy()
            batch = rounds.T.reshape(-1)
        batches.append(batch)
        begin += size * devices
    return batches


def problem_groups(paths: Paths, tokens: int) -> list[Int[np.ndarray, "row"]]:
    """Cuts rows into groups of whole problems, each of about `tokens` tokens.

    Args:
      paths: of the rows.
      tokens: a group ends with the problem with which all so far reach a multiple of it.

    Returns:
      the rows of each group, problem by problem.
    """
    order = np.argsort(paths.problem, kind="stable")
    first = np.unique(paths.problem[order], return_index=True)[1]
    before = np.cumsum(paths.length[order]) - paths.length[order]
    return np.split(order, first[1:][np.diff(before[first] // tokens) > 0])


def take_rows(tree: Any, rows: np.ndarray | slice) -> Any:
    """These rows (indices, a mask, or a slice) of every array."""
    return jax.tree.map(lambda x: x[rows], tree)
