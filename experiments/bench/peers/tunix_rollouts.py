"""Tunix's own ("vanilla") sampler, driven in static batches.

Commands: see `protocol.py` and `COMMANDS` at the end.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from protocol import run_batches, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_model import answer_logits, load_model, versions


class RowTokenizer:
    """Gives the prompt of a row for its number: the sampler takes text only."""

    def __init__(self, prompts: np.ndarray, vocab: int):
        self.prompts, self.vocab = prompts, vocab

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)].tolist()

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        # Outside the vocabulary: no token ends a response.
        return self.vocab

    def pad_id(self) -> int:
        return 0


class Side:
    """The model, and the workload that was last prepared."""

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        # XLA computes with as many threads as the process may use cores.
        assert len(os.sched_getaffinity(0)) == threads
        self.model = load_model(folder)
        return {"versions": versions()}

    def logits(self, tokens: str, out: str) -> dict[str, Any]:
        return answer_logits(self.model, tokens, out)

    def prepare(self, workload: str, batch: int) -> dict[str, Any]:
        """Compiles and warms up: one program for each length to which batches run.

        The cache of a program holds what its batches need and no more, since every step attends
        to all of it.
        """
        with np.load(workload) as given:
            self.prompts, self.lengths = given["prompts"], given["lengths"]
        self.batch = batch
        config = self.model.config
        tokenizer = RowTokenizer(self.prompts, config.vocab_size)
        self.samplers = {
            longest: Sampler(
                self.model,
                tokenizer,
                CacheConfig(
                    cache_size=self.prompts.shape[1] + longest,
                    num_layers=config.num_layers,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                ),
            )
            for longest in {self._longest(start) for start in self._starts()}
        }
        for start in {self._longest(start): start for start in self._starts()}.values():
            self._batch(start)
        return {
            "settings": "vanilla sampler, jitted, float32, "
            f"{len(os.sched_getaffinity(0))} threads, batches of {batch} to their longest, "
            "each with a cache of just that length"
        }

    def run(self) -> dict[str, Any]:
        return run_batches(self._batch, self._starts(), int(self.lengths.sum()))

    def _starts(self) -> range:
        return range(0, len(self.lengths), self.batch)

    def _longest(self, start: int) -> int:
        return int(self.lengths[start : start + self.batch].max())

    def _batch(self, start: int) -> None:
        longest = self._longest(start)
        rows = range(start, min(start + self.batch, len(self.lengths)))
        result = self.samplers[longest](
            [str(row) for row in rows],
            max_generation_steps=longest,
            max_prompt_length=self.prompts.shape[1],
            temperature=1.0,
            top_p=1.0,
            seed=start,
        )
        assert [len(tokens) for tokens in result.tokens] == [longest] * len(rows)


if __name__ == "__main__":
    side = Side()
    COMMANDS = {
        "load": side.load, "logits": side.logits, "prepare": side.prepare, "run": side.run,
    }  # fmt: skip
    serve(COMMANDS)
