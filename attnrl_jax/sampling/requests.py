"""What the sampler is asked for, and which requests it refuses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrl_jax.models.config import ModelConfig

# Logits over a lower one are so large that what float32 rounds off is their log-probability.
LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Request:
    """Samples that continue one prefix.

    Attributes:
      prefix: token ids, at least one; `[time]`.
      num_samples: how many responses.
      budget: most tokens of a response, end token included.
      seed: of its noise. Two requests of equal prefix and seed get equal responses.
      temperature: 0 is greedy; else at least `LEAST_TEMPERATURE`.
      top_p: nucleus probability; 1 keeps everything.
      top_k: number of best tokens kept; 0 keeps everything.
      first_sample: number of the first response. Response k of a request draws the noise of
        (seed, first_sample + k), so that samples can be asked for one by one, or again.
    """

    prefix: np.ndarray
    num_samples: int
    budget: int
    seed: int | tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    first_sample: int = 0


@functools.lru_cache
def request_key(seed: int | tuple[int, ...]) -> np.ndarray:
    """Raw threefry key of a request, uint32 `[2]`; a sample's is `fold_in(key, index)`. Not to be
    written to: requests of several samples ask again."""
    seeds = seed if isinstance(seed, tuple) else (seed,)
    # With its length in front, since the hash takes (7,) and (7, 0) for equal.
    return np.random.SeedSequence((len(seeds), *seeds)).generate_state(2)


def check_requests(
    requests: Sequence[Request],
    end_ids: Sequence[int],
    model: ModelConfig,
    cache_length: int | None,
) -> None:
    """Refuses what cannot be sampled, naming the request's index (ValueError)."""
    for end in end_ids:
        if not 0 <= end < model.vocab_size:
            raise ValueError(f"end token {end} is outside the vocabulary of {model.vocab_size}")
    for index, request in enumerate(requests):
        prefix = np.asarray(request.prefix)
        if prefix.ndim != 1 or prefix.size == 0 or not np.issubdtype(prefix.dtype, np.integer):
            raise ValueError(f"request {index}: the prefix must be a non-empty row of token ids")
        if prefix.min() < 0 or prefix.max() >= model.vocab_size:
            raise ValueError(
                f"request {index}: the prefix has ids outside the vocabulary of {model.vocab_size}"
            )
        if request.num_samples < 0:
            raise ValueError(f"request {index}: num_samples {request.num_samples} is negative")
        if not 0 <= request.first_sample < 2**31 - request.num_samples:
            raise ValueError(
                f"request {index}: first_sample must be within 0 .. 2**31 - 1; "
                f"got {request.first_sample}"
            )
        if request.budget < 0:
            raise ValueError(f"request {index}: budget {request.budget} is negative")
        total = prefix.size + request.budget
        if total > model.max_length:
            raise ValueError(
                f"request {index}: prefix {prefix.size} + budget {request.budget} is more than "
                f"the model's max_length {model.max_length}"
            )
        if cache_length is not None and total > cache_length:
            raise ValueError(
                f"request {index}: prefix {prefix.size} + budget {request.budget} is more than "
                f"sampler.cache_length {cache_length}"
            )
        heat = request.temperature
        if heat != 0.0 and not LEAST_TEMPERATURE <= heat < np.inf:
            raise ValueError(
                f"request {index}: temperature must be 0, or finite and at least "
                f"{LEAST_TEMPERATURE}; got {heat}"
            )
        if not 0.0 < request.top_p <= 1.0:
            raise ValueError(f"request {index}: top_p must be in (0, 1]; got {request.top_p}")
        if request.top_k < 0:
            raise ValueError(f"request {index}: top_k must be >= 0; got {request.top_k}")
        seeds = request.seed if isinstance(request.seed, tuple) else (request.seed,)
        if not seeds or any(seed < 0 for seed in seeds):
            raise ValueError(f"request {index}: seeds must be >= 0; got {request.seed}")
