"""Builds what a run needs from its settings: policy, problems, prompts, judge."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from attnrl_jax.datasets.cleaning import PromptLimit
from attnrl_jax.datasets.files import FieldNames
from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.datasets.names import is_prepared_folder, read_held_out, resolve, split_names
from attnrl_jax.datasets.preparation import Prepared, only_overlap, prepare
from attnrl_jax.datasets.prepared import find_prepared, open_prepared, read_metadata
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.models.attention import check_route
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import load_params
from attnrl_jax.sharding import parameter_shardings
from attnrl_jax.tasks.graph import GraphSource
from attnrl_jax.tasks.judging import ExactJudge, Judge, MathJudge
from attnrl_jax.tasks.problems import DataError, Problem, Source
from attnrl_jax.tasks.prompts import build_prompt, prompt_version
from attnrl_jax.tasks.rewards import RewardJudge
from attnrl_jax.tasks.tokenizer import Tokenizer, load_tokenizer
from attnrl_jax.training.setup import Task
from experiments.parts import Parts
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
      prepared: training problems of files, with the report of their cleaning; None for generated
        ones.
    """

    task: Task
    held_out_skipped: int
    prepared: Prepared | None


def load_policy(settings: Settings, mesh: Mesh) -> Policy:
    """Model, parameters and tokenizer of the policy to start from.

    Raises:
      ModelError, ValueError: the folder cannot be used, its model is too short for the budgets, or
        `model.attention` names a route that model or devices do not have.
    """
    folder = model_folder(settings.model.path) if settings.model.path else shipped_policy()
    chosen = settings.model
    model = replace(
        read_config(folder, chosen.dtype),
        attention=chosen.attention,
        block_length=chosen.block_length,
        remat=chosen.remat,
    )
    check_route(model, mesh.devices.flat[0].platform)
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


def build_task(settings: Settings, policy: Policy, parts: Parts | None = None) -> BuiltTask:
    """Problems, prompts and judge.

    Args:
      settings: of the run.
      policy: whose tokenizer makes the prompts.
      parts: of the user's own, if any.

    Raises:
      DataError: problems that cannot be used.
    """

    parts = parts or Parts()

    def prompt(problem: Problem) -> np.ndarray:
        return build_prompt(problem.text, policy.tokenizer, settings.prompt)

    def fits(problem: Problem) -> bool:
        return 0 < len(prompt(problem)) <= settings.train.prompt_budget

    source: Source
    judge: Judge
    cleaned = None
    if parts.problems is not None:
        source = parts.problems
        held_out = list(parts.held_out or ())[: settings.data.held_out_size]
        judge = MathJudge(settings.judging)
    elif settings.data.train:
        limit = PromptLimit(lambda problem: len(prompt(problem)), settings.train.prompt_budget)
        cleaned, held_out = _prepare(settings, policy, limit)
        source = open_prepared(cleaned.folder)
        judge = MathJudge(settings.judging)
    else:
        source = GraphSource(settings.graph, "train", settings.train.seed, GRAPH_PROBLEMS)
        evaluated = GraphSource(settings.graph, "held_out", 0, settings.data.held_out_size)
        held_out = [evaluated[i] for i in range(len(evaluated))]
        judge = ExactJudge()
    if parts.reward is not None:
        judge = RewardJudge(parts.reward, settings.judging)
    fitting = [problem for problem in held_out if fits(problem)]
    if not fitting:
        raise DataError(f"no held-out problem fits prompt_budget={settings.train.prompt_budget}")
    stream = ProblemStream(source, settings.train.seed, {"prompt": fits})
    segmenter = parts.cut(policy.tokenizer)
    task = Task(stream, fitting, policy.tokenizer, prompt, judge, segmenter)
    return BuiltTask(task, len(held_out) - len(fitting), cleaned)


def _prepare(
    settings: Settings, policy: Policy, limit: PromptLimit
) -> tuple[Prepared, list[Problem]]:
    """Training problems, cleaned and written unless they were before, and held-out problems."""
    data = settings.data
    names = split_names(data.train)
    cleaning, held_names = data.cleaning, split_names(data.held_out)
    if len(names) == 1 and is_prepared_folder(names[0]):
        # Cleaned when it was prepared, as was chosen then; what is evaluated now is checked anew.
        if data.fields != FieldNames():
            raise SettingError(f"data.fields has no effect on prepared problems: {names[0]}")
        cleaning = only_overlap(cleaning)
        folder = find_prepared(names[0])
        set_aside = folder is not None and "held_out" in read_metadata(folder)["problems"]
        if set_aside and not held_names:
            held_names = (f"{folder}@held_out",)
    prepared = prepare(
        names,
        data.cache or problem_cache(),
        fields=data.fields,
        cleaning=cleaning,
        benchmarks=split_names(data.benchmarks) + held_names,
        prompt_limit=limit,
        prompt_version=prompt_version(
            policy.folder, settings.prompt, policy.model.vocab_size, settings.model.tokenizer
        ),
        held_out=0 if held_names else data.held_out_size,
    )
    if held_names:
        parts = [part for name in held_names for part in read_held_out(resolve(name), data.fields)]
        held_out = [problem for _, problems in parts for problem in problems]
    else:
        split = open_prepared(prepared.folder, "held_out")
        held_out = [split[i] for i in range(len(split))]
    return prepared, held_out[: data.held_out_size]


def problem_cache() -> Path:
    """The user's cache folder of prepared problems."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "attnrl_jax" / "problems"
