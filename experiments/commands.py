"""What all commands share: their help, and how they end when something goes wrong."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from typing import NoReturn

from absl import flags

# Values of `--thinking`, for `PromptConfig.enable_thinking`.
THINKING = {"auto": None, "on": True, "off": False}


TRACEBACK = "Traceback (most recent call last):"
ROOT = Path(__file__).resolve().parents[1]
QUIET = "show nothing but warnings, errors and the last line"


def stop(
    error: Exception, told: bool = False, begun: bool = False, repeats: bool = False
) -> NoReturn:
    """Ends the command with an error in one paragraph.

    The exit code is 2 where trying again would not help: what was given cannot be used, or the
    error comes again. It is 1 for anything else.

    Args:
      error: what ended it.
      told: its words are meant for the user, whatever its class.
      begun: what was given had been found good, so that a `ValueError` or `OSError` is a fault.
      repeats: it comes again.
    """
    text = str(error).strip()
    refused = repeats or (isinstance(error, ValueError | OSError) and not begun)
    told = told or (_is_told(error) and not (begun and type(error) is ValueError))
    if not told:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
        text = f"{' '.join(text.split())} (--debug shows the traceback)"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2 if refused else 1)


def _is_told(error: Exception) -> bool:
    """Whether its words are meant for the user: of this project, and not of a library, of Python or
    of the system, which do not know what they were asked for."""
    # A class of the command's own module is one of `__main__`.
    if type(error).__module__.partition(".")[0] in ("attnrl_jax", "experiments", "__main__"):
        return True
    if isinstance(error, OSError):
        return error.errno is None
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    own = (ROOT / "attnrl_jax", ROOT / "experiments")
    # Neither a virtual environment nor a file of the user's in the project's folder.
    file = Path(place.tb_frame.f_code.co_filename) if place is not None else None
    raised_here = file is None or any(folder in file.parents for folder in own)
    return type(error) is ValueError and raised_here


def config_fault(error: Exception) -> str:
    """What an error of ml_collections' flags says, without the traceback that it may carry."""
    text = str(error)
    if isinstance(error, AttributeError | KeyError):
        words = text.replace("\\n", ". ").replace("\\", "").replace("'", "").replace('"', "")
        if "attribute get_config" in words:
            return "the file of --config has no get_config()"
        return " ".join(f"unknown setting {words}".split())
    if TRACEBACK in text:
        # The configuration file itself raised: its own words are enough.
        return re.sub(r"^\w*Error: ", "", _raised(text.partition(TRACEBACK)[2]))
    return " ".join(text.split())


def without_traceback(message: str) -> str:
    """What ml_collections says of an error in a configuration file, but for its traceback."""
    before, traceback, after = message.partition(TRACEBACK)
    if not traceback:
        return message
    return f"{before.strip()} {_raised(after)}"


def _raised(traceback: str) -> str:
    """The error below a traceback, on one line."""
    lines = traceback.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    # What a frame says of its code is indented. The error may go on, in lines of any kind.
    below = dropwhile(lambda line: line.startswith(" "), lines[frames[-1] + 1 if frames else 0 :])
    error = " ".join(" ".join(below).split()) or "".join(lines[-1:]).strip()
    return re.sub(r"^(?:[a-z_]+[.])+", "", error)


def interrupted(how_to_continue: str, exit_code: int = 130) -> NoReturn:
    """Ends a command that was interrupted: by Ctrl-C, unless the exit code is that of another
    signal."""
    print(f"\nstopped; {how_to_continue}", file=sys.stderr)
    sys.exit(exit_code)


def readable(module_docstring: str, width: int | None = None) -> str:
    """A docstring with its paragraphs laid out anew for the terminal.

    Paragraphs in which a line is indented, examples and lists, stay as they are.

    Args:
      module_docstring: `__doc__` of a module.
      width: columns, by default those of the terminal, at most 100.
    """
    width = width or min(shutil.get_terminal_size().columns, 100)
    paragraphs = module_docstring.strip().split("\n\n")
    return "\n\n".join(
        text
        if any(line.startswith(" ") for line in text.splitlines())
        else textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)
        for text in paragraphs
    )


def show_help(module_docstring: str) -> None:
    """Of a command with absl's flags: prints its help, where that is asked for, and ends.

    Called when the flags are defined and not yet parsed. (absl's own help lays out no docstring,
    and ends with exit code 1.)
    """
    if not {"--help", "-help", "-h", "-?"} & {*sys.argv[1:]}:
        return
    # Its first line is the path of the module.
    _, _, own = flags.FLAGS.main_module_help().strip().partition("\n")
    print(f"{readable(module_docstring)}\n\nflags:\n{own}")
    sys.exit(0)


def parser(
    module_docstring: str | None, name: str, quiet: str | None = QUIET
) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with `--debug` and `--quiet`.

    Args:
      module_docstring: `__doc__` of the command's module.
      name: of the module under `experiments`.
      quiet: help of `--quiet`; None for a command that shows nothing but its result.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=readable(module_docstring or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if quiet is not None:
        made.add_argument("--quiet", action="store_true", help=quiet)
    return made


def guarded(
    main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, again: str
) -> None:
    """Runs a command's main function and turns its end into an exit code.

    Args:
      main: given the parsed arguments.
      arguments: with `debug`.
      again: how an interrupted command is continued.
    """
    try:
        main(arguments)
    except KeyboardInterrupt:
        interrupted(again)
    except Exception as error:
        if arguments.debug:
            raise
        stop(error)
