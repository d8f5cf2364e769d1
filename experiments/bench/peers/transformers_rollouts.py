"""Hugging Face transformers `generate` on torch, driven in static batches.

Commands: see `protocol.py` and `COMMANDS` at the end.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
import transformers
from protocol import run_batches, serve
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

# How batches may be decoded; the fastest is taken.
VARIANTS = ("dynamic cache", "static cache", "static cache, torch.compile")


class Side:
    """The model, and the workload that was last prepared."""

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval()
        self.variant, self.tried = "", ""
        return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}

    def logits(self, tokens: str, out: str) -> dict[str, Any]:
        """Logits of one row of tokens; both are files of numpy."""
        rows = torch.from_numpy(np.load(tokens)).long()[None]
        np.save(out, self.model(rows).logits[0].float().numpy())
        return {}

    def prepare(self, workload: str, batch: int) -> dict[str, Any]:
        """Compiles and warms up; for the first workload, takes the variant that is fastest.

        Args:
          workload: file of numpy: `prompts` and `lengths` of each row.
          batch: rows of a batch.
        """
        with np.load(workload) as given:
            self.prompts = torch.from_numpy(given["prompts"]).long()
            self.lengths = given["lengths"]
        self.batch = batch
        if not self.variant:
            self._choose()
        longest = {
            int(self.lengths[start : start + batch].max()): start for start in self._starts()
        }
        for start in longest.values():
            self._batch(start)
        return {
            "settings": f"{self.variant} (chosen once for all workloads; {self.tried}), sdpa, "
            "float32, "
            f"{torch.get_num_threads()} threads, batches of {batch} to their longest"
        }

    def _choose(self) -> None:
        """Decodes the first batch with every variant: once to compile, then twice in turn."""
        taken: dict[str, float] = {}
        failed: dict[str, str] = {}
        for number in range(3):
            for name in VARIANTS:
                if name in failed:
                    continue
                self.variant = name
                try:
                    seconds = self._batch(0)
                except Exception as error:
                    failed[name] = type(error).__name__
                    taken.pop(name, None)
                    continue
                if number:
                    taken[name] = min(seconds, taken.get(name, seconds))
        self.variant = min(taken, key=lambda name: taken[name])
        tried = [f"{name} {seconds:.1f} s" for name, seconds in taken.items()]
        tried += [f"{name} failed: {error}" for name, error in failed.items()]
        self.tried = "first batch, least of 2 timings in turn: " + ", ".join(tried)

    def run(self) -> dict[str, Any]:
        return run_batches(self._batch, self._starts(), int(self.lengths.sum()))

    def _starts(self) -> range:
        return range(0, len(self.lengths), self.batch)

    def _batch(self, start: int) -> float:
        began = time.perf_counter()
        rows = self.prompts[start : start + self.batch]
        longest = int(self.lengths[start : start + self.batch].max())
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            **_variant(self.variant),
        )
        result = self.model.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=config
        ).numpy()
        assert result.shape == (len(rows), rows.shape[1] + longest), result.shape
        return time.perf_counter() - began


def _variant(name: str) -> dict[str, Any]:
    """Settings of `generate`."""
    if name == "dynamic cache":
        return {}
    settings: dict[str, Any] = {"cache_implementation": "static"}
    if name == "static cache, torch.compile":
        # By itself `generate` compiles on accelerators only.
        compile_config = CompileConfig(mode="default")
        compile_config._compile_all_devices = True
        settings["compile_config"] = compile_config
    return settings


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    side = Side()
    COMMANDS = {
        "load": side.load, "logits": side.logits, "prepare": side.prepare, "run": side.run,
    }  # fmt: skip
    serve(COMMANDS)
