"""Prompts with and without a chat template."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnrl_jax.tasks.answers import final_answer
from attnrl_jax.tasks.prompts import (
    PAPER_INSTRUCTION,
    PromptConfig,
    build_prompt,
    opened_reasoning,
)
from attnrl_jax.tasks.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'system' and refuse %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(template):
    special = ["<s>", "<end>", "<|user|>", "<|system|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({t: i for i, t in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    fast.chat_template = template
    return Tokenizer(fast, len(fast), (1,))


CHAT = make_tokenizer(TEMPLATE)
BASE = make_tokenizer(None)


def test_paper_instruction():
    assert PAPER_INSTRUCTION.endswith(r"output the final answer within \boxed{}.")
    ids = build_prompt("What is 1+1?", BASE, PromptConfig())
    assert ids.dtype == np.int32
    assert BASE.decode(ids) == f"<s>What is 1+1? {PAPER_INSTRUCTION}"


def test_chat_template_opens_the_assistants_turn_once():
    ids = build_prompt("P", CHAT, PromptConfig(instruction="I."))
    assert CHAT.decode(ids) == "<s><|user|>P I.<|assistant|>"
    assert list(ids[:2]) == [0, 2], "one beginning of sequence, and markers as single ids"
    assert ids[-1] == 4


def test_system_message_and_empty_instruction():
    config = PromptConfig(instruction="", system="Be brief.")
    assert CHAT.decode(build_prompt("P", CHAT, config)) == (
        "<s><|system|>Be brief.<|user|>P<|assistant|>"
    )
    with pytest.raises(ValueError, match="system message needs a chat template"):
        build_prompt("P", BASE, config)
    with pytest.raises(ValueError, match="system message"):
        build_prompt("P", CHAT, dataclasses.replace(config, use_chat_template="never"))


def test_template_off_and_insisted_on():
    config = PromptConfig(instruction="", use_chat_template="never")
    assert CHAT.decode(build_prompt("P", CHAT, config)) == "<s>P"
    with pytest.raises(ValueError, match="has no chat template"):
        build_prompt("P", BASE, PromptConfig(use_chat_template="always"))
    with pytest.raises(ValueError, match="use_chat_template"):
        PromptConfig(use_chat_template="sometimes")


def test_refused_role_is_named():
    refusing = make_tokenizer(TEMPLATE.replace(" and refuse", ""))
    with pytest.raises(ValueError, match=r"refuses the roles.*system.*no system role"):
        build_prompt("P", refusing, PromptConfig(system="S"))


def test_failing_filter_is_a_refusal():
    """A TypeError of a filter came out as it was."""
    failing = make_tokenizer("{{ messages | sum }}")
    with pytest.raises(ValueError, match=r"refuses the roles \['user'\].*unsupported operand"):
        build_prompt("P", failing, PromptConfig())


def test_template_cannot_reach_python():
    """A model folder's template is data from elsewhere: it runs in jinja's sandbox."""
    hostile = make_tokenizer("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="refuses"):
        build_prompt("P", hostile, PromptConfig())


def test_bytes_have_no_template():
    plain = Tokenizer(None, 256, (2,))
    assert plain.decode(build_prompt("P", plain, PromptConfig(instruction="I"))) == "P I"


# Written like the templates that come with the models of these names.
R1_DISTILL = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
BOS, IM_START, THINK = 0, 2, 9
MARKS = ["<|im_start|>", "<|im_end|>", "<｜User｜>", "<｜Assistant｜>"]


def write_model(folder, *, template=None, bos=False, think=True, **tokenizer_config):
    """A model folder with a byte-level BPE; `bos` has its post-processor write one."""
    special = ["<bos>", "<eos>", *MARKS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    vocab |= {merged: len(vocab) + i for i, merged in enumerate(("ĊĊ", ".ĊĊ"))}
    backend = Backend(models.BPE(vocab, [("Ċ", "Ċ"), (".", "ĊĊ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if think:
        backend.add_tokens(["<think>", "</think>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer_config |= {"bos_token": "<bos>", "eos_token": "<eos>"}
    if template is not None:
        tokenizer_config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    return folder


def prompt_of(folder, **settings):
    tokenizer = load_tokenizer(folder, 320)
    ids = build_prompt("1+1?", tokenizer, PromptConfig(**{"instruction": "Box it."} | settings))
    return tokenizer, ids, tokenizer.decode(ids)


@pytest.mark.parametrize("bos", [False, True])
def test_r1_distill_has_one_beginning_and_an_open_think(tmp_path, bos):
    """Template and tokenizer each write a beginning of sequence; the prompt has one."""
    folder = write_model(tmp_path, template=R1_DISTILL, bos=bos, add_bos_token=True)
    tokenizer, ids, text = prompt_of(folder)
    assert text == "<bos><｜User｜>1+1? Box it.<｜Assistant｜><think>\n"
    assert (ids == BOS).sum() == 1
    assert opened_reasoning(ids, tokenizer) == "<think>"
    _, ids, text = prompt_of(folder, system="Be brief.")
    assert text == "<bos>Be brief.<｜User｜>1+1? Box it.<｜Assistant｜><think>\n"


@pytest.mark.parametrize("think", [False, True])
def test_a_response_is_judged_with_the_think_its_prompt_opened(tmp_path, think):
    r"""A \boxed{} of a reasoning that was cut is no answer; whether or not the mark is one id."""
    folder = write_model(tmp_path, template=R1_DISTILL, think=think)
    tokenizer, ids, _ = prompt_of(folder)
    assert len(tokenizer.encode("<think>")) == (1 if think else 7)
    opened = opened_reasoning(ids, tokenizer)
    assert final_answer(opened + r"maybe \boxed{3}") is None
    assert final_answer(opened + r"maybe \boxed{3}</think> So \boxed{2}.") == "2"
    assert tokenizer.separators().end_think == (tokenizer.encode("</think>")[0] if think else None)


def test_qwen25_has_its_own_system_message(tmp_path):
    folder = write_model(tmp_path, template=QWEN25)
    user = "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    tokenizer, ids, text = prompt_of(folder)
    assert text == "<|im_start|>system\nYou are Qwen.<|im_end|>\n" + user
    assert (ids == IM_START).sum() == 3
    assert BOS not in ids
    assert opened_reasoning(ids, tokenizer) == ""
    system = "<|im_start|>system\n{}<|im_end|>\n"
    assert prompt_of(folder, system="Be brief.")[2] == system.format("Be brief.") + user
    assert prompt_of(folder, system="")[2] == system.format("") + user
    plain = prompt_of(folder, use_chat_template="never")[2]
    assert plain == "1+1? Box it."


def test_qwen3_can_be_told_not_to_think(tmp_path):
    folder = write_model(tmp_path, template=QWEN3)
    start = "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(folder)[2] == start
    assert prompt_of(folder, enable_thinking=True)[2] == start
    tokenizer, ids, text = prompt_of(folder, enable_thinking=False)
    assert text == start + "<think>\n\n</think>\n\n"
    assert opened_reasoning(ids, tokenizer) == ""


def test_enable_thinking_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the chat template has no variable enable_thinking"):
        prompt_of(write_model(tmp_path, template=QWEN25), enable_thinking=False)
    with pytest.raises(ValueError, match="enable_thinking needs a chat template"):
        prompt_of(write_model(tmp_path / "base"), enable_thinking=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, ""])
def test_a_base_model_gets_what_its_tokenizer_puts_in_front(tmp_path, template, bos):
    """Once; an empty template is none (it gave an empty prompt)."""
    _, ids, text = prompt_of(write_model(tmp_path, template=template, bos=bos))
    assert text == "<bos>" * bos + "1+1? Box it."
    assert (ids == BOS).sum() == bos


def test_places_of_a_template(tmp_path):
    expected = "<bos><｜User｜>1+1? Box it.<｜Assistant｜><think>\n"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": R1_DISTILL}]
    assert prompt_of(write_model(tmp_path / "named", template=named))[2] == expected
    folder = write_model(tmp_path / "file", template="an older one")
    (folder / "chat_template.jinja").write_text(R1_DISTILL)
    assert prompt_of(folder)[2] == expected
    folder = write_model(tmp_path / "no_default", template=named[:1])
    with pytest.raises(ValueError, match=r"refuses the roles.*no default.*tool_use"):
        prompt_of(folder)
