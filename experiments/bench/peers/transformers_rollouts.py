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
from protocol import serve
from transformers import AutoModelForCausalLM, GenerationConfig

# How batches may be decoded: name to settings of `generate`. The faster one is taken.
VARIANTS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache, compiled": {"cache_implementation": "static"},
}


class Side:
    """The model, and the workload that was last prepared."""

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval()
        return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}

    def logits(self, tokens: str, out: str) -> dict[str, Any]:
        """Logits of one row of tokens; both are files of numpy."""
        rows = torch.from_numpy(np.load(tokens)).long()[None]
        np.save(out, self.model(rows).logits[0].float().numpy())
        return {}

    def prepare(self, workload: str, batch: int) -> dict[str, Any]:
        """Compiles and warms up, and takes the variant that decodes the first batch faster."""
        with np.load(workload) as given:
            self.prompts = torch.from_numpy(given["prompts"]).long()
            self.lengths = given["lengths"]
        self.batch = batch
        taken, self.failed = {}, {}
        for name in VARIANTS:
            self.variant = name
            try:
                for _ in range(2):
                    taken[name] = self._batch(0)
            except Exception as error:
                self.failed[name] = f"{type(error).__name__}: {error}"[:300]
        self.variant = min(taken, key=lambda name: taken[name])
        shapes = {int(self.lengths[start : start + batch].max()): start for start in self._starts()}
        for start in shapes.values():
            self._batch(start)
        seconds = ", ".join(f"{name} {s:.1f} s" for name, s in taken.items())
        failed = "".join(f"; {name} failed" for name in self.failed)
        return {
            "settings": f"{self.variant} (first batch: {seconds}{failed}), sdpa, float32, "
            f"{torch.get_num_threads()} threads, batches of {batch} to their longest",
            "failed": self.failed,
        }

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        for start in self._starts():
            self._batch(start)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "amount": int(self.lengths.sum())}

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
            **VARIANTS[self.variant],
        )
        result = self.model.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=config
        ).numpy()
        assert result.shape == (len(rows), rows.shape[1] + longest), result.shape
        return time.perf_counter() - began


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    side = Side()
    COMMANDS = {
        "load": side.load, "logits": side.logits, "prepare": side.prepare, "run": side.run,
    }  # fmt: skip
    serve(COMMANDS)
