"""Builds what a run needs from its settings: policy, problems, prompts, judge."""

from __future__ import annotations

import os
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from attnrl_jax.datasets.cleaning import CleaningReport, PromptLimit
from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.datasets.names import read_names, split_names
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import (
    find_prepared,
    open_prepared,
    read_metadata,
    read_report,
)
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import load_params
from attnrl_jax.sharding import parameter_shardings
from attnrl_jax.tasks.graph import GraphSource
from attnrl_jax.tasks.judging import ExactJudge, MathJudge
from attnrl_jax.tasks.problems import DataError, Problem, Source
from attnrl_jax.tasks.prompts import build_prompt, prompt_version
from attnrl_jax.tasks.tokenizer import Tokenizer, load_tokenizer
from attnrl_jax.training.stages import Task
from experiments.settings import SettingError, Settings

# Generated training problems: far more than any run draws.
GRAPH_PROBLEMS = 2**31


def shipped_policy() -> Path:
    """Folder of the small pretrained policy that comes with the project."""
    return Path(str(resources.files("experiments") / "assets" / "policy"))


class Policy(NamedTuple):
    """The policy to start from: where it lies, its shape, parameters and tokenizer."""

    folder: Path
    model: ModelConfig
    params: Any
    tokenizer: Tokenizer


class BuiltTask(NamedTuple):
    """What is to be learnt.

    Attributes:
      task: problems, prompts and judge.
      held_out_skipped: held-out problems left out because their prompts are empty or exceed the
        budget, as training problems are.
      report: how the training problems were cleaned; None for generated ones.
    """

    task: Task
    held_out_skipped: int
    report: CleaningReport | None


def load_policy(settings: Settings, mesh: Mesh) -> Policy:
    """Model, parameters and tokenizer of the policy to start from.

    Raises:
      ModelError, ValueError: the folder cannot be used, or is too short for the budgets.
    """
    folder = model_folder(settings.model.path) if settings.model.path else shipped_policy()
    model = read_config(folder, settings.model.dtype)
    needed = settings.train.prompt_budget + settings.train.response_budget
    if needed > model.max_length:
        raise SettingError(
            f"prompt_budget + response_budget is {needed}, but the model at {folder} has only "
            f"{model.max_length} positions"
        )
    tokenizer = load_tokenizer(folder, model.vocab_size, settings.model.tokenizer)
    return Policy(folder, model, params_on_mesh(folder, model, mesh), tokenizer)


def params_on_mesh(folder: Path, model: ModelConfig, mesh: Mesh) -> Any:
    """Parameters of a folder: each goes to its place on the mesh as it is read, so that no device
    ever holds them all.

    Raises:
      ModelError: the folder's weights are not those of the model.
    """
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return load_params(folder, model, parameter_shardings(shapes, mesh))


def build_task(settings: Settings, policy: Policy) -> BuiltTask:
    """Problems, prompts and judge.

    Raises:
      DataError: problems that cannot be used.
    """

    def prompt(problem: Problem) -> np.ndarray:
        return build_prompt(problem.text, policy.tokenizer, settings.prompt)

    def fits(problem: Problem) -> bool:
        return 0 < len(prompt(problem)) <= settings.train.prompt_budget

    source: Source
    judge: ExactJudge | MathJudge
    report = None
    filters = {"prompt": fits}
    if settings.data.train:
        limit = PromptLimit(lambda problem: len(prompt(problem)), settings.train.prompt_budget)
        folder = _prepared_folder(settings, policy, limit)
        report = read_report(folder)
        source = open_prepared(folder)
        held_out = _held_out(settings, folder)
        texts = {problem.text for problem in held_out}
        filters["held_out"] = lambda problem: problem.text not in texts
        judge = MathJudge(settings.judging)
    else:
        source = GraphSource(settings.graph, "train", settings.train.seed, GRAPH_PROBLEMS)
        evaluated = GraphSource(settings.graph, "held_out", 0, settings.data.held_out_size)
        held_out = [evaluated[i] for i in range(len(evaluated))]
        judge = ExactJudge()
    fitting = [problem for problem in held_out if fits(problem)]
    if not fitting:
        raise DataError(f"no held-out problem fits prompt_budget={settings.train.prompt_budget}")
    stream = ProblemStream(source, settings.train.seed, filters)
    task = Task(stream, fitting, policy.tokenizer, prompt, judge)
    return BuiltTask(task, len(held_out) - len(fitting), report)


def _prepared_folder(settings: Settings, policy: Policy, limit: PromptLimit) -> Path:
    """Where the prepared training problems lie; they are prepared now if they were not before."""
    data = settings.data
    names = split_names(data.train)
    if len(names) == 1:
        folder = find_prepared(names[0])
        if folder is not None:
            return folder
    made = prepare(
        names,
        data.cache or problem_cache(),
        fields=data.fields,
        cleaning=data.cleaning,
        benchmarks=split_names(data.benchmarks) + split_names(data.held_out),
        prompt_limit=limit,
        prompt_version=prompt_version(
            policy.folder, settings.prompt, policy.model.vocab_size, settings.model.tokenizer
        ),
        held_out=0 if data.held_out else data.held_out_size,
    )
    return made.folder


def problem_cache() -> Path:
    """The user's cache folder of prepared problems."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "attnrl_jax" / "problems"


def _held_out(settings: Settings, folder: Path) -> list[Problem]:
    data = settings.data
    if data.held_out:
        held_out = read_names(split_names(data.held_out), data.fields)
    else:
        if "held_out" not in read_metadata(folder)["problems"]:
            raise DataError(
                f"{data.train}: no held-out problems are set aside here; give data.held_out"
            )
        split = open_prepared(folder, "held_out")
        held_out = [split[i] for i in range(len(split))]
    return held_out[: data.held_out_size]
