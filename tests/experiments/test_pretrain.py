"""Pretraining's data: batches hold every difficulty, fit their buckets, and read as written."""

import dataclasses

import jax
import numpy as np
import pytest

from attnrl_jax.tasks import graph
from experiments import demonstrations, pretrain

TASK = graph.GraphTaskConfig()


@pytest.mark.parametrize("hasty", [False, True])
def test_batches_hold_every_difficulty_in_buckets_without_waste(hasty):
    tokenizer = pretrain.build_tokenizer()
    examples = demonstrations.demonstrations(TASK, tokenizer, seed=0, hasty=hasty)
    batch = next(demonstrations.batches(examples, TASK, copies=3))
    operations = []
    for bucket, (length, _) in zip(batch, demonstrations.bucket_lengths(TASK), strict=True):
        assert bucket["tokens"].shape[1] == length
        # A careful demonstration of the hardest problems of a bucket fills it to the last token.
        assert bucket["lengths"].max() <= length
        assert hasty or bucket["lengths"].max() == length
        rows = zip(bucket["tokens"], bucket["lengths"], bucket["prompts"], strict=True)
        for tokens, tokens_in_row, prompt in rows:
            words = tokenizer.decode(tokens[:tokens_in_row]).split(" ")
            assert words[prompt - 2] == graph.ASK
            assert words[prompt : prompt + 2] == words[prompt - 2 : prompt]
            assert words[-1] == graph.END
            assert graph.END not in words[:-1]
            assert graph.split_of(" ".join(words[:prompt])) == "pretrain"
            operations.append((prompt - 2 * TASK.given - 2) // 4)
    assert sorted(operations) == sorted(3 * list(range(2, 13)))


def test_careful_demonstrations_are_right_and_streams_differ():
    tokenizer = pretrain.build_tokenizer()
    short = dataclasses.replace(TASK, max_operations=3)
    texts = []
    for seed in (0, 0, 1):
        examples = demonstrations.demonstrations(short, tokenizer, seed=seed, hasty=False)
        texts.append([tokenizer.decode(next(examples)[0]) for _ in range(5)])
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2])


def test_first_layer_heads_start_out_looking_one_to_four_tokens_back():
    """Query and key biases alone, rotated to positions, must peak at the head's own distance."""
    config = pretrain.model_config()
    params = pretrain.initial_params(config, jax.random.key(0))
    attention = params["layers"]["self_attn"]
    query = np.asarray(attention["q_proj"]["bias"])[0].reshape(config.num_heads, -1)
    keys = np.asarray(attention["k_proj"]["bias"])[0].reshape(config.num_kv_heads, -1)
    half = config.head_dim // 2
    angles = np.arange(40)[:, None] * config.rope_theta ** (-np.arange(half) / half)

    def rotated(vector, angle):
        pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    for head in range(config.num_heads):
        key = keys[head // (config.num_heads // config.num_kv_heads)]
        scores = [
            rotated(query[head], angles[30]) @ rotated(key, angles[30 - d]) for d in range(30)
        ]
        assert int(np.argmax(scores)) == 1 + head % 4
    assert np.asarray(attention["q_proj"]["bias"])[1:].any() == np.False_
    assert np.std(params["embed_tokens"]["embedding"]) == pytest.approx(0.4, rel=0.05)


def test_a_folder_that_holds_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("kept")
    with pytest.raises(ValueError, match="not an empty folder"):
        pretrain.pretrain(tmp_path, pretrain.PretrainConfig())
    assert (tmp_path / "model.safetensors").read_text() == "kept"
