"""Steps of a response to a dependency-graph problem, and what depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnrl_jax.tasks.graph import ASK, BOX_OPEN, GraphProblem

# Words of a step without a look-up: `c: j + h c= 3`.
_HASTY_WORDS = 6


@dataclass(frozen=True)
class GraphStep:
    """What a step of a response is to the problem.

    Attributes:
      name: variable that it solves; None for the question, the answer and what cannot be read.
      used: a later step of the response solves a variable whose definition has this one, or gives
        it as the answer.
      decides: the answer depends on the variable, by the problem's graph.
      hasty: it gives a value without looking its operands up.
    """

    name: str | None
    used: bool
    decides: bool
    hasty: bool


def graph_steps(problem: GraphProblem, texts: Sequence[str]) -> list[GraphStep]:
    """Reads the steps of a response.

    Args:
      problem: that was asked.
      texts: of every step, in order.
    """
    graph = problem.depends_on
    decisive = problem.ancestors(problem.asked) | {problem.asked}
    words = [text.split() for text in texts]
    names = [_solved(step, problem) for step in words]
    steps = []
    for number, name in enumerate(names):
        after = slice(number + 1, None)
        later = {operand for other in names[after] if other for operand in graph[other]}
        if any(step[:1] == [BOX_OPEN] for step in words[after]):
            later.add(problem.asked)
        steps.append(
            GraphStep(
                name,
                used=name in later,
                decides=name in decisive,
                hasty=name is not None and len(words[number]) <= _HASTY_WORDS,
            )
        )
    return steps


def _solved(words: Sequence[str], problem: GraphProblem) -> str | None:
    """The variable that a step is about, if it names one that the problem defines."""
    if not words or words[0] in (ASK, BOX_OPEN) or not words[0].endswith(":"):
        return None
    name = words[0].removesuffix(":")
    return name if name in problem.depends_on else None
