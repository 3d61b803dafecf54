"""`fastunlearn ...`: one file a command.

Every command is a dataclass of its flags (tyro makes the parser from it) with a method `run() -> exit code`.
One whose `run` does not lock what it writes has a method `lock()`, a context for the time of `run`. One whose
flags depend on the methods of the package has a class method `with_methods()`, which fills them in.

Parsing imports no torch, so that `--help` is instant, but for the flags of the methods, which stand in the
methods' own files. A command imports what it runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .. import __version__
from ..runs import launcher

DESCRIPTION = """Make a trained diffusion model forget given training images.

Start with `fastunlearn demo`: it needs no data and no GPU. `fastunlearn COMMAND --help` explains a command, \
with an example.

Flags may be written with dashes or underscores, and are called as in diffusers' training scripts. Exit \
codes: 0 done, 1 not passed or failed, 2 wrong input, 75 stopped by --max_time, 128 + N stopped by signal N. \
Errors are one line, and one more for each file of a list; --debug or FASTUNLEARN_DEBUG=1 adds the \
traceback."""


FEWEST_COLUMNS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (default: those of the process) name, and returns the exit code.

    Raises:
        SystemExit: after `--help` (code 0), for flags that do not parse (code 2), and for a run that a signal
            stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_terminal()
    if arguments == ["--version"]:
        print(f"fastunlearn {__version__}")
        return 0
    debug = "--debug" in arguments or os.environ.get("FASTUNLEARN_DEBUG", "0") not in ("", "0")
    if importlib.util.find_spec("tyro") is None:
        print("error: commands: expected the package tyro (pip install tyro), got none", file=sys.stderr)
        return 2
    command = _parse([argument for argument in arguments if argument != "--debug"])
    try:
        with (
            _without_warnings_of_pillow(),
            _warnings_in_a_line(),
            launcher.watched(),
            getattr(command, "lock", nullcontext)(),
        ):
            return command.run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return code


@contextmanager
def _without_warnings_of_pillow() -> Iterator[None]:
    """What it warns of, such as too many pixels, is refused by an error of ours, or changes no pixel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings of ours are shown as errors are: without the line of code that they come from."""
    usual, ours = warnings.formatwarning, str(Path(__file__).parents[1])

    def shown(message, category, filename, lineno, line=None) -> str:
        if filename.startswith(ours):
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _prepare_terminal() -> None:
    """Names of files may hold bytes that no text has: they are shown escaped.

    Help is not wrapped into a few columns.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) < FEWEST_COLUMNS:
        os.environ["COLUMNS"] = str(FEWEST_COLUMNS)


def _parse(arguments: list[str]):
    """The command, with its flags."""
    from typing import Annotated, Union

    import tyro
    from tyro.conf import FlagCreatePairsOff, HelptextFromCommentsOff, OmitArgPrefixes

    from .data import Data
    from .demo import Demo
    from .evaluate import Evaluate
    from .neighbors import Neighbors
    from .optional_flags import optional_flags
    from .pretrain import Pretrain
    from .purge import Purge
    from .sample import Sample
    from .unlearn import Unlearn

    commands = {
        command.__name__.lower(): command
        for command in (Demo, Unlearn, Evaluate, Sample, Neighbors, Pretrain, Data, Purge)
    }
    config = OmitArgPrefixes, FlagCreatePairsOff, HelptextFromCommentsOff
    if arguments and arguments[0] in commands:
        command = commands[arguments[0]]
        if hasattr(command, "with_methods"):
            command = command.with_methods()
        with optional_flags():
            return tyro.cli(command, prog=f"fastunlearn {arguments[0]}", args=arguments[1:], config=config)
    # Only to say what there is, in a paragraph a command: parsing ends here.
    first = {name: " ".join(command.__doc__.split("\n\n")[0].split()) for name, command in commands.items()}
    listed = tuple(
        Annotated[command, tyro.conf.subcommand(name, description=first[name])]
        for name, command in commands.items()
    )
    every = Union[listed]  # noqa: UP007 (of a tuple)
    return tyro.cli(every, prog="fastunlearn", description=DESCRIPTION, args=arguments, config=config)


def _exit_code(error: Exception) -> int | None:
    """2 for wrong input, 1 for a run of ours that failed, None for a defect, ours or of a library: that
    deserves its traceback.
    """
    if isinstance(error, (OSError, ImportError)):
        return 2
    if type(error).__module__.startswith("fastunlearn."):
        return 1
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_here = frames[-1][0].f_globals.get("__name__", "").startswith("fastunlearn.")
    return 2 if isinstance(error, (ValueError, TypeError)) and raised_here else None
