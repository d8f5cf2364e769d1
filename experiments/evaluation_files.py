"""The folder of an evaluation (settings, responses, results) and what the terminal shows of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import zlib
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from attnrl_jax.evaluation import Answered, Summary, average, summarise
from attnrl_jax.tasks.problems import DataError
from experiments.benchmarks import BENCHMARKS, Part
from experiments.folders import flat, write_atomically
from experiments.tables import table
from experiments.terminal import bars

# Called with (responses finished, responses in all) of the benchmark under way.
Show = Callable[[int, int], None]


def settings_of(
    model: str, values: dict[str, Any], folder: Path, parts: Sequence[Part]
) -> dict[str, Any]:
    """All that the numbers depend on, as `settings.json` holds it.

    Problems, prompts and model files are digests, so that results of different ones never mix.

    Args:
      model: where it is: for the reader, as nothing depends on it.
      values: of the command line.
      folder: of the model.
      parts: the benchmarks.
    """
    benchmarks = {
        part.name: {
            "count": len(part.problems),
            "problems": digest([(p.id, p.text, p.answers) for p in part.problems]),
            "prompts": digest([ids.tolist() for ids in part.prompts.values()]),
            "samples": part.samples,
            "max_tokens": part.max_tokens,
            "skipped": part.skipped(),
        }
        for part in parts
    }
    return {
        "model": model,
        **values,
        "model_files": _model_digest(folder),
        "benchmarks": benchmarks,
    }


def joined(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An evaluation's settings with the benchmarks that its folder has besides.

    Returns:
      those settings, and the names of what may differ from the folder's: where the model is, and
      the benchmarks that the folder does not have yet. What else differs `claimed` refuses.
    """
    try:
        there = json.loads((folder / "settings.json").read_text())["benchmarks"]
        there = dict(there)
    except (OSError, ValueError, KeyError, TypeError):
        # No folder of ours, or none yet: `claimed` says so.
        there = {}
    new = {k: v for k, v in settings["benchmarks"].items() if k not in there}
    free = ["model", *flat(new, "benchmarks")]
    return settings | {"benchmarks": there | settings["benchmarks"]}, free


def digest(value: Any) -> str:
    """Eight letters that say whether two values are the same as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _model_digest(folder: Path) -> str:
    """Of the files that decide what a model writes: weights, configuration, tokenizer."""
    found = hashlib.blake2b(digest_size=8)
    names = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
    for path in sorted({path for pattern in names for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            found.update(path.name.encode() + b"\0")
            found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


class ResponseFile:
    """Judged responses of one benchmark, a JSON object a line. Safe to append to from a thread.

    Opening it reads what is there; a last line that a crash cut off is dropped.

    Attributes:
      path: of the file.
      responses: without their texts, which for long reasoning would fill the memory.

    Raises:
      DataError: another line that is no response, or a response that is there twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self.responses, length = _read_responses(path)
        self._file = path.open("ab")
        self._file.truncate(length)

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, response: Answered) -> None:
        """Writes a response at once."""
        line = json.dumps(dataclasses.asdict(response)) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            self.responses.append(dataclasses.replace(response, text=""))

    def done(self, problems: set[int], samples: int) -> set[tuple[int, int]]:
        """(problem, sample) of every response.

        Raises:
          DataError: a response that was not asked for, or that is there twice.
        """
        return _done(self.path, self.responses, problems, samples)


def _read_responses(path: Path) -> tuple[list[Answered], int]:
    """The responses of a file, without their texts, and the bytes of its whole lines."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    responses = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            responses.append(Answered(**json.loads(line) | {"text": ""}))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a response ({error})") from error
    return responses, len(whole)


def _done(
    path: Path, responses: Sequence[Answered], problems: Container[int], samples: int
) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for number, response in enumerate(responses, start=1):
        key = (response.problem, response.sample)
        if key in found:
            raise DataError(f"{path}:{number}: problem, sample {key} is there twice")
        if response.problem not in problems or not 0 <= response.sample < samples:
            raise DataError(f"{path}:{number}: problem, sample {key} is not asked for")
        found.add(key)
    return found


def response_path(folder: Path, name: str) -> Path:
    """File of a benchmark's responses."""
    return folder / "responses" / f"{name}.jsonl"


def summary_of(name: str, responses: Sequence[Answered], samples: int) -> Summary:
    """The numbers of a benchmark; a seed by name, so that they do not depend on its company."""
    return summarise(responses, samples, zlib.crc32(name.encode()))


def other_summaries(
    folder: Path, settings: dict[str, Any], names: Container[str]
) -> dict[str, Summary]:
    """Numbers of the folder's benchmarks but `names`, where they are complete.

    Raises:
      DataError: a damaged file of responses.
    """
    found = {}
    for name, wanted in settings["benchmarks"].items():
        if name in names:
            continue
        path, samples = response_path(folder, name), wanted["samples"]
        responses, _ = _read_responses(path)
        done = _done(path, responses, range(wanted["count"]), samples)
        if len(done) == (wanted["count"] - len(wanted["skipped"])) * samples:
            found[name] = summary_of(name, responses, samples)
    return found


def results_of(settings: dict[str, Any], summaries: dict[str, Summary]) -> dict[str, Any]:
    """What `results.json` holds: the same in whatever order the benchmarks were evaluated.

    Args:
      settings: of the folder.
      summaries: of its benchmarks that are complete, at least one.
    """
    benchmarks = settings["benchmarks"]
    # As in the table of benchmarks, then files by name.
    order = [name for name in BENCHMARKS if name in benchmarks]
    order += sorted(benchmarks.keys() - BENCHMARKS.keys())
    complete = {name: summaries[name] for name in order if name in summaries}
    results: dict[str, Any] = {
        "settings": settings,
        "benchmarks": {
            name: plain(summary, benchmarks[name]["skipped"]) for name, summary in complete.items()
        },
        "incomplete": [name for name in order if name not in summaries],
    }
    if len(complete) > 1:
        overall = average(list(complete.values()))
        results["average"] = {name: value._asdict() for name, value in overall.items()}
    return results


def plain(summary: Summary, skipped: list[str]) -> dict[str, Any]:
    """A benchmark's numbers as `results.json` holds them; shares are within 0 .. 1."""
    return {
        "problems": summary.problems,
        "skipped": skipped,
        "samples": summary.samples,
        **{name: value._asdict() for name, value in summary.accuracy.items()},
        "response_length": summary.response_length,
        "truncated": summary.truncated,
        "unanswered": summary.unanswered,
        "judge_lost": summary.lost,
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "tokens_per_second": summary.tokens_per_second,
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "results.json", text)
    write_atomically(folder / "results.md", markdown(results) + "\n")


def markdown(results: dict[str, Any]) -> str:
    """Two tables of at most 100 columns: accuracies in percent, with their 95 % intervals over
    problems; and what the responses are like."""
    benchmarks = results["benchmarks"]
    most = max(numbers["samples"] for numbers in benchmarks.values())
    # With one sample all three are the same.
    metrics = ["avg", "pass", "maj"] if most > 1 else ["avg"]
    accuracy = [["benchmark", "problems", "n", *(f"{metric}@n" for metric in metrics)]]
    for name, numbers in benchmarks.items():
        n = numbers["samples"]
        cells = (_cell(numbers[f"{metric}@{n}"]) for metric in metrics)
        accuracy.append([name, str(numbers["problems"]), str(n), *cells])
    if "average" in results:
        overall = results["average"]
        cells = (_cell(overall[m]) if (m := f"{metric}@n") in overall else "" for metric in metrics)
        accuracy.append(["average", "", "", *cells])
    responses = [["benchmark", "tokens", "cut", "no answer", "lost", "tokens/s"]]
    for name, numbers in benchmarks.items():
        responses.append(
            [
                name,
                f"{numbers['response_length']:.0f}",
                f"{numbers['truncated']:.1%}",
                f"{numbers['unanswered']:.1%}",
                str(numbers["judge_lost"]),
                f"{numbers['tokens_per_second']:.0f}",
            ]
        )
    notes = [
        f"{name}: {len(numbers['skipped'])} skipped, with no room for a response after the "
        f"prompt: {', '.join(numbers['skipped'][:5])}"
        + (", ..." if len(numbers["skipped"]) > 5 else "")
        for name, numbers in benchmarks.items()
        if numbers["skipped"]
    ]
    if results["incomplete"]:
        notes.append(f"not complete, and not part of this: {', '.join(results['incomplete'])}")
    return "\n\n".join([table(accuracy), table(responses), *notes])


def _cell(numbers: dict[str, float]) -> str:
    value, low, high = (100 * numbers[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


class Terminal:
    """Progress of one benchmark: a bar in a terminal, else a line at every tenth."""

    def __init__(self, name: str, console: Console, on_progress: Show | None):
        self._name = name
        self._console = console
        self._on_progress = on_progress
        self._tenths = -1
        self._progress = bars(console, "responses")
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, finished: int, total: int) -> None:
        """Shows how many responses are finished."""
        self._progress.update(self._task, completed=finished, total=total)
        if not self._console.is_terminal and finished * 10 // total > self._tenths:
            self._tenths = finished * 10 // total
            self._console.print(f"{self._name}: {finished} of {total} responses", soft_wrap=True)
        if self._on_progress is not None:
            self._on_progress(finished, total)
