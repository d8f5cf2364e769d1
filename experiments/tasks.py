"""Builds what a run needs from its settings: policy, problems, prompts, judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from attnrl_jax.datasets.files import read_jsonl
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.models.weights import load_params
from attnrl_jax.tasks.graph import GraphSource
from attnrl_jax.tasks.judging import ExactJudge, MathJudge
from attnrl_jax.tasks.problems import DataError, Problem
from attnrl_jax.tasks.prompts import build_prompt
from attnrl_jax.tasks.tokenizer import Tokenizer, load_tokenizer
from attnrl_jax.training.stages import Task
from experiments.settings import SettingError, Settings

# Generated training problems: far more than any run draws.
GRAPH_PROBLEMS = 2**31


def shipped_policy() -> Path:
    """Folder of the small pretrained policy that comes with the project."""
    return Path(str(resources.files("experiments") / "assets" / "policy"))


def load_policy(settings: Settings) -> tuple[ModelConfig, Any, Tokenizer]:
    """Model, parameters and tokenizer of the policy to start from.

    Raises:
      ModelError, ValueError: the folder cannot be used, or is too short for the budgets.
    """
    folder = Path(settings.model.path) if settings.model.path else shipped_policy()
    model = read_config(folder, settings.model.dtype)
    needed = settings.train.prompt_budget + settings.train.response_budget
    if needed > model.max_length:
        raise SettingError(
            f"prompt_budget + response_budget is {needed}, but the model at {folder} has only "
            f"{model.max_length} positions"
        )
    tokenizer = load_tokenizer(folder, model.vocab_size, settings.model.tokenizer)
    return model, load_params(folder, model), tokenizer


def build_task(settings: Settings, tokenizer: Tokenizer) -> tuple[Task, int]:
    """Problems, prompts and judge; and how many held-out problems were skipped, as training
    problems are, because their prompts are empty or exceed the budget.

    Raises:
      DataError: a file of problems that cannot be used.
    """

    def prompt(problem: Problem) -> np.ndarray:
        return build_prompt(problem.text, tokenizer, settings.prompt)

    def fits(problem: Problem) -> bool:
        return 0 < len(prompt(problem)) <= settings.train.prompt_budget

    source: Sequence[Problem] | GraphSource
    if settings.data.train:
        source, held_out = _file_problems(settings)
        judge: ExactJudge | MathJudge = MathJudge(settings.judging)
    else:
        source = GraphSource(settings.graph, "train", settings.train.seed, GRAPH_PROBLEMS)
        evaluated = GraphSource(settings.graph, "held_out", 0, settings.data.held_out_size)
        held_out = [evaluated[i] for i in range(len(evaluated))]
        judge = ExactJudge()
    fitting = [problem for problem in held_out if fits(problem)]
    if not fitting:
        raise DataError(f"no held-out problem fits prompt_budget={settings.train.prompt_budget}")
    stream = ProblemStream(source, settings.train.seed, {"prompt": fits})
    return Task(stream, fitting, tokenizer, prompt, judge), len(held_out) - len(fitting)


def _file_problems(settings: Settings) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems of files; no text occurs in both."""
    train = read_jsonl(settings.data.train)
    if settings.data.held_out:
        held_out = read_jsonl(settings.data.held_out)[: settings.data.held_out_size]
    else:
        # The same problems for every seed, whatever the order of the file.
        by_hash = sorted(train, key=lambda p: hashlib.blake2b(p.text.encode()).digest())
        held_out = by_hash[: min(settings.data.held_out_size, len(train) // 5)]
    texts = {problem.text for problem in held_out}
    rest = [problem for problem in train if problem.text not in texts]
    if not rest:
        raise DataError(f"{settings.data.train}: every problem is also in {settings.data.held_out}")
    if not held_out:
        raise DataError(
            f"{settings.data.train}: {len(train)} problems are too few to set held-out ones aside; "
            "give data.held_out"
        )
    return rest, held_out
