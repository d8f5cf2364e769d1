"""Prepares problems for training: cleans them and writes them once as ArrayRecord.

    python -m experiments.data FILE... --out DIR
    python -m experiments.data train.jsonl.gz --out DIR \\
        --benchmarks aime24.jsonl math500.jsonl
    python -m experiments.data hf:OWNER/NAME --out DIR \\
        --model MODEL --prompt-budget 1024

Prints the report of the cleaning as a Markdown table, the folder of the prepared problems, and the
setting that gives them to a run. The folder is named by a hash of the files and of all settings
here: the same command finds it again and prints the report anew, other files or settings make
another folder beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from attnrl_jax.datasets.cleaning import CleaningConfig, PromptLimit
from attnrl_jax.datasets.files import FieldNames
from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.datasets.names import split_names
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import open_prepared
from attnrl_jax.tasks.prompts import PAPER_INSTRUCTION, PromptConfig, build_prompt, prompt_version
from attnrl_jax.tasks.tokenizer import load_tokenizer
from experiments import commands
from experiments.folders import write_atomically
from experiments.terminal import make_console, working

# The cleaning steps that are switched on or off, as `CleaningConfig` names them.
STEPS = {f.name: f.default for f in dataclasses.fields(CleaningConfig) if type(f.default) is bool}


def parser() -> argparse.ArgumentParser:
    made = commands.parser(__doc__, "data")
    made.add_argument(
        "names",
        nargs="+",
        metavar="FILE",
        help="a file (.jsonl, .jsonl.gz, .json, .parquet), a folder of such files, "
        "tfds:NAME[/CONFIG][:VERSION][@SPLIT] or hf:OWNER/NAME[@REVISION][:PATTERN]",
    )
    made.add_argument("--out", required=True, metavar="DIR", help="folder of prepared problems")
    made.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="problems to set aside for evaluation, at most a fifth of all (default: none)",
    )
    made.add_argument("--json", metavar="FILE", help="write the report to this file as well")

    clean = made.add_argument_group("cleaning")
    defaults = CleaningConfig()
    clean.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="problems, named like FILE, that training problems must not overlap",
    )
    for flag, default, what in (
        ("--keep", True, "count but not remove"),
        ("--remove", False, "remove as well as count"),
    ):
        faults = [name for name, is_removed in STEPS.items() if is_removed is default]
        clean.add_argument(
            flag,
            nargs="+",
            default=[],
            choices=faults,
            metavar="FAULT",
            help=f"faults to {what}: {', '.join(faults)}",
        )
    clean.add_argument(
        "--overlap",
        type=float,
        default=defaults.overlap,
        metavar="SHARE",
        help="share of a benchmark problem's n-grams found in a training problem from which on "
        "they overlap; 0: equal texts alone (default: %(default)s)",
    )
    clean.add_argument(
        "--ngram",
        type=int,
        default=defaults.ngram,
        metavar="WORDS",
        help="words of an n-gram (default: %(default)s)",
    )

    reading = made.add_argument_group("reading")
    reading.add_argument(
        "--problem-field",
        default="",
        metavar="FIELD",
        help="field of the problem (default: the first of the usual ones)",
    )
    reading.add_argument(
        "--answer-field",
        default="",
        metavar="FIELD",
        help="field of the answer (default: the first of the usual ones)",
    )

    prompts = made.add_argument_group("over-long prompts")
    prompts.add_argument(
        "--model",
        metavar="DIR",
        help="model folder, or hf:OWNER/NAME, whose tokenizer measures prompts",
    )
    prompts.add_argument(
        "--prompt-budget", type=int, metavar="N", help="tokens of the longest prompt; needs --model"
    )
    prompts.add_argument(
        "--instruction",
        default=PAPER_INSTRUCTION,
        metavar="TEXT",
        help="follows every problem (default: the paper's, %(default)r)",
    )
    prompts.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    prompts.add_argument(
        "--chat-template",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether prompts use the tokenizer's chat template (default: where it has one)",
    )
    prompts.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="enable_thinking of templates that know it (default: what the template says)",
    )
    return made


def prompt_limit(arguments: argparse.Namespace) -> tuple[PromptLimit | None, str]:
    """The limit on prompts that was asked for, and what identifies its prompts.

    Raises:
      ValueError: a budget without a model or the reverse, or below 1; a model folder or prompt
        settings that cannot be used.
    """
    if (arguments.model is None) != (arguments.prompt_budget is None):
        raise ValueError("--model and --prompt-budget are given together or not at all")
    if arguments.model is None:
        return None, ""
    if arguments.prompt_budget < 1:
        raise ValueError(f"--prompt-budget must be at least 1, got {arguments.prompt_budget}")
    # Imported here: reading a model's configuration imports JAX, which nothing else here needs.
    from attnrl_jax.models.config import read_config

    folder = model_folder(arguments.model)
    vocab_size = read_config(folder).vocab_size
    tokenizer = load_tokenizer(folder, vocab_size)
    config = PromptConfig(
        arguments.instruction,
        arguments.system,
        arguments.chat_template,
        commands.THINKING[arguments.thinking],
    )
    limit = PromptLimit(
        lambda problem: len(build_prompt(problem.text, tokenizer, config)), arguments.prompt_budget
    )
    return limit, prompt_version(folder, config, vocab_size)


def main(arguments: argparse.Namespace) -> None:
    cleaning = dataclasses.replace(
        CleaningConfig(overlap=arguments.overlap, ngram=arguments.ngram),
        **dict.fromkeys(arguments.keep, False) | dict.fromkeys(arguments.remove, True),
    )
    limit, version = prompt_limit(arguments)
    names = [name for given in arguments.names for name in split_names(given)]
    console = make_console(arguments.quiet, stderr=True)
    with working(console, f"reading and cleaning {', '.join(names)}", only_live=True):
        made = prepare(
            names,
            arguments.out,
            fields=FieldNames(arguments.problem_field, arguments.answer_field),
            cleaning=cleaning,
            benchmarks=[name for given in arguments.benchmarks for name in split_names(given)],
            prompt_limit=limit,
            prompt_version=version,
            held_out=arguments.held_out,
        )
    if arguments.json:
        text = json.dumps(made.report.to_dict(), indent=2, ensure_ascii=False)
        write_atomically(Path(arguments.json), text + "\n")
    if not arguments.quiet:
        print(made.report.to_table())
        print()
        counts = f"{len(open_prepared(made.folder))} problems"
        if arguments.held_out:
            counts += f" and {len(open_prepared(made.folder, 'held_out'))} held-out ones"
        print(f"{counts} {'were prepared before' if made.cached else 'prepared'} in {made.folder}")
    print(f"--config.data.train={made.folder}")


if __name__ == "__main__":
    commands.guarded(main, parser().parse_args(), "the same command starts again")
