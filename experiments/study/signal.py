"""What a sampled token tells a method of the way uphill (docs/study.md).

The gradients that a method makes of some thousand tokens scatter around their mean. How far each
points where the gradient of the expected reward does is measured without the noise of whole
training runs: parameters stay as they are, and every step is another sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from rich.console import Console

from attnrl_jax.evaluation import Estimate, estimate
from attnrl_jax.sharding import make_mesh
from attnrl_jax.training.loop import start, train_step
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import init_state
from experiments.configs import attnrl_graph_trees
from experiments.folders import write_atomically
from experiments.settings import build
from experiments.study import bootstrap
from experiments.study.protocol import FIRST, SECOND
from experiments.tasks import Policy, build_task
from experiments.terminal import working

# Of every method, and of what they are held against.
TOKENS, TRUTH_TOKENS = 300_000, 900_000
# Problems that no run has met.
SEED, TRUTH_SEED = 200, 201
# The mean of all: one update a step, whose gradient is kept as Adam's first moment.
_KEPT = {
    "mini_batch_rows": 100_000,
    "optimizer.b1": 0.0,
    "optimizer.learning_rate": 0.0,
    "optimizer.max_grad_norm": 1e9,
    "batch_size.adaptive": False,
    "schedule": "on_policy",
}
# No branch (no step is so far away): a row's advantage is its reward less the problem's mean
# (twice), so the gradient is that of the expected reward. Of many problems, by which gradients
# differ most.
_TRUTH = {
    "method": "random",
    "num_problems": 40,
    "num_responses": 8,
    "branching.min_distance": 100_000,
}


@dataclass(frozen=True)
class Gradients:
    """Those of the steps of a method, at the same parameters.

    Attributes:
      values: of each step; 0 where nothing was trained on.
      tokens: that each step sampled.
    """

    values: Float[np.ndarray, "step parameter"]
    tokens: Float[np.ndarray, "step"]


def contenders() -> dict[str, dict[str, Any]]:
    """Methods by name, each with steps of about 5,000 sampled tokens."""
    first, second = FIRST.methods, SECOND.methods
    return {
        "GRPO, 8 responses": {**second["GRPO, 8 responses"], "num_problems": 9},
        "GRPO, 16 responses": {**second["GRPO, 16 responses"], "num_problems": 4},
        "GRPO, 30 responses": {**first["GRPO"], "num_problems": 2},
        "TreeRL": {**first["TreeRL"], "num_problems": 4},
        "AttnRL": {**first["AttnRL"], "num_problems": 4},
        "AttnRL, small trees": {**second["AttnRL"], "num_problems": 10},
        "AttnRL, small trees, random steps": {**second["AttnRL, random steps"], "num_problems": 10},
    }


def gradients(policy: Policy, overrides: Mapping[str, Any], tokens: int, seed: int) -> Gradients:
    """Steps of a method until so many tokens are sampled; the policy stays as it is.

    Args:
      policy: whose gradients they are.
      overrides: of the study's configuration.
      tokens: sampled, at least.
      seed: of problems and noise.
    """
    config = attnrl_graph_trees.get_config()
    config.update_from_flattened_dict({**overrides, **_KEPT, "seed": seed})
    settings = build(config)
    mesh = make_mesh(settings.mesh)
    values, sampled = [], []
    task = build_task(settings, policy).task
    train = replace(settings.train, steps=10**6)
    with closing(task.judge), jax.set_mesh(mesh):
        setup = Setup(task, policy.model, train, mesh)
        state = start(setup, init_state(policy.params, train.optimizer, mesh))
        while state.sampled_tokens < tokens:
            before = int(state.train.updates)
            state, report = train_step(state, setup)
            moment = ravel_pytree(optax.tree.get(state.train.opt_state, "mu"))[0]
            updated = int(state.train.updates) > before
            values.append(np.asarray(moment, np.float32) * updated)
            sampled.append(report.metrics["tokens/sampled"])
    return Gradients(np.stack(values), np.array(sampled))


def cosines(of: Gradients, truth: Gradients) -> Float[np.ndarray, "step"]:
    """Of each step's gradient and the mean of `truth`, each parameter weighed as Adam would (by the
    inverse of its gradient's root mean square in `truth`); 0 where a step has no gradient."""
    mean = truth.values.mean(0, dtype=np.float64)
    size = np.sqrt((truth.values.astype(np.float64) ** 2).mean(0))
    # A parameter that has no gradient (the embedding of an id that never comes) says nothing.
    weight = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    along = of.values @ (weight * mean)
    lengths = np.sqrt((of.values.astype(np.float64) ** 2) @ weight * (mean**2 @ weight))
    return np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)


def signal(cosine: Float[np.ndarray, "step"], tokens: Float[np.ndarray, "step"]) -> Estimate:
    """Signal to noise of the gradient of 10,000 sampled tokens, with its interval over steps.

    Where a step's gradient is the true one and independent noise, cos² / (1 - cos²) is signal over
    noise, which grows with the tokens of the step; so it is divided by these.
    """

    def of(cosine: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return 1e4 * cosine**2 / (1 - cosine**2) / tokens

    drawn = bootstrap.draws(len(cosine), seed=0) / len(cosine)
    value = of(cosine.mean(), tokens.mean())
    return estimate(float(value), of(drawn @ cosine, drawn @ tokens))


def write(results: Path, policies: Mapping[str, Callable[[], Policy]], console: Console) -> None:
    """Measures the methods that have not been measured yet, and writes `signal.json`: the cosine
    and the tokens of each step of each method, by policy.

    Args:
      results: folder of the outcomes.
      policies: what opens each, by name.
      console: shows what is measured.
    """
    path = results / "signal.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for policy_name, opened in policies.items():
        measured = found.setdefault(policy_name, {})
        left = {name: method for name, method in contenders().items() if name not in measured}
        if not left:
            continue
        policy = opened()
        with working(console, f"the true gradient of the policy {policy_name}"):
            truth = gradients(policy, _TRUTH, TRUTH_TOKENS, TRUTH_SEED)
        results.mkdir(parents=True, exist_ok=True)
        for name, method in left.items():
            with working(console, f"gradients of {name}"):
                of = gradients(policy, method, TOKENS, SEED)
            measured[name] = {
                "cosine": [round(float(x), 4) for x in cosines(of, truth)],
                "tokens": of.tokens.tolist(),
            }
            write_atomically(path, json.dumps(found) + "\n")
