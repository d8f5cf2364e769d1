"""Tunix's GRPO update: its trainer's jitted train step on padded rows.

What `GRPOLearner` sets up, without the sampling and judging around it: the loss `grpo` of Tunix's
registry, its `Trainer` with gradient accumulation, AdamW with gradients clipped. The mean entropy
of the tokens is a metric of Tunix's loss that cannot be turned off. Its sequence packing is left
out: without its TPU kernel, the Qwen2 model given segment ids alone attends to later tokens (the
command `packing` shows it), so that what it computes on a CPU is not the loss.

Commands: see `protocol.py` and `COMMANDS` at the end.
"""

from __future__ import annotations

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from protocol import serve
from tunix.rl import function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig
from tunix_model import answer_logits, load_model, versions


class Side:
    """The model, and the rows that were last prepared."""

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        assert len(os.sched_getaffinity(0)) == threads
        self.folder = folder
        self.model = load_model(folder)
        return {"versions": versions()}

    def logits(self, tokens: str, out: str) -> dict[str, Any]:
        return answer_logits(self.model, tokens, out)

    def packing(self) -> dict[str, Any]:
        """Largest change of the first token's logits when the last token of its segment changes."""
        tokens = jnp.arange(1, 17)[None]
        ones = jnp.ones_like(tokens)

        def first(row: jax.Array) -> jax.Array:
            positions = jnp.arange(16)[None]
            return self.model(row, positions, None, None, segment_ids=ones)[0][0, 0]

        changed = first(tokens) - first(tokens.at[0, -1].set(99))
        return {"change": float(jnp.abs(changed).max())}

    def prepare(
        self, rows: str, micro_sizes: list[int], learning_rate: float, num_samples: int
    ) -> dict[str, Any]:
        """Compiles, and takes the micro-batch size that is fastest a row.

        Args:
          rows: file of numpy: `prompts`, `responses` (padded with 0), `lengths`, `advantages` of
            each row, `behaviour` log-probabilities.
          micro_sizes: rows of a micro-batch to try; each divides the number of rows.
          learning_rate: of AdamW.
          num_samples: responses of a problem.
        """
        with np.load(rows) as given:
            self.rows = dict(given)
        self.learning_rate, self.num_samples = learning_rate, num_samples
        made = {}
        for size in micro_sizes:
            self.micro, self.trainer = size, self._made(size)
            made[size] = self.trainer
            # Accumulating and updating are one program, and the second call of it is the first
            # that is given what the program itself returned.
            self._train(self._examples()[:2])
        taken: dict[int, float] = {}
        for _ in range(2):
            for size in micro_sizes:
                self.micro, self.trainer = size, made[size]
                examples = self._examples()[:1]
                began = time.perf_counter()
                self._train(examples)
                seconds = (time.perf_counter() - began) / size
                taken[size] = min(seconds, taken.get(size, seconds))
        best = min(taken, key=lambda size: taken[size])
        self.micro, self.trainer = best, made[best]
        # All micro-batches once: the run then updates with its last one.
        rest = self._examples()[4:]
        if rest:
            self._train(rest)
        shown = ", ".join(f"{size}: {1000 * seconds:.0f} ms" for size, seconds in taken.items())
        return {
            "settings": f"jitted train step, grpo loss, beta 0, AdamW, float32, no remat, "
            f"{len(os.sched_getaffinity(0))} threads, rows padded to "
            f"{self.rows['prompts'].shape[1]} + {self.rows['responses'].shape[1]}, micro-batches "
            f"of {best} rows (a row takes, by size, least of 2 timings in turn: {shown}), one "
            "optimizer update"
        }

    def run(self) -> dict[str, Any]:
        """All rows once, which is one optimizer update."""
        examples = self._examples()
        began = time.perf_counter()
        self._train(examples)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "amount": int(self.rows["lengths"].sum())}

    def _made(self, micro: int) -> Trainer:
        """A trainer for micro-batches of so many rows, which updates once they are all done."""
        config = GRPOConfig(num_generations=self.num_samples, beta=0.0, epsilon=0.2)
        config.temperature = 1.0
        loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(self.learning_rate, weight_decay=0.01)
        )
        trainer = Trainer(
            self.model,
            optimizer,
            TrainingConfig(
                eval_every_n_steps=1_000_000,
                gradient_accumulation_steps=len(self.rows["lengths"]) // micro,
            ),
            custom_checkpoint_metadata_fn=dict,
        )
        # Its learner holds it open over many calls of `train`.
        trainer.is_managed_externally = True
        vocab = self.model.config.vocab_size
        trainer.with_loss_fn(
            lambda model, train_example, algo_config: loss(
                model, train_example, algo_config=config, pad_id=0, eos_id=vocab
            ),
            has_aux=True,
        )
        trainer.with_gen_model_input_fn(
            lambda example: {"train_example": example, "algo_config": config}
        )
        return trainer

    def _examples(self) -> list[TrainExample]:
        rows, size = self.rows, self.micro
        examples = []
        for start in range(0, len(rows["lengths"]), size):
            part = slice(start, start + size)
            prompts, responses = rows["prompts"][part], rows["responses"][part]
            examples.append(
                TrainExample(
                    prompt_ids=jnp.asarray(prompts),
                    prompt_mask=jnp.asarray(prompts != 0),
                    completion_ids=jnp.asarray(responses),
                    completion_mask=jnp.asarray(responses != 0),
                    advantages=jnp.asarray(rows["advantages"][part]),
                    ref_per_token_logps=None,
                    old_per_token_logps=jnp.asarray(rows["behaviour"][part]),
                )
            )
        return examples

    def _train(self, examples: list[TrainExample]) -> None:
        self.trainer.train(examples)
        jax.block_until_ready(nnx.state(self.trainer.model))


if __name__ == "__main__":
    side = Side()
    COMMANDS = {
        "load": side.load, "logits": side.logits, "packing": side.packing,
        "prepare": side.prepare, "run": side.run,
    }  # fmt: skip
    serve(COMMANDS)
