"""What all commands share: how they end when something goes wrong."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from itertools import dropwhile
from typing import NoReturn

from rich.console import Console

from attnrl_jax.processes import ProcessError

# Values of `--thinking`, for `PromptConfig.enable_thinking`.
THINKING = {"auto": None, "on": True, "off": False}


TRACEBACK = "Traceback (most recent call last):"


def stop(error: Exception, told: bool = False) -> NoReturn:
    """Ends the command with an error in one paragraph.

    The exit code is 2 where what was given cannot be used, so that trying again would not help, and
    1 for anything else.

    Args:
      error: what ended it.
      told: its words are meant for the user, whatever its class.
    """
    text, refused = str(error).strip(), isinstance(error, ValueError | OSError)
    if not refused and not told and not isinstance(error, ProcessError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2 if refused else 1)


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


def parser(module_docstring: str | None, name: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with `--debug`.

    Args:
      module_docstring: `__doc__` of the command's module.
      name: of the module under `experiments`.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=module_docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
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


def notebook_console() -> Console:
    """Plain lines as a notebook's cell keeps them: no bars that redraw, one output for a cell."""
    return Console(width=100, force_jupyter=False, force_terminal=False)
