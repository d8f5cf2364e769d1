"""The benchmarks of `python -m experiments.evaluate`: one table, a line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from attnrl_jax.datasets.files import FORMATS, read_problems
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.shapes import bucket_length
from attnrl_jax.tasks.graph import GraphSource, GraphTaskConfig
from attnrl_jax.tasks.problems import DataError, Problem, Source
from attnrl_jax.tasks.prompts import PAPER_INSTRUCTION, PromptConfig, build_prompt
from attnrl_jax.tasks.tokenizer import Tokenizer
from experiments.settings import SettingError


@dataclass(frozen=True)
class Benchmark:
    """Problems, and how they are asked.

    Attributes:
      about: what it is, for the table that `--list` prints.
      file: file in the folder of `--data`, or a path; empty where `generated` makes them.
      generated: makes the problems.
      instruction: follows each problem.
      max_tokens: of a response.
      samples: of each problem where the command does not say: more where problems are few. Of the
        paper's six benchmarks as many as the authors' published training script evaluates, at
        temperature 0.6: 32 of AIME and AMC, 4 of MATH-500, Minerva and OlympiadBench.
      exact: answers have one written form, so that no math-verify is needed.
    """

    about: str
    file: str = ""
    generated: Callable[[], Source] | None = None
    instruction: str = PAPER_INSTRUCTION
    max_tokens: int = 8192
    samples: int = 4
    exact: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME I and II 2024, 30 problems", "aime24.jsonl", samples=32),
    "aime25": Benchmark("AIME I and II 2025, 30 problems", "aime25.jsonl", samples=32),
    "amc23": Benchmark("AMC 12 2023, 40 problems", "amc23.jsonl", samples=32),
    "math500": Benchmark("MATH, 500 test problems", "math500.jsonl"),
    "minerva": Benchmark("Minerva, 272 problems of physics and chemistry", "minerva.jsonl"),
    "olympiad": Benchmark("OlympiadBench, 674 problems of mathematics", "olympiad.jsonl"),
    "gsm8k": Benchmark("GSM8K, 1,319 test problems", "gsm8k_test.jsonl"),
    # The held-out problems of the default run, asked as it asks them.
    "graph": Benchmark(
        "held-out problems made by this program, 1,024",
        generated=partial(GraphSource, GraphTaskConfig(), "held_out", 0, 1024),
        instruction="",
        max_tokens=160,
        exact=True,
    ),
}


def chosen(names: str) -> dict[str, Benchmark]:
    """Benchmarks of a comma-separated list of names and paths of problem files.

    Raises:
      SettingError: an empty list, an unknown name, or two benchmarks of one name.
    """
    found: dict[str, Benchmark] = {}
    for given in filter(None, (name.strip() for name in names.split(","))):
        name, benchmark = given, BENCHMARKS.get(given)
        if benchmark is None:
            suffix = next((end for end in FORMATS if given.lower().endswith(end)), None)
            if suffix is None:
                raise SettingError(
                    f"unknown benchmark {given!r}; known: {', '.join(BENCHMARKS)}, or the path of "
                    f"a file that ends in {', '.join(FORMATS)}"
                )
            name = Path(given).name[: -len(suffix)]
            # An absolute path is found whatever --data says.
            benchmark = Benchmark("a file", str(Path(given).absolute()))
        if name in found or (name in BENCHMARKS and name != given):
            raise SettingError(f"two benchmarks are called {name!r}; rename a file")
        found[name] = benchmark
    if not found:
        raise SettingError(f"--benchmarks names none; known: {', '.join(BENCHMARKS)}")
    return found


def load_problems(
    name: str, benchmark: Benchmark, data: Path | None, limit: int | None = None
) -> list[Problem]:
    """Problems of a benchmark, in the order of its file.

    Args:
      name: of the benchmark.
      benchmark: its entry.
      data: folder of benchmark files; `data/eval` is searched as well. None for none.
      limit: most problems, the first ones; None for all.

    Raises:
      DataError: the file is missing (it is said where it was looked for) or broken.
    """
    if benchmark.generated is not None:
        source = benchmark.generated()
        return [source[i] for i in range(len(source))[:limit]]
    if Path(benchmark.file).is_absolute():
        places = [Path(benchmark.file)]
    elif data is None:
        raise DataError(
            f"benchmark {name} is read from {benchmark.file}: give the folder that holds it as "
            "--data=DIR"
        )
    else:
        places = [data / benchmark.file, data / "eval" / benchmark.file]
    for place in places:
        if place.is_file():
            return read_problems(place)[:limit]
    looked = " or ".join(map(str, places))
    raise DataError(f"benchmark {name}: there is no file {looked}")


def listing() -> str:
    """The table of benchmarks as Markdown."""
    lines = ["| benchmark | problems | file | tokens | samples |", "|---|---|---|---|---|"]
    for name, benchmark in BENCHMARKS.items():
        file = benchmark.file or "(none)"
        numbers = f"{benchmark.max_tokens} | {benchmark.samples}"
        lines.append(f"| {name} | {benchmark.about} | {file} | {numbers} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """One benchmark, ready to be sampled from one model.

    Attributes:
      name: of the benchmark.
      exact: whether exact comparison judges it.
      problems: all of them.
      prompts: token ids by number of the problem; those without room for a response are missing.
      budgets: most tokens of a response, likewise: `max_tokens`, or what the model's positions
        leave.
      max_tokens: of a response.
      samples: of each problem.
    """

    name: str
    exact: bool
    problems: Sequence[Problem]
    prompts: dict[int, np.ndarray]
    budgets: dict[int, int]
    max_tokens: int
    samples: int

    def skipped(self) -> list[str]:
        """Ids of problems whose prompts are empty or leave no room for a response."""
        return [p.id for number, p in enumerate(self.problems) if number not in self.prompts]

    def cut(self) -> str:
        """Says that the model has too few positions for `max_tokens`; empty where it has enough."""
        shorter = [budget for budget in self.budgets.values() if budget < self.max_tokens]
        if not shorter:
            return ""
        return (
            f"{self.name}: the model has too few positions for {self.max_tokens} tokens; responses "
            f"to {len(shorter)} of {len(self.budgets)} problems have fewer, down to {min(shorter)}"
        )


def sampler_config(parts: Sequence[Part], slots: int) -> SamplerConfig:
    """Shapes of the sampler: one cache length for all benchmarks, so that they share programs.

    They do not depend on what is left to do: a continued evaluation computes with the programs of
    one that was never stopped.
    """
    longest = max(len(ids) + part.budgets[n] for part in parts for n, ids in part.prompts.items())
    # Prompts are padded to multiples of it as well, each a program of its own.
    bucket = 64 if longest <= 512 else 256
    return SamplerConfig(
        slots=slots,
        length_bucket=bucket,
        # Most responses are far shorter than the longest allowed.
        attend_parts=8 if longest > 2048 else 4,
        cache_length=bucket_length(longest, bucket),
    )


def cache_size(model: ModelConfig, sampler: SamplerConfig) -> str:
    """Memory of keys and values, which --slots and --max-tokens decide."""
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    per_token *= 2 if model.dtype == "bfloat16" else 4
    length = sampler.cache_length or 0
    gigabytes = sampler.slots * length * per_token / 2**30
    return f"{sampler.slots} slots of {length} tokens, {gigabytes:.2f} GiB over all devices"


def prepare(
    name: str,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    model: ModelConfig,
    prompt: PromptConfig,
    max_tokens: int,
    samples: int,
) -> Part:
    """Builds the prompts of a benchmark.

    Args:
      name: of the benchmark.
      benchmark: its entry.
      problems: of it.
      tokenizer: of the model.
      model: its `max_length` bounds prompt and response together.
      prompt: how the problems are put to it.
      max_tokens: of a response.
      samples: of each problem.

    Raises:
      DataError: no prompt leaves room for a response.
      ValueError: a prompt that the chat template refuses.
    """
    prompts = {
        number: ids
        for number, problem in enumerate(problems)
        if 0 < len(ids := build_prompt(problem.text, tokenizer, prompt)) < model.max_length
    }
    if not prompts:
        raise DataError(
            f"benchmark {name}: none of its {len(problems)} prompts leaves room for a response "
            f"within the model's {model.max_length} positions"
        )
    budgets = {n: min(max_tokens, model.max_length - len(ids)) for n, ids in prompts.items()}
    return Part(name, benchmark.exact, problems, prompts, budgets, max_tokens, samples)
