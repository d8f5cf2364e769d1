"""The command that prepares problems."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnrl_jax.datasets.cleaning import CleaningReport
from attnrl_jax.datasets.prepared import open_prepared, read_report
from attnrl_jax.tasks.prompts import PromptConfig, prompt_version
from experiments import data

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"
POLICY = ROOT / "experiments" / "assets" / "policy"
SHARED = ROOT.parent / "shared" / "data"


def run(*arguments, capsys):
    """Lines that the command prints."""
    data.main(data.parser().parse_args([str(argument) for argument in arguments]))
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def file(tmp_path):
    """Ten problems, a copy of one of them, a row without answer and one in Chinese."""
    rows = [{"problem": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(10)]
    rows += [rows[3], {"problem": "What?", "answer": ""}, {"problem": "一加一?", "answer": "2"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prints_the_report_the_folder_and_the_setting(file, tmp_path, capsys):
    out = tmp_path / "out"
    lines = run(file, "--out", out, "--json", tmp_path / "report.json", capsys=capsys)
    folder = Path(lines[-1].removeprefix("--config.data.train="))
    report = read_report(folder)
    assert folder.is_relative_to(out)
    assert "\n".join(lines).startswith(report.to_table())
    assert lines[-2] == f"11 problems prepared in {folder}"
    assert len(open_prepared(folder)) == 11
    values = json.loads((tmp_path / "report.json").read_text())
    assert CleaningReport.from_dict(values) == report
    again = run(file, "--out", out, capsys=capsys)
    assert again == [
        line.replace("problems prepared", "problems were prepared before") for line in lines
    ]


def test_flags_decide_what_is_removed(file, tmp_path, capsys):
    bench = tmp_path / "bench.jsonl"
    bench.write_text('{"problem": "What is 4 and 4?", "answer": "8"}')

    def kept(*arguments):
        lines = run(file, "--out", tmp_path / "out", *arguments, capsys=capsys)
        return int(next(line for line in lines if " in /" in line).split()[0])

    assert kept() == 11
    assert kept("--keep", "duplicates") == 12
    assert kept("--keep", "duplicates", "empty_answers") == 13
    assert kept("--remove", "non_latin") == 10
    assert kept("--benchmarks", bench, "--ngram", "2") == 10
    assert kept("--benchmarks", bench, "--ngram", "2", "--overlap", "0.25") == 1
    assert kept("--held-out", "2") == 9


def test_prompts_over_the_budget_are_removed(file, tmp_path, capsys):
    arguments = [file, "--out", tmp_path, "--model", POLICY, "--keep", "empty_answers"]

    def removed(budget, *more):
        lines = run(*arguments, "--prompt-budget", budget, *more, capsys=capsys)
        line = next(line for line in lines if line.startswith("--config.data.train="))
        return read_report(line.removeprefix("--config.data.train=")).removed["long_prompts"]

    # Words are tokens here: "What is 3 and 3?" has 5 and occurs 11 times, the instruction has 12.
    assert removed(17) == 0
    assert removed(16) == 11
    assert removed(5, "--instruction", "") == 0
    assert removed(4, "--instruction", "") == 11


def test_the_version_of_prompts(tmp_path):
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")

    def version(config=PromptConfig(), size=7, kind="auto"):  # noqa: B008
        return prompt_version(tmp_path, config, size, kind)

    first = version()
    assert version() == first
    (tmp_path / "model.safetensors").write_text("other weights")
    assert version() == first
    others = {
        version(PromptConfig(instruction="")),
        version(PromptConfig(system="Be brief.")),
        version(PromptConfig(use_chat_template="never")),
        version(size=8),
        version(kind="bytes"),
    }
    (tmp_path / "tokenizer.json").write_text("[]")
    others.add(version())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    others.add(version())
    assert len(others | {first}) == 8


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.data", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_errors_are_one_paragraph(tmp_path):
    done = command(tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-budget", "7"], "together"),
        (["--model", "DIR"], "together"),
        (["--model", "none", "--prompt-budget", "7"], "none"),
        (["--model", "none", "--prompt-budget", "0"], "at least 1"),
        (["--overlap", "2"], "overlap must be within"),
        (["--held-out", "-1"], "held_out"),
        (["--problem-field", "task"], "rows.jsonl:1: .*task"),
    ],
)
def test_settings_that_cannot_be_used(file, tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        data.main(data.parser().parse_args([str(file), "--out", str(tmp_path / "out"), *arguments]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--keep", "typos"], ["--keep", "non_latin"], ["--ngram", "x"]]
)
def test_unknown_choices_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        data.parser().parse_args(["a.jsonl", "--out", "b", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
def test_real_files(tmp_path):
    """The command itself, on rows of which one copies a benchmark's problem."""
    with gzip.open(SHARED / "train" / "dapo_math_train.jsonl.gz", "rt") as packed:
        lines = packed.readlines()[:300]
    copied = (SHARED / "eval" / "aime24.jsonl").read_text().splitlines()[0]
    path = tmp_path / "slice.jsonl"
    path.write_text("".join([*lines, copied + "\n"]))
    bench = [SHARED / "eval" / "aime24.jsonl", SHARED / "eval" / "gsm8k_test.jsonl"]
    done = command(path, "--out", tmp_path / "out", "--held-out", "50", "--benchmarks", *bench)
    assert (done.returncode, done.stderr) == (0, "")
    *_, where, setting = done.stdout.splitlines()
    folder = setting.removeprefix("--config.data.train=")
    report = read_report(folder)
    assert report.read == 301
    assert report.benchmarks["aime24"].overlapping == 1
    assert "| aime24 | 30 | 1 | 1 |" in done.stdout
    assert where == f"{report.kept - 50} problems and 50 held-out ones prepared in {folder}"
    assert len(open_prepared(folder, "held_out")) == 50
