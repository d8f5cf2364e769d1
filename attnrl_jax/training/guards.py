"""Signs in the metrics of a step that a policy collapses, or that a run learns from noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """When a run warns. Nothing else depends on these settings.

    Attributes:
      min_entropy: mean entropy of sampled tokens, nats: below it all responses become the same.
      max_entropy: above it responses become noise.
      length_drop: share of the first step's mean response length that must be left.
      max_truncated: share of initial responses cut at their budget, which have no answer.
      max_repetition: share of 8-grams of a response that it has had before.
      max_lost_answers: share of the step's answers that the judge lost.
      max_mismatch: mean difference of the log-probabilities of sampler and scorer, nats.
    """

    min_entropy: float = 0.01
    max_entropy: float = 6.0
    length_drop: float = 0.25
    max_truncated: float = 0.8
    max_repetition: float = 0.5
    max_lost_answers: float = 0.1
    max_mismatch: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite; got {value}")


def collapse_warnings(
    metrics: Mapping[str, float], first: Mapping[str, float], config: GuardConfig
) -> dict[str, str]:
    """What is wrong with a step: a sentence for each guard, by its name.

    Args:
      metrics: of the step; what is missing is not judged.
      first: of the run's first step, or empty.
      config: the limits.
    """
    found: dict[str, str] = {}

    def judge(guard: str, name: str, sentence: str, limit: float, is_bad: bool) -> None:
        if is_bad:
            found[guard] = f"{name} {metrics[name]:.3g} {sentence} (guards.{guard}: {limit:g})"

    def above(guard: str, name: str, sentence: str) -> None:
        limit = getattr(config, guard)
        judge(guard, name, sentence, limit, metrics.get(name, 0.0) > limit)

    entropy = metrics.get("train/entropy", math.inf)
    judge(
        "min_entropy", "train/entropy",
        "is low: the policy repeats itself, and little is left to learn from",
        config.min_entropy, entropy < config.min_entropy,
    )  # fmt: skip
    if math.isfinite(entropy):
        above("max_entropy", "train/entropy", "is high: responses are close to noise")
    name = "train/response_length"
    before = first.get(name, 0.0)
    is_short = metrics.get(name, before) < config.length_drop * before
    sentence = f"is short: the first step's was {before:.3g}"
    judge("length_drop", name, sentence, config.length_drop, is_short)
    above("max_truncated", "train/truncated", "of the responses were cut at their budget")
    above("max_repetition", "train/repetition", "of the text repeats itself")
    sentence = "nats are between sampler and scorer: see importance_cap"
    above("max_mismatch", "sampler/mismatch_mean", sentence)
    lost, judged = metrics.get("judge/lost", 0.0), max(metrics.get("rows/sampled", 0.0), 1.0)
    sentence = f"answers of about {judged:.0f} were lost by the judge"
    is_many = lost > config.max_lost_answers * judged
    judge("max_lost_answers", "judge/lost", sentence, config.max_lost_answers, is_many)
    return found
