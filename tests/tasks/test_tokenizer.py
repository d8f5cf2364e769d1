"""Tokenizers: ends, separators and text, from folders of several shapes."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnrl_jax.branching.steps import end_of_thinking, segment_steps
from attnrl_jax.tasks.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "models" / "qwen2_tied"
SPECIAL = ["<pad>", "<end>", "<turn_end>", "<mark>"]


def write_folder(folder, *, think=True, config_end=1, generation_end=None, own_end=None):
    """A byte-level BPE with the merges that newlines need, as Qwen's has them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    # The last one is a blank line and the first byte of a letter of two.
    for merged in ("ĊĊ", ".Ċ", ".ĊĊ", "ab", "ĊĊÃ"):
        vocab[merged] = len(vocab)
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), (".", "Ċ"), ("a", "b"), ("ĊĊ", "Ã")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if think:
        backend.add_tokens(["</think>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=own_end).save_pretrained(folder)
    if config_end is not None:
        (folder / "config.json").write_text(
            json.dumps({"model_type": "qwen2", "eos_token_id": config_end})
        )
    if generation_end is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_end}))
    return folder


def test_round_trip_keeps_special_tokens_but_ends(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path), vocab_size=320)
    text = "ab ∠ <mark>7</think>\n\nend"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert SPECIAL.index("<mark>") in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1]) == text
    assert tokenizer.decode([*ids, 319, 1]) == text, "rows of the embedding without a token"
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


def test_text_is_not_cleaned_up(tmp_path):
    """Clean-up would turn "a , b" into "a, b", and the judge would read another text."""
    tokenizer = load_tokenizer(write_folder(tmp_path), vocab_size=320)
    text = "a , b ! do n't"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_separators_cover_the_models_vocabulary(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path), vocab_size=320)
    separators = tokenizer.separators()
    assert separators.blank_line.shape == separators.newline.shape == (320,)
    texts = [tokenizer.backend.decode([i]) for i in range(len(tokenizer.backend))]
    blank = {texts[i] for i in np.flatnonzero(separators.blank_line)}
    newline = {texts[i] for i in np.flatnonzero(separators.newline)}
    assert blank == {"\n\n", ".\n\n", "\n\n\ufffd"}
    assert newline == {"\n", "\n\n", ".\n", ".\n\n", "\n\n\ufffd"}
    assert texts[separators.end_think] == "</think>"
    assert tokenizer.separators() is separators


def test_steps_end_where_a_blank_line_is_part_of_an_id(tmp_path):
    """An id that ends inside a letter decodes to no valid text, and still ends a step."""
    tokenizer = load_tokenizer(write_folder(tmp_path), vocab_size=320)
    ids = tokenizer.encode("ab.\n\nab\n\nÃab</think>7")[None]
    steps = segment_steps(ids, np.array([1]), np.array([ids.shape[1]]), tokenizer.separators())
    parts = [tokenizer.decode(ids[0, steps[0] == step]) for step in range(1, steps.max() + 1)]
    assert parts == [".\n\n", "ab\n\n\ufffd", "\ufffdab</think>7"]
    assert end_of_thinking(ids, steps, tokenizer.separators()).tolist() == [3]


def test_think_in_several_ids_is_none(tmp_path):
    assert load_tokenizer(write_folder(tmp_path, think=False), 320).separators().end_think is None


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"config_end": 1}, (1,)),
        ({"config_end": [2, 1]}, (2, 1)),
        ({"config_end": 1, "generation_end": [2, 1]}, (2, 1)),
        ({"config_end": None, "own_end": "<turn_end>"}, (2,)),
    ],
)
def test_end_ids(tmp_path, ends, expected):
    assert load_tokenizer(write_folder(tmp_path, **ends), 320).end_ids == expected


def test_vocabulary_without_an_end(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*without an end token"):
        load_tokenizer(write_folder(tmp_path, config_end=None), 320)


@pytest.mark.parametrize(
    ("end", "said"),
    [(999, "end token 999 is outside"), ("x", "eos_token_id must be"), (True, "eos")],
)
def test_bad_end(tmp_path, end, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(write_folder(tmp_path, config_end=end), 320)


def test_vocabulary_smaller_than_the_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="the model's vocabulary only 100"):
        load_tokenizer(write_folder(tmp_path), 100)


def test_broken_files(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}.*config.json is not a JSON object"):
        load_tokenizer(folder, 320)
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer files cannot be read"):
        load_tokenizer(folder, 320)
    with pytest.raises(ValueError, match="no such model folder"):
        load_tokenizer(tmp_path / "none", 320)
    with pytest.raises(ValueError, match="'words'"):
        load_tokenizer(folder, 320, kind="words")


def test_folder_without_tokenizer_falls_back_on_bytes(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(GOLDEN, vocab_size=256)
    assert str(GOLDEN) in caplog.text
    assert tokenizer.end_ids == (2,)
    ids = tokenizer.encode("Größe\n\n")
    assert list(ids) == list("Größe\n\n".encode())
    assert tokenizer.decode([*ids, 2]) == "Größe\n\n"
    assert tokenizer.decode([0xFF, ord("a")]) == "\ufffda"
    assert 2 not in tokenizer.encode("a\x02b"), "text must not close a sequence"
    separators = tokenizer.separators()
    assert np.flatnonzero(separators.newline).tolist() == [10]
    assert not separators.blank_line.any()
    assert separators.end_think is None


def test_bytes_on_demand(tmp_path, caplog):
    folder = write_folder(tmp_path)
    tokenizer = load_tokenizer(folder, 320, kind="bytes")
    assert tokenizer.backend is None
    assert tokenizer.separators().newline.shape == (320,)
    assert caplog.text == ""
    with pytest.raises(ValueError, match="256 ids"):
        load_tokenizer(folder, 128, kind="bytes")
