"""Demonstrations of the generated task as padded batches, for `experiments.pretrain`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerFast

from attnrl_jax.tasks import graph


def demonstrations(
    task: graph.GraphTaskConfig, tokenizer: PreTrainedTokenizerFast, seed: int, hasty: bool
) -> Iterator[tuple[list[int], int]]:
    """Endless demonstrations on the pretraining split: token ids and length of the prompt."""
    source = graph.GraphSource(task, "pretrain", seed=seed, size=2**31)
    ids = tokenizer.get_vocab()
    for index in range(source.size):
        problem = source.graph(index)
        rng = np.random.default_rng((seed, index, 1000))
        share = task.hasty_probability(len(problem.definitions)) if hasty else 0.0
        response = graph.demonstration(problem, rng, share, task.hasty_right)
        prompt = [ids[word] for word in problem.text.split(" ")]
        yield [*prompt, *(ids[w] for w in response.split(" ")), ids[graph.END]], len(prompt)


def bucket_lengths(task: graph.GraphTaskConfig) -> list[tuple[int, list[int]]]:
    """Buckets of up to three neighbouring difficulties: the longest demonstration in tokens, and
    the numbers of operations in it. Few shapes compile, and little is padded.
    """
    operations = list(range(task.min_operations, task.max_operations + 1))
    groups = [operations[i : i + 3] for i in range(0, len(operations), 3)]
    # Given values and question 2 tokens each, definition 4; response: question and blank line 3,
    # careful step and blank line 11, answer and end 4.
    return [(2 * task.given + 2 + 7 + 15 * group[-1], group) for group in groups]


def batches(
    examples: Iterator[tuple[list[int], int]], task: graph.GraphTaskConfig, copies: int
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Batches of `copies` demonstrations of every difficulty, one array set a bucket.

    Args:
      examples: demonstrations, their difficulty rising by one from each to the next.
      task: where the difficulties start and end.
      copies: demonstrations of each difficulty.

    Yields:
      for every bucket the right-padded `tokens` `[row, time]`, their `lengths` `[row]`, and
      `prompts` `[row]`, the tokens of each prompt.
    """
    while True:
        drawn = [[next(examples) for _ in range(task.difficulties)] for _ in range(copies)]
        batch = []
        for length, group in bucket_lengths(task):
            rows = [sweep[k - task.min_operations] for sweep in drawn for k in group]
            tokens = np.zeros((len(rows), length), np.int32)
            for row, (ids, _) in enumerate(rows):
                tokens[row, : len(ids)] = ids
            batch.append(
                {
                    "tokens": tokens,
                    "lengths": np.array([len(ids) for ids, _ in rows], np.int32),
                    "prompts": np.array([prompt for _, prompt in rows], np.int32),
                }
            )
        yield batch
