"""Prompts with and without a chat template."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnrl_jax.tasks.prompts import PAPER_INSTRUCTION, PromptConfig, build_prompt
from attnrl_jax.tasks.tokenizer import Tokenizer

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
