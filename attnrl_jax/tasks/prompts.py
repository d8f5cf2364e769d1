"""From a problem's text to the tokens of its prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnrl_jax.tasks.tokenizer import Tokenizer

PAPER_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class PromptConfig:
    """How problems are put to the model.

    Attributes:
      instruction: follows the problem after a space; the default is the paper's. May be empty.
      system: system message; needs a chat template. None gives none, and then some templates
        (Qwen2.5's) write one of their own; an empty text is an empty message.
      use_chat_template: "auto" uses the tokenizer's template where it has one (a base model has
        none, and gets plain text); "always" insists on it; "never" is plain text.
      enable_thinking: variable of templates that can switch reasoning off (Qwen3's); None leaves
        it to the template.
    """

    instruction: str = PAPER_INSTRUCTION
    system: str | None = None
    use_chat_template: str = "auto"
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.use_chat_template not in ("auto", "always", "never"):
            raise ValueError(
                "use_chat_template must be 'auto', 'always' or 'never', "
                f"got {self.use_chat_template!r}"
            )


def build_prompt(text: str, tokenizer: Tokenizer, config: PromptConfig) -> np.ndarray:
    """Token ids of the prompt, `int32[time]`, up to where the response starts.

    With a chat template: the conversation with the opening of the assistant's turn, and only the
    special tokens that the template writes. Without: problem and instruction as plain text, with
    the tokens which the tokenizer itself puts in front (such as a beginning-of-sequence token).

    Raises:
      ValueError: a chat template is insisted on, or a system message or `enable_thinking` given,
        and there is no template; the template refuses the conversation, or does not know
        `enable_thinking`.
    """
    content = f"{text} {config.instruction}" if config.instruction else text
    if config.use_chat_template == "always" and not tokenizer.has_chat_template:
        raise ValueError("use_chat_template is 'always', but the tokenizer has no chat template")
    if config.use_chat_template == "never" or not tokenizer.has_chat_template:
        if config.system is not None:
            raise ValueError(
                "a system message needs a chat template, and this prompt is built without one"
            )
        if config.enable_thinking is not None:
            raise ValueError(
                "enable_thinking needs a chat template, and this prompt is built without one"
            )
        return tokenizer.encode(content, special=True)
    messages = [{"role": "user", "content": content}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    variables = {}
    if config.enable_thinking is not None:
        variables["enable_thinking"] = config.enable_thinking
    return tokenizer.encode(tokenizer.chat_text(messages, **variables))


def opened_reasoning(prompt: np.ndarray, tokenizer: Tokenizer) -> str:
    """`<think>` where the prompt ends with this mark, else an empty text.

    Some templates (DeepSeek-R1's) open the reasoning themselves. Put before the response's text,
    the mark tells the judge that a response which never writes `</think>` was cut in its reasoning.

    Args:
      prompt: token ids, `int32[time]`.
      tokenizer: of the prompt.
    """
    # Whatever its ids are, the mark and the white space after it fit in so many.
    return "<think>" if tokenizer.decode(prompt[-32:]).rstrip().endswith("<think>") else ""


# What may change the tokens of a prompt, config files for the end tokens they name.
_PROMPT_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*_tokens*.json",
    "chat_template*",
    "additional_chat_templates/*",
    "config.json",
    "generation_config.json",
)


def prompt_version(
    folder: str | Path, config: PromptConfig, vocab_size: int, kind: str = "auto"
) -> str:
    """Hash of all that the tokens of prompts depend on.

    Problems that were prepared with one limit on their prompts are used again while it stays the
    same.

    Args:
      folder: model folder with the tokenizer.
      config: how problems are put to the model.
      vocab_size, kind: as `load_tokenizer` takes them.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=10)
    settings = [dataclasses.asdict(config), vocab_size, kind]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    found = {path for pattern in _PROMPT_FILES for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        content = hashlib.blake2b(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()
