"""From a problem's text to the tokens of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrl_jax.tasks.tokenizer import Tokenizer

PAPER_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class PromptConfig:
    """How problems are put to the model.

    Attributes:
      instruction: follows the problem after a space; the default is the paper's. May be empty.
      system: system message, or None for none; needs a chat template.
      use_chat_template: "auto" uses the tokenizer's template where it has one (a base model has
        none, and gets plain text); "always" insists on it; "never" is plain text.
    """

    instruction: str = PAPER_INSTRUCTION
    system: str | None = None
    use_chat_template: str = "auto"

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
      ValueError: a chat template is insisted on, or a system message given, and there is no
        template; or the template refuses the conversation.
    """
    content = f"{text} {config.instruction}" if config.instruction else text
    if config.use_chat_template == "always" and not tokenizer.has_chat_template:
        raise ValueError("use_chat_template is 'always', but the tokenizer has no chat template")
    if config.use_chat_template == "never" or not tokenizer.has_chat_template:
        if config.system is not None:
            raise ValueError(
                "a system message needs a chat template, and this prompt is built without one"
            )
        return tokenizer.encode(content, special=True)
    messages = [{"role": "user", "content": content}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    return tokenizer.encode(tokenizer.chat_text(messages))
