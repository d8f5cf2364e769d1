"""Pretrains the small policy that the default run starts from.

    python -m experiments.pretrain --out=DIR

Two phases of next-token training on demonstrations of `attnrl_jax.tasks.graph`: careful ones until
look-up and arithmetic are learned, then a mixture with hasty steps, which leaves the policy a
habit that reinforcement learning can unlearn. Writes a Hugging Face folder and `report.json` with
what was measured on held-out problems.

Took 19 minutes on 2 shared CPU cores. Held-out accuracy at temperature 1 (1024 problems, seed 0):
0.997 after the careful phases, 0.480 after the mixture (0.95 with 2 operations, 0.18 with 12).
About a quarter of its steps are then hasty, and the values of those are little better than guesses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward, init_params, unembed
from attnrl_jax.models.weights import save_folder
from attnrl_jax.sampling.sampler import Request, SamplerConfig, sample
from attnrl_jax.tasks import graph
from attnrl_jax.tasks.judging import exact_match
from attnrl_jax.tasks.tokenizer import Tokenizer
from experiments import commands
from experiments.demonstrations import batches, demonstrations
from experiments.terminal import bars, make_console

RESPONSE_BUDGET = 160


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training on one kind of demonstrations.

    Attributes:
      name: shown while it runs.
      steps: optimiser steps.
      copies: demonstrations of each difficulty in a batch.
      max_operations: hardest problems; None is the task's own limit.
      hasty: whether demonstrations have hasty steps.
    """

    name: str
    steps: int
    copies: int
    max_operations: int | None = None
    hasty: bool = False


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Recipe of the shipped policy.

    Attributes:
      task: problems and habits of the demonstrations.
      seed: of the parameters and the demonstrations.
      clean: phases of careful demonstrations, under one learning-rate schedule. Look-up forms on
        short problems first, where there is little to confuse.
      clean_rate: peak learning rate of the clean phases; cosine to 5 % of it.
      mixture: the last phase, on the mixture of habits, with a schedule of its own.
      mixture_rate: its peak learning rate; cosine to 5 % of it.
      warm_up: steps of linear warm-up of each schedule.
      held_out: problems of the evaluations.
    """

    task: graph.GraphTaskConfig = dataclasses.field(default_factory=graph.GraphTaskConfig)
    seed: int = 0
    clean: tuple[Phase, ...] = (
        Phase("careful, short", 300, 20, max_operations=4),
        Phase("careful", 900, 4),
    )
    clean_rate: float = 2e-3
    mixture: Phase = Phase("careful and hasty", 600, 4, hasty=True)
    mixture_rate: float = 1.5e-3
    warm_up: int = 50
    held_out: int = 1024


def model_config() -> ModelConfig:
    """The policy's shape: 0.31 million parameters."""
    return ModelConfig(
        family="qwen2",
        vocab_size=len(graph.vocabulary()),
        width=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_width=256,
        tie_embeddings=True,
        qkv_bias=True,
        max_length=256,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: words are cut at spaces, a blank line is a token of its own."""
    ids = {token: number for number, token in enumerate(graph.vocabulary())}
    tokenizer = RawTokenizer(models.WordLevel(ids, unk_token=graph.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(graph.BLANK_LINE, "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
        ]
    )
    # Without a decoder tokens are joined by single spaces, which is how the texts are written.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=graph.END,
        pad_token=graph.PAD,
        unk_token=graph.UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=model_config().max_length,
    )


def initial_params(config: ModelConfig, key: jax.Array) -> Any:
    """Random parameters from which looking things up is learned quickly.

    Matrices keep the scale of their input (the usual standard deviation 0.02 is far too small at
    this width: attention by content hardly starts), residual outputs are scaled down by depth.
    Tied embeddings start large (standard deviation 0.4: with the usual 0.02 variable look-up never
    formed), and the first layer's query and key biases make head h look 1 + h mod 4 tokens back.
    """
    params = init_params(config, key)
    embedding = params["embed_tokens"]["embedding"]
    params["embed_tokens"]["embedding"] = embedding * (0.4 / 0.02)
    for group in ("self_attn", "mlp"):
        for name, layer in params["layers"][group].items():
            gain = (2 * config.num_layers) ** -0.5 if name in ("o_proj", "down_proj") else 1.0
            layer["kernel"] *= gain * layer["kernel"].shape[1] ** -0.5 / 0.02
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    amplitude = np.where(np.arange(half) < half // 2, 4.0, 0.0)
    key_bias = np.concatenate([amplitude, np.zeros(half)])
    query_bias = []
    for head in range(config.num_heads):
        angle = (1 + head % 4) * frequencies
        query_bias.append(np.concatenate([amplitude * np.cos(angle), -amplitude * np.sin(angle)]))
    attention = params["layers"]["self_attn"]
    for name, value in (
        ("q_proj", np.concatenate(query_bias)),
        ("k_proj", np.tile(key_bias, config.num_kv_heads)),
    ):
        attention[name]["bias"] = attention[name]["bias"].at[0].set(value)
    return params


def make_step(config: ModelConfig, optimizer: optax.GradientTransformation):
    """One jitted optimiser step on a batch; the loss is the mean over its response tokens."""

    def summed(params, bucket):
        output = forward(params, config, bucket["tokens"], bucket["lengths"])
        logits = unembed(params, config, output.hidden[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, bucket["tokens"][:, 1:])
        index = jnp.arange(1, bucket["tokens"].shape[1])[None, :]
        mask = (index >= bucket["prompts"][:, None]) & (index < bucket["lengths"][:, None])
        return jnp.sum(losses * mask), jnp.sum(mask)

    def loss_fn(params, batch):
        sums = [summed(params, bucket) for bucket in batch]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(
    params: Any,
    config: PretrainConfig,
    phases: Sequence[Phase],
    rate: float,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Progress,
) -> Any:
    """Trains through `phases` with AdamW under one warm-up and cosine to 5 % of `rate`."""
    total = sum(phase.steps for phase in phases)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, config.warm_up, total, 0.05 * rate)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    state = optimizer.init(params)
    step = make_step(model_config(), optimizer)
    for number, phase in enumerate(phases):
        task = config.task
        if phase.max_operations is not None:
            task = dataclasses.replace(task, max_operations=phase.max_operations)
        examples = demonstrations(task, tokenizer, seed + number, phase.hasty)
        data = batches(examples, task, phase.copies)
        bar = progress.add_task(phase.name, total=phase.steps)
        for done in range(1, phase.steps + 1):
            params, state, loss = step(params, state, next(data))
            # Reading the loss waits for the step: without it the bar would run ahead of the work.
            progress.update(bar, advance=1, description=f"{phase.name}: loss {float(loss):.4f}")
            if done % 100 == 0:
                progress.console.log(f"{phase.name}: step {done}, loss {float(loss):.4f}")
    return params


def evaluate(params: Any, task: graph.GraphTaskConfig, tokenizer: Tokenizer, size: int) -> Any:
    """Samples one response to each held-out problem at temperature 1 and looks at its steps.

    Args:
      params: of the policy.
      task: how problems are drawn.
      tokenizer: of the policy's folder, or `build_tokenizer` wrapped likewise.
      size: held-out problems, stratified by difficulty.

    Returns:
      a JSON object: `accuracy`; `accuracy_by_operations`; `named_before_last`, the share of wrong
      responses of which the generator names a first wrong step before the last; `hasty`, the share
      of solving steps without look-up; `steps` and `tokens` of a response, mean and largest.
    """
    config = model_config()
    source = graph.GraphSource(task, "held_out", size=size)
    problems = [source.graph(index) for index in range(size)]
    requests = [
        Request(
            prefix=np.asarray(tokenizer.encode(problem.text), np.int32),
            num_samples=1,
            budget=RESPONSE_BUDGET,
            seed=index,
        )
        for index, problem in enumerate(problems)
    ]
    responses, _ = sample(
        params, config, requests, tokenizer.end_ids, SamplerConfig(slots=128, cache_length=256)
    )
    right: dict[int, list[bool]] = {}
    named, hasty, steps, tokens = [], [], [], []
    for problem, (response,) in zip(problems, responses, strict=True):
        text = tokenizer.decode(response.tokens)
        paragraphs = [part.split() for part in text.split(graph.BLANK_LINE)]
        is_right = exact_match(text, (problem.answer,))
        right.setdefault(len(problem.definitions), []).append(is_right)
        if not is_right:
            first = graph.first_wrong_step(problem, text)
            named.append(first is not None and first < len(paragraphs))
        # A definition is 4 words, its value 2: no more means that nothing was looked up.
        hasty += [len(words) == 6 for words in paragraphs[1:-1]]
        steps.append(len(paragraphs))
        tokens.append(len(response.tokens))
    return {
        "accuracy": float(np.mean([r for rs in right.values() for r in rs])),
        "accuracy_by_operations": {k: float(np.mean(right[k])) for k in sorted(right)},
        "named_before_last": float(np.mean(named)) if named else None,
        "hasty": float(np.mean(hasty)),
        "steps": {"mean": float(np.mean(steps)), "largest": max(steps)},
        "tokens": {"mean": float(np.mean(tokens)), "largest": max(tokens)},
        "problems": size,
    }


def show(console: Console, careful: Any, mixture: Any) -> None:
    """Prints both evaluations side by side."""
    table = Table("held-out, temperature 1", "careful only", "shipped policy")
    table.add_row("accuracy", f"{careful['accuracy']:.3f}", f"{mixture['accuracy']:.3f}")
    for operations, value in mixture["accuracy_by_operations"].items():
        before = careful["accuracy_by_operations"][operations]
        table.add_row(f"  {operations} operations", f"{before:.3f}", f"{value:.3f}")
    for name in ("named_before_last", "hasty"):
        cells = ["-" if e[name] is None else f"{e[name]:.3f}" for e in (careful, mixture)]
        table.add_row(name, *cells)
    for name in ("steps", "tokens"):
        cells = [
            f"{e[name]['mean']:.1f} (at most {e[name]['largest']})" for e in (careful, mixture)
        ]
        table.add_row(f"{name} of a response", *cells)
    console.print(table)


def save(
    out: Path, params: Any, tokenizer: PreTrainedTokenizerFast, report: Mapping[str, Any]
) -> None:
    """Writes the Hugging Face folder and `report.json`, whole or not at all."""
    end = tokenizer.eos_token_id
    generation = {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id, "temperature": 1.0}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        folder = Path(staging) / out.name
        save_folder(folder, params, model_config(), end_ids=(end,))
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        folder.replace(out)


def pretrain(out: Path, config: PretrainConfig, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, saves the policy into `out`, and returns the report.

    Raises:
      ValueError: `out` exists and is not an empty folder.
      OSError: its parent cannot be written to.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out}: exists and is not an empty folder")
    # Found out now, and not after the training.
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()
    console = make_console(quiet)
    start = time.monotonic()
    backend = build_tokenizer()
    tokenizer = Tokenizer(backend, model_config().vocab_size, (backend.eos_token_id,))
    params = initial_params(model_config(), jax.random.key(config.seed))
    # Streams of demonstrations are told apart by their seed: one for each phase.
    stream = 100 * config.seed
    with bars(console, "steps") as progress:
        params = train(params, config, config.clean, config.clean_rate, backend, stream, progress)
        careful = evaluate(params, config.task, tokenizer, config.held_out)
        params = train(
            params, config, [config.mixture], config.mixture_rate, backend,
            stream + len(config.clean), progress,
        )  # fmt: skip
    mixture = evaluate(params, config.task, tokenizer, config.held_out)
    report = {
        "careful": careful,
        "mixture": mixture,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "config": dataclasses.asdict(config),
    }
    save(out, params, backend, report)
    show(console, careful, mixture)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{report['parameters']} parameters, {size / 2**20:.2f} MiB in {out}")
    return report


def main(arguments: argparse.Namespace) -> None:
    pretrain(arguments.out, PretrainConfig(seed=arguments.seed), arguments.quiet)


if __name__ == "__main__":
    parser = commands.parser(__doc__, "pretrain")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy into")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    commands.guarded(main, parser.parse_args(), "nothing was written; give the same command again")
