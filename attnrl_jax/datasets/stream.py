"""An endless shuffled stream of problems whose state is one integer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from attnrl_jax.tasks.problems import DataError, Problem, Source


class Draw(NamedTuple):
    """Problems drawn from a stream.

    Attributes:
      problems: as many as were asked for, in order; of several shards, this shard's part of them.
      cursor: where the next draw starts; all there is to save of a stream. The same in all shards.
      skipped: problems passed over in this draw, by the name of the filter that refused them. The
        same in all shards.
    """

    problems: list[Problem]
    cursor: int
    skipped: dict[str, int]


class ProblemStream:
    """An endless stream over a source: every epoch is one shuffled pass, each shuffled anew.

    The order is a function of the seed and the length of the source alone, and any position is
    reached directly (grain's index shuffle), so the state is the cursor: `take` is pure.

    Args:
      source: at most 2**32 problems.
      seed: 0 .. 2**32-1.
      filters: name -> predicate that says whether a problem is kept, asked in order.

    Raises:
      DataError: the source is empty.
      ValueError: a seed out of range.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        filters: Mapping[str, Callable[[Problem], bool]] | None = None,
    ):
        # Imported here: grain takes two seconds, which library users of this file need not pay.
        import grain

        if len(source) == 0:
            raise DataError("the source of problems is empty")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be within 0 .. 2**32-1, got {seed}")
        self._length = len(source)
        self._filters = dict(filters or {})
        self._dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def take(self, cursor: int, count: int, shard: tuple[int, int] = (0, 1)) -> Draw:
        """The next `count` problems from `cursor` (0 at the start of a run).

        The draw of every shard is the same, and shard `(index, number)` keeps problems `index`,
        `index + number`, ... of it. The order of a run therefore does not depend on the number of
        processes, and a cursor saved under one number continues under another.

        Args:
          cursor: where the draw starts.
          count: problems of the draw, over all shards.
          shard: index of this process, 0 .. number-1, and number of processes.

        Raises:
          DataError: a whole epoch in a row was refused by the filters.
          ValueError: a negative cursor or count, or no such shard.
        """
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor and count must not be negative, got {cursor} and {count}")
        index, number = shard
        if not 0 <= index < number:
            raise ValueError(f"shard must be (index, number) with 0 <= index < number, got {shard}")
        problems: list[Problem] = []
        skipped = dict.fromkeys(self._filters, 0)
        refused_in_a_row = 0
        while len(problems) < count:
            problem = self._dataset[cursor]
            cursor += 1
            refused_by = next(
                (name for name, keep in self._filters.items() if not keep(problem)), None
            )
            if refused_by is None:
                problems.append(problem)
                refused_in_a_row = 0
                continue
            skipped[refused_by] += 1
            refused_in_a_row += 1
            if refused_in_a_row >= 2 * self._length:
                raise DataError(
                    f"none of the {self._length} problems passes the filters; skipped: {skipped}"
                )
        return Draw(problems[index::number], cursor, skipped)
