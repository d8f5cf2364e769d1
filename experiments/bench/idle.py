"""Stand-ins for the devices, and the load of a step: what `host` measures the host with.

Every jitted program of a training step is replaced by a function that returns arrays of the right
shape and kind and computes nothing; everything else is the program's own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np

from attnrl_jax import processes, scoring
from attnrl_jax.algorithms.adaptive import AdaptiveExpansionConfig, BatchSizeConfig
from attnrl_jax.algorithms.losses import LossMetrics
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.compilation.chips import CHIPS
from attnrl_jax.evaluation import judged_text
from attnrl_jax.sampling import sampler
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.tasks.judging import MathJudge
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training import loop, rounds, step
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import Scores
from experiments.bench.workloads import lognormal_lengths
from experiments.roofline import MODELS, Step, Workload, step_time

MODEL = MODELS["1.5B"]
PROBLEMS_PER_CHIP = 8
AGREE = processes.check_agreement


@dataclass(frozen=True)
class Load:
    """A step's problems and where they would run.

    Attributes:
      problems: of the step.
      hosts: processes, of which this is the first.
      prompt_budget, response_budget: tokens.
      prompt: mean tokens.
      median, sigma: of the lengths of whole responses, lognormal, cut at the budget.
      slots: of the sampler.
      vocab: ids.
      symbolic: one answer in so many is not a number, and handed to the judge's workers; at
        most 40, 0: none.
    """

    problems: int
    hosts: int = 1
    prompt_budget: int = 1024
    response_budget: int = 8192
    prompt: int = 150
    median: float = 4800.0
    sigma: float = 0.5
    slots: int = 0
    vocab: int = 151_000
    symbolic: int = 10

    @property
    def chips(self) -> int:
        return max(self.problems // PROBLEMS_PER_CHIP, 1)

    def device_step(self) -> Step:
        """The bound on the time of the devices, v5e."""
        found = step_time(MODEL, CHIPS["v5e"], self.chips, Workload(self.problems))
        assert found is not None
        return found

    def config(self) -> TrainConfig:
        """The paper's settings for so many problems on these chips."""
        problems = self.problems
        longest = self.prompt_budget + self.response_budget
        slots = self.slots or self.device_step().generate.settings["slots"]
        tokens = self.chips * longest
        return TrainConfig(
            num_problems=problems,
            prompt_budget=self.prompt_budget,
            response_budget=self.response_budget,
            # Ten updates a step, as the paper has with 64 problems.
            mini_batch_rows=3 * problems,
            micro_batch_tokens=tokens,
            score_batch_tokens=tokens,
            length_multiple=min(1024, longest),
            # Every response branches: as many rows as there can be.
            expansion=AdaptiveExpansionConfig(expand_by_difficulty=False),
            batch_size=BatchSizeConfig(adaptive=False),
            branching=BranchingConfig(min_distance=min(512, self.response_budget // 16)),
            sampler=SamplerConfig(
                slots=slots,
                length_bucket=min(1024, longest),
                cache_length=longest,
            ),
        )


def made_tokenizer(vocab: int, symbolic: int) -> tuple[Tokenizer, np.ndarray]:
    """A tokenizer of so many words, and ids of boxed answers.

    Returns:
      the tokenizer (id 0 ends a response, 1 is a blank line, 2 is `</think>`), and 40 ids of
      answers, of which one in `symbolic` is no number.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    inside = [f"{k}+x" if symbolic and k % symbolic == 0 else str(k) for k in range(40)]
    boxed = [f"Ġ\\boxed{{{text}}}" for text in inside]
    names = ["<end>", "ĊĊ", "</think>", *boxed]
    names += [f"Ġ{number:x}" for number in range(vocab - len(names))]
    backend = Backend(models.WordLevel({name: k for k, name in enumerate(names)}, "<end>"))
    backend.decoder = decoders.ByteLevel()
    made = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), vocab, (0,))
    return made, np.arange(3, 3 + len(boxed))


class IdleDevices:
    """Stands in for every jitted program of a step; and for the judge, which it times.

    Args:
      load: of the step.
      tokenizer, answers: of `made_tokenizer`.
      judge: that answers are handed to.

    Attributes:
      own: seconds of its own, by the stage they fell into.
      parts: seconds of the program, by name, that lie inside a stage or in none: `judge` (text of
        responses, and handing it over), `agree` (hashes that processes compare).
      waited: seconds for the workers of the judge.
      sent, fetched_rows, fetched_slots: bytes that this process sends to its devices, and that it
        gets from all by scoring and by the sampler.
      dispatches: calls of the decode loop.
      sampled: responses that ended.
      judges: whether answers are judged at all.
      responses: lengths of the initial responses that branch in this step.
    """

    def __init__(self, load: Load, tokenizer: Tokenizer, answers: np.ndarray, judge: MathJudge):
        self.load, self.tokenizer, self.answers, self.judge = load, tokenizer, answers, judge
        self.judges = True
        self.responses = np.zeros(0, np.int32)
        self._rng = np.random.default_rng(0)
        lengths = (2**12, load.median, load.sigma, load.response_budget)
        self._lengths = lognormal_lengths(self._rng, *lengths)
        self._slots: list[np.ndarray] = []
        self._noise: dict[tuple[int, ...], np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.waited = 0.0
        self.sent = self.fetched_rows = self.fetched_slots = self.dispatches = self.sampled = 0
        self.own: dict[str, float] = defaultdict(float)
        self.parts: dict[str, float] = defaultdict(float)
        self._stage = "other"

    def on_stage(self, name: str) -> None:
        """A stage begins. What is judged is judged by then: waiting is the workers' time."""
        began = time.perf_counter()
        while name == "judge" and self.judge._inflight:
            time.sleep(0.001)
        self.waited += time.perf_counter() - began
        self._stage = name

    @contextmanager
    def instead(self) -> Iterator[None]:
        """While it lasts, no jitted program runs."""
        share = {"row_multiple": self.load.chips}
        changes: dict[Any, dict[str, Any]] = {
            sampler: {
                "decode_params": lambda *_: None, "empty_state": self._empty_state,
                "prefill": lambda *_: None, "insert": self._insert, "generate": self._generate,
                "narrow": self._narrow, "take_slots": self._take_slots,
                "_batch_devices": lambda: 1,
            },
            scoring: {"score_packed": self._score},
            step: {
                "no_gradients": lambda params: (None, self._sums()),
                "reference_logprobs": lambda *_: None,
                "accumulate": lambda *_: (None, self._sums()),
                "apply_gradients": lambda state, *_: (state, np.float32(1)),
            },
            rounds: {
                "layout": lambda mesh: share,
                "judged_text": self._timed("judge", self._judged_text),
            },
            loop: {"layout": lambda mesh: share},
            processes: {
                "to_host": self._to_host, "rows_to_devices": self._to_devices,
                "own_rows": self._own_rows, "total": self._total, "share": self._share,
                "from_shares": self._from_shares,
                "check_agreement": self._timed("agree", self._check_agreement),
            },
        }  # fmt: skip
        with ExitStack() as held:
            for module, attributes in changes.items():
                counted = {
                    name: self._counted(function)
                    if module in (sampler, scoring, step) and name != "_batch_devices"
                    else function
                    for name, function in attributes.items()
                }
                held.enter_context(mock.patch.multiple(module, **counted))
            yield

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.own[self._stage] += time.perf_counter() - began
            return result

        return counted

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.parts[name] += time.perf_counter() - began
            return result

        return timed

    def _judged_text(self, *arguments: Any) -> str:
        return judged_text(*arguments) if self.judges else ""

    def submit(self, items: Sequence[Any]) -> Any:
        """As `Judge.submit`."""
        return self._timed("judge", self.judge.submit)(items)

    def _share(self, items: int) -> np.ndarray:
        return np.arange(items) % self.load.hosts == 0

    def _own_rows(self, rows: int, sharding: Any) -> np.ndarray:
        return np.arange(-(-rows // self.load.hosts))

    def _from_shares(self, tree: Any, items: int) -> Any:
        """Problems of the others branch as those of this process do, as far as they go."""
        began = time.perf_counter()
        positions, level = jax.tree.map(
            lambda x: np.repeat(x, self.load.hosts, axis=0)[:items], tree
        )
        length = self.responses.reshape(items, -1, 1)
        positions = replace(positions, offsets=np.minimum(positions.offsets, length - 1))
        self.own[self._stage] += time.perf_counter() - began
        return positions, level

    def _sums(self) -> LossMetrics:
        return LossMetrics(*[np.float32(1)] * len(fields(LossMetrics)))

    def _to_host(self, tree: Any) -> Any:
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))
        if isinstance(tree, tuple):
            self.fetched_slots += size
            return tree
        self.fetched_rows += size
        began = time.perf_counter()
        # Memory of its own, as what is fetched has.
        tree = jax.tree.map(np.copy, tree)
        self.own[self._stage] += time.perf_counter() - began
        return tree

    def _to_devices(self, tree: Any, own: Any, rows: int, sharding: Any) -> Any:
        self.sent += sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))
        return tree

    def _total(self, tree: tuple[np.ndarray, np.ndarray]) -> Any:
        """Verdicts of all processes: two of five are right."""
        rewards, counts = tree
        return (self._rng.random(len(rewards)) < 0.4).astype(np.float32), counts

    def _check_agreement(self, what: str, values: Any) -> None:
        """That of several processes, of which the other agrees."""
        if self.load.hosts == 1:
            return
        both = mock.patch.object(processes, "of_all", lambda x: np.stack([x, x]))
        with both, mock.patch.object(processes, "count", return_value=2):
            AGREE(what, values)

    def _score(self, params: Any, config: Any, packed: Any, wanted: Any, *_: Any, **__: Any) -> Any:
        rows = self.load.chips * -(-len(wanted) * self.load.hosts // self.load.chips)
        shape = (rows, wanted.shape[1])
        if shape not in self._noise:
            self._noise[shape] = self._rng.random(shape, dtype=np.float32)
        return Scores(-self._noise[shape], self._noise[shape], self._noise[shape])

    def _empty_state(self, model: Any, slots: int, length: int, groups: int) -> Any:
        if not self._slots:
            tokens = self._rng.integers(50, self.tokenizer.vocab_size, (slots, length), np.int32)
            # A step has about 60 tokens.
            tokens[self._rng.random((slots, length), dtype=np.float32) < 1 / 60] = 1
            self._slots = [tokens, np.full((slots, length), -1, np.float32)]
        # Always the same arrays, which are no memory of the program.
        tokens, logprobs = self._slots
        whole = {name: np.zeros(slots, np.int64) for name in ("length", "limit", "end")}
        flags = {name: np.zeros(slots, bool) for name in ("active", "ended")}
        return SimpleNamespace(tokens=tokens, logprobs=logprobs, **whole, **flags)

    def _insert(self, state: Any, key_values: Any, tokens: Any, entering: Any) -> Any:
        there = entering.slot < len(state.active)
        slot = entering.slot[there]
        state.length[slot], state.limit[slot] = entering.length[there], entering.limit[there]
        drawn = entering.seed[there, 0].astype(np.int64) + 977 * entering.sample[there]
        whole = self._lengths[drawn % len(self._lengths)]
        # A path is as long as a response, wherever it was branched.
        gone = self.load.response_budget - (state.limit[slot] - state.length[slot])
        state.end[slot] = state.length[slot] + np.maximum(whole - gone, 1)
        state.active[slot], state.ended[slot] = True, state.end[slot] < state.limit[slot]
        return state

    def _generate(
        self, params: Any, model: Any, state: Any, ends: Any, most: Any, refill: Any, *_: Any
    ) -> tuple[Any, int]:
        self.dispatches += 1
        left = np.sort((state.end - state.length)[state.active])
        steps = int(min(most, left[min(int(refill), len(left)) - 1]))
        state.length = np.where(state.active, np.minimum(state.length + steps, state.end),
                                state.length)  # fmt: skip
        closed = np.flatnonzero(state.active & (state.length == state.end))
        self.sampled += len(closed)
        for place, token in ((-3, 2), (-2, self.answers[closed % len(self.answers)]), (-1, 0)):
            state.tokens[closed, state.end[closed] + place] = token
        state.active = state.active & (state.length < state.end)
        return state, steps

    def _take_slots(self, state: Any, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return state.tokens[slots], state.logprobs[slots]

    def _narrow(self, state: Any, kept: np.ndarray) -> Any:
        return SimpleNamespace(**{name: x[kept.reshape(-1)] for name, x in vars(state).items()})
