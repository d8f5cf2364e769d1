"""Text to token ids and back, and what the vocabulary says about steps and ends."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attnrl_jax.branching.steps import Separators

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers, or bytes as ids, with the ends of a response.

    There is no padding here: lengths say where a sequence ends.

    Attributes:
      backend: transformers' tokenizer, or None for bytes (id = value of the byte).
      vocab_size: rows of the model's embedding, at least as many as the tokenizer has ids.
      end_ids: ids that close a response.
    """

    backend: Any
    vocab_size: int
    end_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        size = 256 if self.backend is None else len(self.backend)
        if size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {size} ids, the model's vocabulary only {self.vocab_size}"
            )
        if not self.end_ids:
            raise ValueError("a vocabulary without an end token cannot close a response")
        for end in self.end_ids:
            if not 0 <= end < self.vocab_size:
                raise ValueError(f"end token {end} is outside the vocabulary of {self.vocab_size}")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of `text`, `int32[time]`; special tokens written out in it are recognised.

        Args:
          text: any text.
          special: whether the tokenizer adds its own tokens (beginning of sequence).
        """
        if self.backend is None:
            ids = [byte for byte in text.encode("utf-8", "replace") if byte not in self.end_ids]
        else:
            ids = self.backend(text, add_special_tokens=special, verbose=False)["input_ids"]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` with its special tokens, end tokens left out.

        Ids that the model has and the tokenizer has not (padding of the embedding) are left out.
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        size = 256 if self.backend is None else self._backend_size
        kept = tokens[(tokens < size) & ~np.isin(tokens, self.end_ids)].tolist()
        if self.backend is None:
            return bytes(kept).decode("utf-8", "replace")
        if hasattr(self.backend, "backend_tokenizer"):  # without checks of every id in Python
            return self.backend.backend_tokenizer.decode(kept, skip_special_tokens=False)
        return self.backend.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @cached_property
    def _backend_size(self) -> int:
        return len(self.backend)

    @property
    def has_chat_template(self) -> bool:
        # Some base models come with an empty one.
        return bool(getattr(self.backend, "chat_template", None))

    def chat_text(self, messages: Sequence[dict[str, str]], **variables: Any) -> str:
        """The conversation in the model's own format, with the assistant's turn opened.

        Args:
          messages: of `role` and `content`.
          **variables: of this model's template (such as `enable_thinking`).

        Raises:
          ValueError: the template refuses the conversation or fails on it, or does not know a
            variable.
        """
        try:
            template = self.backend.get_chat_template()
            text = self.backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template is a program, its filters raise what they like
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error
        for name in variables:
            if name not in template:
                raise ValueError(f"the chat template has no variable {name}")
        return text

    def separators(self) -> Separators:
        r"""Which ids end a step: those whose own decoded text has a blank line, or a newline.

        `end_think` is the id of `</think>` where that is exactly one id, else None. Found once.
        """
        return self._separators

    @cached_property
    def _separators(self) -> Separators:
        if self.backend is None:
            return Separators.from_texts([self.decode([token]) for token in range(self.vocab_size)])
        single_ids = [[token] for token in range(len(self.backend))]
        if hasattr(self.backend, "backend_tokenizer"):  # the whole vocabulary in one parallel call
            texts = self.backend.backend_tokenizer.decode_batch(
                single_ids, skip_special_tokens=False
            )
        else:
            texts = [
                self.backend.decode(
                    ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                for ids in single_ids
            ]
        texts = [*texts, *[""] * (self.vocab_size - len(texts))]
        ids = self.encode("</think>")
        is_one = len(ids) == 1 and self.decode(ids).strip() == "</think>"
        return Separators.from_texts(texts, int(ids[0]) if is_one else None)


def load_tokenizer(
    folder: str | Path, vocab_size: int, kind: Literal["auto", "bytes"] = "auto"
) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    End tokens are those of `generation_config.json`, else of `config.json`, else the tokenizer's
    own. Code that comes with a folder is never run.

    Args:
      folder: model folder.
      vocab_size: rows of the model's embedding.
      kind: "auto" reads the folder's tokenizer files and falls back on bytes, with a warning, if
        it has none; "bytes" takes bytes in any case.

    Raises:
      ValueError: no such folder, a broken file in it, a vocabulary without an end token or too
        small for the tokenizer, an unknown kind.
    """
    folder = Path(folder)
    if kind not in ("auto", "bytes"):
        raise ValueError(f"tokenizer kind must be 'auto' or 'bytes', got {kind!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    backend = None
    if kind == "auto":
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            backend = _load_backend(folder)
        else:
            logger.warning("%s has no tokenizer files: bytes serve as tokens", folder)
    try:
        return Tokenizer(backend, vocab_size, _end_ids(folder, backend))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _load_backend(folder: Path) -> Any:
    # Silences transformers' advice to install PyTorch, which this package does without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is complete; the class that AutoTokenizer picks by the model's name may
    # rebuild the tokenizer by its own rules instead of these.
    has_json = (folder / "tokenizer.json").is_file()
    try:
        if has_json:
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise ValueError(f"{folder}: the tokenizer files cannot be read: {error}") from error


def _end_ids(folder: Path, backend: Any) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name} is not a JSON object ({error})") from error
        ends = end if isinstance(end, list) else [end]
        if end is not None and not all(type(token) is int for token in ends):
            raise ValueError(f"{name}: eos_token_id must be an integer or a list, got {end!r}")
        if end is not None and ends:
            return tuple(dict.fromkeys(ends))
    own = getattr(backend, "eos_token_id", None)
    return () if own is None else (int(own),)
