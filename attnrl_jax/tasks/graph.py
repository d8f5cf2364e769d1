"""Problems made by the program: dependency-graph arithmetic modulo 10.

A problem gives a few values and a chain of definitions, in the order in which they can be solved,
and asks for the last variable defined. A response restates the question, solves one definition a
paragraph, and boxes the answer:

    prompt    h= 9 j= 1 i= 4 c: j + h f: c - i ? f
    response  ? f
                                             (a blank line is one token and ends a step)
              c: j + h j= 1 h= 9 c= 0

              f: c - i c= 0 i= 4 f= 6

              \\boxed{ 6 }

Every blank-separated word is a token. A *careful* step (above) restates the definition, looks its
operands up and computes; a *hasty* one (`c: j + h c= 3`) skips the look-up and is often wrong. A
policy pretrained on a mixture of both has a habit to unlearn, step by step. The generator knows the
truth of every step, so it can name the first wrong one and the steps that depend on it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from attnrl_jax.tasks.problems import Problem

Split = Literal["held_out", "pretrain", "train"]

NAMES = "abcdefghijklmnopqr"
OPERATORS = "+-*"
MODULUS = 10
BLANK_LINE = "\n\n"
ASK = "?"
BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"

_HASH_BUCKETS = 16
_HELD_OUT_BUCKETS = 1
_PRETRAIN_BUCKETS = 8


@dataclasses.dataclass(frozen=True)
class GraphTaskConfig:
    """How problems and demonstrations are drawn.

    Attributes:
      given: number of given values.
      min_operations: fewest definitions of a problem.
      max_operations: most definitions of a problem.
      operators: operators in use, a subset of "+-*".
      chain: probability that an operand is drawn from the variables nothing uses yet. Near 1 the
        answer depends on nearly every step; at 0 operands are uniform.
      hasty_min: probability of a hasty step in demonstrations with `min_operations` definitions.
      hasty_max: the same with `max_operations`; linear in between. Haste grows with the work ahead,
        which makes easy problems easier and hard ones harder for the pretrained policy.
      hasty_right: probability that the value of a hasty step is right.
    """

    given: int = 3
    min_operations: int = 2
    max_operations: int = 12
    operators: str = "+-"
    chain: float = 0.5
    hasty_min: float = 0.0
    hasty_max: float = 0.45
    hasty_right: float = 0.6

    def __post_init__(self) -> None:
        if self.given < 1:
            raise ValueError(f"given = {self.given}: at least one value must be given")
        if not 1 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"min_operations = {self.min_operations}, max_operations = {self.max_operations}: "
                "allowed is 1 <= min_operations <= max_operations"
            )
        if self.given + self.max_operations > len(NAMES):
            raise ValueError(
                f"given + max_operations = {self.given + self.max_operations}: "
                f"there are only {len(NAMES)} variable names"
            )
        if not self.operators or set(self.operators) - set(OPERATORS):
            raise ValueError(
                f"operators = {self.operators!r}: allowed are one or more of {OPERATORS!r}"
            )
        for name in ("chain", "hasty_min", "hasty_max", "hasty_right"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed is 0 to 1")

    @property
    def difficulties(self) -> int:
        """How many different numbers of definitions there are."""
        return self.max_operations - self.min_operations + 1

    def hasty_probability(self, operations: int) -> float:
        """Probability that a step of a demonstration with `operations` definitions is hasty."""
        span = max(self.max_operations - self.min_operations, 1)
        share = (operations - self.min_operations) / span
        return self.hasty_min + share * (self.hasty_max - self.hasty_min)


@dataclasses.dataclass(frozen=True)
class Definition:
    """`name: left operator right`, modulo 10."""

    name: str
    left: str
    operator: str
    right: str

    def __str__(self) -> str:
        return f"{self.name}: {self.left} {self.operator} {self.right}"

    def value(self, values: Mapping[str, int]) -> int:
        """The value this definition has when its operands have `values`."""
        left, right = values[self.left], values[self.right]
        result = {"+": left + right, "-": left - right, "*": left * right}[self.operator]
        return result % MODULUS


@dataclasses.dataclass(frozen=True)
class GraphProblem:
    """One problem: given values, definitions in an order in which they can be solved, question."""

    given: tuple[tuple[str, int], ...]
    definitions: tuple[Definition, ...]
    asked: str

    @property
    def text(self) -> str:
        """The prompt."""
        parts = [f"{name}= {value}" for name, value in self.given]
        parts += [str(definition) for definition in self.definitions]
        return " ".join([*parts, f"{ASK} {self.asked}"])

    @functools.cached_property
    def values(self) -> dict[str, int]:
        """True value of every variable, the given ones included."""
        values = dict(self.given)
        for definition in self.definitions:
            values[definition.name] = definition.value(values)
        return values

    @property
    def answer(self) -> str:
        return str(self.values[self.asked])

    @property
    def depends_on(self) -> dict[str, tuple[str, ...]]:
        """The dependency graph: for every defined variable, its operands."""
        return {d.name: (d.left, d.right) for d in self.definitions}

    def ancestors(self, name: str) -> set[str]:
        """Every variable that the value of `name` depends on, directly or not."""
        graph = self.depends_on
        found: set[str] = set()
        pending = list(graph.get(name, ()))
        while pending:
            operand = pending.pop()
            if operand not in found:
                found.add(operand)
                pending.extend(graph.get(operand, ()))
        return found


def _draw(rng: np.random.Generator, config: GraphTaskConfig, operations: int) -> GraphProblem:
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: config.given + operations]]
    known, unused = names[: config.given], names[: config.given]
    given = tuple((name, int(rng.integers(MODULUS))) for name in known)
    definitions = []
    for name in names[config.given :]:
        operands: list[str] = []
        for _ in range(2):
            pool = [v for v in unused if v not in operands] if rng.random() < config.chain else []
            pool = pool or [v for v in known if v not in operands] or known
            operands.append(pool[rng.integers(len(pool))])
        operator = config.operators[rng.integers(len(config.operators))]
        definitions.append(Definition(name, operands[0], operator, operands[1]))
        unused = [v for v in unused if v not in operands] + [name]
        known = [*known, name]
    return GraphProblem(given, tuple(definitions), names[-1])


def demonstration(
    problem: GraphProblem,
    rng: np.random.Generator,
    hasty_probability: float = 0.0,
    hasty_right: float = 0.6,
) -> str:
    """A response in which each step is hasty with `hasty_probability`, else careful.

    Later steps look up what was written, right or wrong, so a demonstration with a wrong hasty step
    stays consistent with itself and usually ends in a wrong answer.

    Args:
      problem: what to solve.
      rng: source of the habits and of wrong values.
      hasty_probability: probability of a hasty step.
      hasty_right: probability that a hasty step's value follows from what was written before.

    Returns:
      The response's text, without the end token.
    """
    found = dict(problem.given)
    steps = [f"{ASK} {problem.asked}"]
    for definition in problem.definitions:
        value = definition.value(found)
        if rng.random() < hasty_probability:
            look_up = ""
            if rng.random() >= hasty_right:
                value = int((value + rng.integers(1, MODULUS)) % MODULUS)
        else:
            operands = (definition.left, definition.right)
            look_up = "".join(f" {name}= {found[name]}" for name in operands)
        found[definition.name] = value
        steps.append(f"{definition}{look_up} {definition.name}= {value}")
    steps.append(f"{BOX_OPEN} {found[problem.asked]} {BOX_CLOSE}")
    return f" {BLANK_LINE} ".join(steps)


def _is_right(problem: GraphProblem, words: Sequence[str]) -> bool:
    """Whether one step, as words, is true of the problem."""
    if words[0] == ASK:
        return list(words[1:]) == [problem.asked]
    if words[0] == BOX_OPEN:
        return list(words[1:]) == [problem.answer, BOX_CLOSE]
    definitions = {d.name: d for d in problem.definitions}
    definition = definitions.get(words[0].removesuffix(":"))
    if definition is None or str(definition).split() != list(words[:4]):
        return False
    statements = list(words[4:])
    if not statements or len(statements) % 2:
        return False
    allowed = {definition.left, definition.right}
    for position in range(0, len(statements), 2):
        name, value = statements[position].removesuffix("="), statements[position + 1]
        if position == len(statements) - 2:
            allowed = {definition.name}
        if name not in allowed or statements[position] != f"{name}=":
            return False
        if value != str(problem.values[name]):
            return False
    return True


def first_wrong_step(problem: GraphProblem, response_text: str) -> int | None:
    """The first step whose content is wrong: its restatement, a look-up or its value.

    Content is held against the truth, in any order of steps; a step that cannot be read (cut at the
    budget, say) is wrong. Leaving a step out is not.

    Args:
      problem: the problem that was asked.
      response_text: the decoded response; an end token at its end is ignored.

    Returns:
      The step's number, counted from 1 as the ranges of a response are, or None.
    """
    text = response_text.replace(END, "").replace(PAD, "")
    for number, paragraph in enumerate(text.split(BLANK_LINE), start=1):
        words = paragraph.split()
        if words and not _is_right(problem, words):
            return number
    return None


def split_of(text: str) -> Split:
    """The split a problem belongs to, by the hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % _HASH_BUCKETS
    if bucket < _HELD_OUT_BUCKETS:
        return "held_out"
    return "pretrain" if bucket < _PRETRAIN_BUCKETS else "train"


def vocabulary() -> list[str]:
    """Every token of the task, in the order of their ids."""
    symbols = [PAD, END, UNKNOWN, BLANK_LINE, ASK, BOX_OPEN, BOX_CLOSE, *OPERATORS]
    digits = [str(digit) for digit in range(MODULUS)]
    return [*symbols, *digits, *(name + mark for mark in ("", "=", ":") for name in NAMES)]


@dataclasses.dataclass(frozen=True)
class GraphSource:
    """Random access to the problems of one split.

    Problem `index` has `min_operations + index mod (number of difficulties)` definitions, so any
    run of consecutive indices is stratified by difficulty.

    Attributes:
      config: how problems are drawn.
      split: "held_out", "pretrain" or "train"; no problem is in two of them.
      seed: problems of other seeds are other problems of the same split.
      size: number of problems.
    """

    config: GraphTaskConfig
    split: Split
    seed: int = 0
    size: int = 1024

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split = {self.split!r}: allowed are {get_args(Split)}")
        if self.size < 1:
            raise ValueError(f"size = {self.size}: allowed is 1 or more")

    def __len__(self) -> int:
        return self.size

    def graph(self, index: int) -> GraphProblem:
        """The problem with its graph; raises IndexError outside 0 .. size - 1."""
        if not 0 <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        operations = self.config.min_operations + index % self.config.difficulties
        rng = np.random.default_rng((self.seed, index, get_args(Split).index(self.split)))
        while True:
            problem = _draw(rng, self.config, operations)
            if split_of(problem.text) == self.split:
                return problem

    def __getitem__(self, index: int) -> Problem:
        problem = self.graph(index)
        return Problem(
            id=f"graph/{self.split}/{self.seed}/{index}",
            text=problem.text,
            answers=(problem.answer,),
            level=len(problem.definitions),
        )
