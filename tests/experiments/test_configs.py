"""The shipped configurations: they build, and say what the paper and the arithmetic say."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import jax
import pytest

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from experiments.aot_table import read_results
from experiments.configs import (
    attnrl_graph,
    attnrl_graph_trees,
    attnrl_hf,
    qwen3_1p7b,
    r1_distill_qwen_1p5b,
    r1_distill_qwen_7b,
)
from experiments.settings import SettingError, build

CONFIGS = Path(attnrl_graph.__file__).parent
PAPER = (r1_distill_qwen_1p5b, r1_distill_qwen_7b, qwen3_1p7b)
# As published in the models' config.json.
SHAPES = {
    r1_distill_qwen_1p5b: ModelConfig(
        "qwen2", 151936, 1536, 28, 12, 2, 128, 8960, qkv_bias=True, max_length=131072
    ),
    r1_distill_qwen_7b: ModelConfig(
        "qwen2", 152064, 3584, 28, 28, 4, 128, 18944, qkv_bias=True, max_length=131072
    ),
    qwen3_1p7b: ModelConfig(
        "qwen3", 151936, 2048, 28, 16, 8, 128, 6144, qk_norm=True, tie_embeddings=True,
        max_length=40960,
    ),
}  # fmt: skip


def test_all_are_known_here():
    modules = (attnrl_graph, attnrl_graph_trees, attnrl_hf, *PAPER)
    files = {path.name for path in CONFIGS.glob("*.py")} - {"__init__.py", "paper.py"}
    assert files == {Path(module.__file__).name for module in modules}
    for module in modules:
        config = module.get_config()
        if module is attnrl_hf:
            with pytest.raises(
                SettingError, match=r"model.path must be given: --config.model.path="
            ):
                build(config)
            config.model.path, config.data.train = "DIR", "FILE.jsonl"
        build(config)
        for word in ("Command:", "Hardware:", "Time:", "Result:"):
            assert word in module.__doc__
        assert "@@" not in module.__doc__


@pytest.mark.parametrize("module", PAPER, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("method", ["attnrl", "treerl", "grpo"])
def test_the_papers_numbers(module, method):
    settings = build(module.get_config(method))
    train = settings.train
    assert settings.method == method
    assert (train.num_problems, train.num_responses) == (64, 6)
    assert (train.prompt_budget, train.response_budget) == (1024, 8192)
    assert (train.branching.num_positions, train.branching.num_continuations) == (2, 2)
    assert (train.branching.min_distance, train.branching.delta) == (512, 4)
    assert train.rows_per_problem == 30
    assert train.mini_batch_rows == 32 * 6
    assert (train.temperature, train.top_p, train.top_k) == (1.0, 1.0, 0)
    loss = train.loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 3.0)
    assert (loss.kl_beta, loss.aggregation) == (1e-3, "token-mean")
    optimizer = train.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_updates) == (1e-6, 0)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert optimizer.max_grad_norm == 1.0
    is_attnrl = method == "attnrl"
    assert train.schedule == ("off_policy" if is_attnrl else "on_policy")
    assert train.batch_size.adaptive == is_attnrl
    assert train.batch_size.alpha == 0.1
    assert train.expansion.filter_easy == train.expansion.expand_by_difficulty == is_attnrl
    assert train.branching.rule == {"attnrl": "fci", "treerl": "entropy", "grpo": "none"}[method]
    assert settings.prompt.instruction.endswith("output the final answer within \\boxed{}.")


def test_other_methods_are_named():
    with pytest.raises(SettingError, match=r"attnrl, treerl, grpo; got 'ppo'"):
        r1_distill_qwen_1p5b.get_config("ppo")


COMPILED = {
    r1_distill_qwen_1p5b: "r1_distill_qwen_1p5b_v5e_8",
    r1_distill_qwen_7b: "r1_distill_qwen_7b_v5p_16",
    qwen3_1p7b: "qwen3_1p7b_v5e_8",
}


@pytest.mark.parametrize("module", PAPER, ids=lambda module: module.__name__.split(".")[-1])
def test_memory_is_what_the_compiler_counted(module):
    """Of the settings as they are; and the parts that are arithmetic are that."""
    result = read_results()[COMPILED[module]]
    assert "--config." not in result["command"]
    programs = {program["name"]: program for program in result["programs"]}
    held = {name: size for p in programs.values() for name, size in p["held"].items()}
    config, words = module.get_config(), " ".join(module.__doc__.split())
    slots = config.sampler.slots

    def said(pattern: str) -> float:
        [number] = re.findall(pattern + r" (\d+\.\d\d)", words)
        return float(number) * 2**30

    def near(size: float) -> object:
        return pytest.approx(size, abs=0.006 * 2**30)

    for pattern, size in (
        ("parameters and AdamW", held["parameters"] + held["optimizer state"]),
        ("reference", held["reference"]),
        ("also gradients", held["gradients"]),
        ("and temporaries", programs["accumulate"]["temporaries"]),
        ("one a device\\):", programs["accumulate"]["total"]),
        ("bfloat16 copy", held["sampling copy"]),
        (f"cache of {slots} slots", held["decode state"]),
        ("at most", max(program["total"] for program in programs.values())),
    ):
        assert said(pattern) == near(size), pattern
    assert max(programs.values(), key=lambda p: p["total"])["name"] == "narrow"
    assert all(program["fits"] for program in programs.values())

    shape = SHAPES[module]
    params = jax.eval_shape(partial(init_params, shape), jax.random.key(0))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert said("parameters and AdamW") == pytest.approx(12 * size / 8, rel=0.01)
    tensor = config.mesh.sampling_tensor or 1
    assert said("bfloat16 copy") == pytest.approx(2 * size / tensor, rel=0.01)
    per_token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    cache = slots * config.sampler.cache_length * per_token / 8
    assert said(f"cache of {slots} slots") == pytest.approx(cache, rel=0.01)
    # Longest row of each device, and a whole row at least.
    assert config.micro_batch_tokens == 8 * config.sampler.cache_length
