"""The benchmark of an accelerator, on a tiny bfloat16 model and the CPU. Nothing timed."""

from __future__ import annotations

import math
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from experiments.bench import __main__ as command
from experiments.bench import accelerator, limits
from experiments.bench.harness import Context, run_part

TINY = ModelConfig(
    family="qwen2", vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_width=16, qkv_bias=True, tie_embeddings=True, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def context(tmp_path):
    with ExitStack() as closing:
        yield Context(tmp_path, 1, "cpu", tmp_path, "", print, closing)


def kernels():
    """Sizes of the tiny model's matrices, but for the embedding."""
    shapes = jax.eval_shape(lambda key: init_params(TINY, key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")


def measured(part):
    """Amounts by contender, and facts by name, of one round; all are numbers."""
    result = run_part(part, 1, print, pause=0)
    facts = {fact["name"]: fact["value"] for fact in result["facts"]}
    assert all(math.isfinite(number) and number > 0 for number in facts.values())
    amounts = {c["name"]: c["rounds"][0]["amount"] for c in result["contenders"]}
    return amounts, facts, [c["settings"] for c in result["contenders"]]


def test_limits_of_an_accelerator_by_hand():
    """Matrices are all but embedding, scales and biases; a tied embedding is one of them."""
    unembedding = 16 * 64
    matrices = kernels() + unembedding
    assert limits.matrix_params(TINY) == matrices
    # 2 layers, 1 head of keys and values of 8, bfloat16.
    cache = 2 * 2 * 8 * 3 * 10 * 2
    assert limits.step_bytes(TINY, 3, 10) == 2 * matrices + cache
    # Each token sees half of 5 tokens on average: 2 products, 2 layers, 16 wide, 2 operations.
    attention = 2 * 2 * 16 * 5
    assert limits.forward_flops(TINY, 3, 5) == 15 * (2 * matrices + attention)
    some = 15 * (2 * kernels() + attention) + 3 * 2 * 2 * unembedding
    assert limits.forward_flops(TINY, 3, 5, logits=2) == some


def test_copies_and_products_need_the_one_before():
    x, y, z = jax.random.normal(jax.random.key(0), (3, 4, 4))
    assert limits._copied(x, np.float32(2), np.int32(3)) == pytest.approx(np.asarray(x) + 6)
    product = np.linalg.multi_dot([np.asarray(m) for m in (x, y, z, y, z)])
    assert limits._multiplied(x, y, z, np.int32(2)) == pytest.approx(product, rel=1e-4, abs=1e-5)
    assert limits.copy_bandwidth(4096) > 0
    assert limits.tree_bytes([jnp.zeros((2, 3)), jnp.zeros(4, jnp.bfloat16)]) == 24 + 8


def test_allotted_bytes_count_what_is_given_away_once():
    x = jnp.zeros(1000)
    kept = jax.jit(lambda x: x + 1).lower(x).compile()
    given = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert limits.allotted_bytes(kept) - limits.allotted_bytes(given) == 4000
    assert limits.allotted_bytes(given) >= 4000


def test_no_absolute_numbers_of_a_cpu(tmp_path, monkeypatch):
    arguments = command.make_parser().parse_args(["accelerator", f"--out={tmp_path}"])
    monkeypatch.setattr(command, "use_cores", lambda threads: None)
    with pytest.raises(ValueError, match="--platform=cuda or tpu"):
        command.bench(arguments, [], command.Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_decoding_of_a_tiny_model(context):
    part = accelerator.decode_part(context, TINY, ((2, 8), (3, 16)), steps=4, copied=4096)
    amounts, facts, _ = measured(part)
    assert amounts == {"batch 2, context 8": 8.0, "batch 3, context 16": 12.0}
    for batch, length in ((2, 8), (3, 16)):
        name = f"batch {batch}, context {length}"
        assert f"of the limit, {name}" in facts
        least = limits.step_bytes(TINY, batch, length + 4)
        assert least < facts[f"memory, {name}"] * limits.GIBI < 100 * least


def test_scoring_of_a_tiny_model(context):
    part = accelerator.score_part(context, TINY, (2, 64), product=64)
    amounts, facts, settings = measured(part)
    assert amounts == {"with FCI": 128.0, "without": 128.0}
    assert {"MFU, with FCI", "MFU, without", "memory, with FCI", "memory, without"} <= set(facts)
    assert settings == ["steps of 32 tokens, attention route plain", "attention route plain"]


def test_updates_of_a_tiny_model(context):
    part = accelerator.update_part(context, TINY, (4, 64), product=64)
    amounts, facts, (settings,) = measured(part)
    assert amounts == {"update": 256.0}
    assert "MFU" in facts
    assert "rows packed without sharing, 4 x 64 tokens a micro-batch" in settings
    assert "in sequences of 256, attention route blockwise; 56 of the 64 tokens" in settings
    # Two float32 moments of every parameter, and counters of AdamW and of the schedule.
    shapes = jax.eval_shape(lambda key: init_params(TINY, key), jax.random.key(0))
    moments = 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert facts["of it the optimizer state"] * limits.GIBI == moments + 2 * 4
    gradient = facts["memory, gradient of a micro-batch, and the optimizer state"]
    # Parameters, gradients and both moments at least.
    assert min(gradient, facts["memory, optimizer step"]) * limits.GIBI >= 2 * moments


def test_attention_routes(monkeypatch):
    assert accelerator.attention_route(TINY, 64, "single") == "plain"
    assert accelerator.attention_route(TINY, 128, "single") == "blockwise"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert accelerator.attention_route(TINY, 128, "single") == "cudnn"
    assert accelerator.attention_route(TINY, 128, "packed") == "blockwise"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert accelerator.attention_route(TINY, 128, "packed") == "splash"
    assert accelerator.attention_route(TINY, 128, "tree") == "blockwise"
