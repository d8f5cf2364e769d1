"""Evaluates a model on benchmarks: avg@n, pass@k and maj@n with intervals, lengths, speed.

    python -m experiments.evaluate --model=DIR --data=DIR --samples=32 \\
        --temperature=0.6 \\
        --benchmarks=aime24,aime25,amc23,math500,minerva,olympiad,gsm8k
    python -m experiments.evaluate --benchmarks=graph --temperature=0
    python -m experiments.evaluate --list

Without --model it is the small policy that comes with the project. The folder --out holds

    settings.json          all that the numbers depend on; other settings are
                           refused there
    responses/NAME.jsonl   one line per response of benchmark NAME, written as
                           soon as it is judged
    results.json           the numbers of its complete benchmarks, written anew
                           after each
    results.md             the tables that are printed at the end

The same command continues an evaluation that was stopped: it reads the responses and samples only
what is missing. With other --benchmarks it adds them to the folder, whose results cover all that
are complete there. The noise of a response depends on seed, problem and number of the sample
alone, so that the numbers are those of an evaluation that was never stopped, of all benchmarks at
once (wall clock aside, and rounding where the devices compute the same row differently in another
batch or beside a longer cache). Settings hold a digest of the model's files: it may be moved.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.evaluation import Answered, evaluation_request, judged_text
from attnrl_jax.models.config import read_config
from attnrl_jax.sampling.engine import cast_params
from attnrl_jax.sampling.sampler import Response, SamplerConfig, sample
from attnrl_jax.sharding import AXES, MeshConfig, make_mesh
from attnrl_jax.tasks.judging import (
    ExactJudge,
    Judge,
    JudgeConfig,
    MathJudge,
    Pending,
    final_answer,
)
from attnrl_jax.tasks.prompts import PromptConfig
from attnrl_jax.tasks.tokenizer import load_tokenizer
from experiments import commands
from experiments.benchmarks import (
    Part,
    cache_size,
    chosen,
    listing,
    load_problems,
    prepare,
    sampler_config,
)
from experiments.evaluation_files import (
    ResponseFile,
    Show,
    Terminal,
    digest,
    joined,
    markdown,
    other_summaries,
    response_path,
    results_of,
    settings_of,
    summary_of,
    write_results,
)
from experiments.folders import claimed
from experiments.settings import SettingError
from experiments.tasks import Policy, params_on_mesh, shipped_policy
from experiments.terminal import make_console


def evaluate(
    arguments: argparse.Namespace, console: Console, on_progress: Show | None = None
) -> dict[str, Any]:
    """Runs, or continues, an evaluation in its folder. Nothing is written before all was checked.

    Args:
      arguments: of the command line.
      console: shows progress.
      on_progress: called with (responses finished, responses in all) of each benchmark.

    Returns:
      what `results.json` holds.

    Raises:
      SettingError, ModelError, DataError, ValueError: what was given cannot be used, or the folder
        belongs to another evaluation.
    """
    _check(arguments)
    benchmarks = chosen(arguments.benchmarks)
    mesh = make_mesh(read_mesh(arguments.mesh))
    judging = JudgeConfig(arguments.judge_workers, arguments.judge_timeout)
    folder = model_folder(arguments.model).absolute() if arguments.model else shipped_policy()
    model = read_config(folder, arguments.dtype)
    tokenizer = load_tokenizer(folder, model.vocab_size)
    data = Path(arguments.data) if arguments.data else None
    parts = []
    for name, benchmark in benchmarks.items():
        given = arguments.instruction
        parts.append(
            prepare(
                name,
                benchmark,
                load_problems(name, benchmark, data, arguments.limit),
                tokenizer,
                model,
                PromptConfig(
                    benchmark.instruction if given is None else given,
                    arguments.system,
                    arguments.chat_template,
                    commands.THINKING[arguments.thinking],
                ),
                arguments.max_tokens or benchmark.max_tokens,
                # At temperature 0 all samples are equal.
                arguments.samples or (benchmark.samples if arguments.temperature > 0 else 1),
            )
        )
    sampler = sampler_config(parts, arguments.slots)
    # What only decides about speed is left out.
    names = ("dtype", "temperature", "top_p", "top_k", "seed", "instruction", "system",
             "chat_template", "thinking", "judge_timeout")  # fmt: skip
    values = {name: getattr(arguments, name) for name in names}
    of_hub = arguments.model.startswith("hf:")
    asked = settings_of(arguments.model if of_hub else str(folder), values, folder, parts)
    label = arguments.model.partition("@")[0].rpartition("/")[2] if of_hub else folder.name
    out = Path(arguments.out or default_folder(label, asked, arguments)).absolute()
    settings, free = joined(out, asked)
    with (
        jax.set_mesh(mesh),
        claimed(out, "evaluation", "settings.json", settings, free),
        MathJudge(judging) as math_judge,
    ):
        summaries = other_summaries(out, settings, benchmarks)
        (out / "responses").mkdir(exist_ok=True)
        console.print(f"evaluation folder: {out}", soft_wrap=True)
        console.print(f"decode cache: {cache_size(model, sampler)}", soft_wrap=True)
        for part in parts:
            if part.cut():
                console.print(part.cut(), soft_wrap=True)
        params = params_on_mesh(folder, model, mesh)
        # Once for all benchmarks; the float32 parameters are free to go.
        params = cast_params(params, model.dtype) if model.dtype != "float32" else params
        policy = Policy(folder, model, params, tokenizer)
        for part in parts:
            file = ResponseFile(response_path(out, part.name))
            judge = ExactJudge() if part.exact else math_judge
            with file, Terminal(part.name, console, on_progress) as terminal:
                answer(part, policy, arguments, sampler, judge, file, terminal.show)
            summaries[part.name] = summary_of(part.name, file.responses, part.samples)
            results = results_of(settings, summaries)
            write_results(out, results)
        console.print(markdown(results), soft_wrap=True, highlight=False, markup=False)
        console.print(f"responses, results.json and results.md are in {out}", soft_wrap=True)
    return results


def default_folder(label: str, settings: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """One folder for all benchmarks: its name depends on what the command says of each of them."""
    common = {k: v for k, v in settings.items() if k not in ("model", "benchmarks")}
    common |= {name: getattr(arguments, name) for name in ("samples", "max_tokens", "limit")}
    return Path("evaluations") / f"{label}-{digest(common)}"


def answer(
    part: Part,
    policy: Policy,
    arguments: argparse.Namespace,
    sampler: SamplerConfig,
    judge: Judge,
    file: ResponseFile,
    show: Show,
) -> None:
    """Samples and judges what is missing of a benchmark; each response is kept once judged.

    The devices decode while one thread waits for verdicts and writes, in the order in which the
    responses finished. An interruption waits for the verdicts under way, a second one does not.
    """
    done = file.done(set(part.prompts), part.samples)
    missing = [
        (problem, number)
        for problem in part.prompts
        for number in range(part.samples)
        if (problem, number) not in done
    ]
    total = len(part.prompts) * part.samples
    show(total - len(missing), total)
    requests = [
        evaluation_request(
            part.prompts[problem],
            problem=problem,
            sample=number,
            budget=part.budgets[problem],
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
        for problem, number in missing
    ]
    writing: deque[Future] = deque()
    writer = ThreadPoolExecutor(max_workers=1)
    given_up = threading.Event()
    clock = time.perf_counter()

    def write(response: Answered, pending: Pending) -> None:
        verdicts = pending.result()
        lost = verdicts.counts.timeouts + verdicts.counts.failures
        # A judge that was closed on the way counts its answers as lost: those are no verdicts.
        if not given_up.is_set():
            right = bool(verdicts.rewards[0])
            file.append(dataclasses.replace(response, right=right, lost=bool(lost)))

    def finished(index: int, _: int, response: Response) -> None:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        number, sample_number = missing[index]
        problem = part.problems[number]
        text = judged_text(part.prompts[number], response.tokens, policy.tokenizer)
        judged = Answered(
            benchmark=part.name,
            problem=number,
            id=problem.id,
            sample=sample_number,
            text=policy.tokenizer.decode(response.tokens),
            tokens=len(response.tokens),
            ended=response.ended,
            answer=final_answer(text),
            right=False,
            lost=False,
            elapsed=clock - before,
        )
        pending = judge.submit([(text, problem.answers)])
        writing.append(writer.submit(write, judged, pending))
        # A full disk should end the evaluation now, not after hours.
        while writing and writing[0].done():
            writing.popleft().result()

    def progress(now: int, _: int) -> None:
        show(total - len(missing) + now, total)

    try:
        sample(
            policy.params,
            policy.model,
            requests,
            policy.tokenizer.end_ids,
            sampler,
            progress,
            finished,
        )
        while writing:
            writing.popleft().result()
    finally:
        try:
            writer.shutdown()
        except BaseException:
            given_up.set()
            writer.shutdown(wait=False, cancel_futures=True)
            raise


def read_mesh(text: str) -> MeshConfig:
    """`data:-1,fsdp:1,tensor:1`, any of the three left out.

    Raises:
      SettingError: another form.
    """
    pairs = [pair.partition(":") for pair in text.split(",") if pair.strip()]
    try:
        sizes = {name.strip(): int(size) for name, _, size in pairs}
    except ValueError:
        sizes = {"": 0}
    if not set(sizes) <= set(AXES) or len(sizes) < len(pairs):
        raise SettingError(f"--mesh is written data:-1,fsdp:1,tensor:1; got {text!r}")
    return MeshConfig(**sizes)


def _check(arguments: argparse.Namespace) -> None:
    for name, lowest in (("samples", 1), ("limit", 1), ("max_tokens", 1), ("top_k", 0),
                         ("seed", 0), ("slots", 1)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            flag = name.replace("_", "-")
            raise SettingError(f"--{flag} must be at least {lowest}; got {value}")
    if not 0 <= arguments.temperature < math.inf:
        raise SettingError(f"--temperature must be >= 0; got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise SettingError(f"--top-p must be in (0, 1]; got {arguments.top_p}")
    if arguments.temperature == 0 and (arguments.samples or 1) > 1:
        raise SettingError("at --temperature=0 all samples are equal: give --samples=1")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = commands.parser(
        __doc__, "evaluate", "show nothing but warnings, errors and the tables at the end"
    )
    add = parser.add_argument
    add(
        "--model",
        default="",
        metavar="DIR",
        help="Hugging Face folder, or hf:OWNER/NAME; left out: the policy of the project",
    )
    add(
        "--benchmarks",
        default="graph",
        metavar="NAME,...",
        help="names of --list, or paths of problem files (default: graph)",
    )
    add("--data", metavar="DIR", help="folder of the benchmark files, or the one above eval/")
    add("--samples", type=int, help="responses per problem (default: the benchmark's own)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--top-p", type=float, default=1.0, help="nucleus probability (default: 1, all tokens)")
    add("--top-k", type=int, default=0, help="best tokens kept (default: 0, all)")
    add(
        "--max-tokens",
        type=int,
        help="of a response (default: the benchmark's own, 8192 for those of files); less where "
        "the model's positions leave less",
    )
    add("--limit", type=int, metavar="N", help="only the first N problems of each benchmark")
    add("--seed", type=int, default=0, help="of the noise (default: 0, that of the training loop)")
    add(
        "--instruction",
        metavar="TEXT",
        help="follows each problem (default: the benchmark's own, the paper's for those of files)",
    )
    add("--system", metavar="TEXT", help="system message (default: none)")
    add(
        "--chat-template",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto (default): the tokenizer's template where it has one",
    )
    add(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="enable_thinking of templates that know it (default: what the template says)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add(
        "--out",
        metavar="DIR",
        help="folder of responses and results (default: evaluations/MODEL-DIGEST, with a digest "
        "of all settings but --benchmarks and --data)",
    )
    add("--slots", type=int, default=64, help="responses decoded at a time (default: 64)")
    add(
        "--mesh",
        default="data:-1,fsdp:1,tensor:1",
        metavar="AXIS:N,...",
        help="devices per axis; -1 takes what is left (default: %(default)s)",
    )
    add("--judge-workers", type=int, default=2, help="processes that judge (default: 2)")
    add(
        "--judge-timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="an answer may take to judge; beyond it counts as wrong (default: 5)",
    )
    add("--list", action="store_true", help="print the table of benchmarks and stop")
    return parser  # fmt: skip


def main(arguments: argparse.Namespace) -> None:
    if arguments.list:
        print(listing())
    else:
        results = evaluate(arguments, make_console(arguments.quiet))
        if arguments.quiet:
            print(markdown(results))


if __name__ == "__main__":
    commands.guarded(
        main,
        make_parser().parse_args(),
        "continue with the same command: finished responses are kept",
    )
