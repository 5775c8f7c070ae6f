"""Talking to the person at the terminal: options, errors in one sentence, progress bars."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

LARGEST = 2**63 - 1  # of a seed, and of whatever else torch takes as an int64


class UserError(Exception):
    """A request that cannot be served; the message is one sentence, shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse's parser; what is wrong is a UserError that names the option."""

    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print its usage and exit."""
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise UserError(f"{message} (see --help)")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return argparse's type of a whole number that has a least value."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}; got {value}")
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f"must be at most {LARGEST}; got {value}")
        return value

    return whole_number


def names(text: str) -> str:
    """Return names separated by commas, none of them empty, for argparse."""
    if not all(text.split(",")):
        raise argparse.ArgumentTypeError(f"must be names separated by commas; got {text!r}")
    return text


def positive(text: str) -> float:
    """Return a number above 0, for argparse."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite; got {value:g}")
    return value


def folder(text: str) -> Path:
    """Return a folder, which may be absent, for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder; got nothing")
    if (path := Path(text).expanduser()).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a folder; got the file {text!r}")
    return path


def model_name(text: str) -> str:
    """Return a folder that exists, or what may be a name of the Hub, for argparse."""
    path = Path(text).expanduser()
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or os.path.lexists(path)
    if is_path and not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"must name a folder or a model of the Hub; no folder {text!r}"
        )
    return text


def text_file(text: str) -> Path:
    """Return a file that exists, for argparse."""
    if not (path := Path(text).expanduser()).is_file():
        raise argparse.ArgumentTypeError(f"must name a text file; got {text!r}")
    return path


# What the system says where it has no more room for a file.
_NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def reason_of(error: Exception) -> str:
    """Return the first line of an error's text; of a refusal of the system, path and reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def refused_by_system(error: Exception) -> str | None:
    """Return a sentence for what the system refused in the middle; None for any other error.

    Libraries that write files turn the system's error into one of their own, with its words.
    """
    reason = reason_of(error)
    if any(words in str(error) for words in _NO_ROOM):
        way_out = "make room, or choose another --output or --cache"
        return f"there is no room for a file; got {reason!r} ({way_out})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the system refused a file; got {reason!r}"
    return None


def progress_bar(steps: Iterable[int], name: str) -> tqdm:
    """Return a bar over `steps`; where no terminal looks, it prints a line now and then."""
    from tqdm import tqdm  # quickstart.sh reads requests before anything is installed

    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(steps, desc=name, unit="step", dynamic_ncols=True, mininterval=interval)


def exit_code_of(program: str, work: Callable[[], object]) -> int:
    """Run a program; say in one sentence what stopped it, 2 for a bad request, 130 for Ctrl-C."""
    try:
        work()
    except (UserError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    return 0
