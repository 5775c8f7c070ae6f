"""The command `reslora`: merging, exporting and looking into files, without writing Python.

    reslora merge BASE ADAPTER OUT --verify held_out.txt
    reslora export-lora ADAPTER OUT --rank 16
    reslora inspect PATH
    reslora check-export DIR
    reslora plot singular-values ADAPTER OUT.png
    reslora convert THEIRS ADAPTER --base BASE
    reslora doctor --model BASE
    reslora --cmake-prefix

Exit codes: 0 done, 1 an error (one sentence on stderr) or, of check-export, a reader that would
misread, 2 arguments that cannot be understood, 130 interrupted. With --json stdout holds one JSON
document: what was found, or {"error": the sentence}. Warnings go to stderr in either form, and so
does an error where stdout cannot be written. A reader that goes away, as `head`, is no error.

The options are in options.py, what the commands do in run.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .._loading import INTERRUPTED, asks_for_json
from .interrupting import interruptible
from .options import Answer, UsageError, overview, parse
from .run import Outcome

logger = logging.getLogger("reslora")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_json = asks_for_json(given)
    try:
        with interruptible():
            _open_what_is_closed()
            _quiet_libraries()
            outcome = _run(given)
        shown = json.dumps(outcome.values, indent=2) if is_json else outcome.text
        return outcome.code if _print(shown) else 1
    except UsageError as error:
        return _fail(str(error), 2, is_json, f"{error.usage}{error.program}: error: ")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return _fail(str(error).strip() or type(error).__name__, 1, is_json)
    except KeyboardInterrupt as error:
        return _fail(str(error) or INTERRUPTED, 130, is_json)
    except Exception as error:  # a mistake of ours, which its traceback tells
        if is_json:
            _print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise


def _open_what_is_closed() -> None:
    """Give output that the caller has closed, as `>&-` does, a place to go."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def _quiet_libraries() -> None:
    """Keep what other libraries print from standing between our lines; warnings of theirs stay."""
    if not sys.stderr.isatty():  # read when huggingface_hub and transformers are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Of classes that torchao registers, when transformers imports it.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # Of a home where matplotlib cannot keep what it finds.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _run(arguments: list[str]) -> Outcome:
    """Run one command. What others print meanwhile goes to stderr: stdout is for the outcome."""
    if set(arguments) <= {"--json"}:
        return Outcome({"help": overview()}, overview())
    try:
        options = parse(arguments)
    except Answer as answer:
        return answer.outcome
    shown: list[str] = []
    with _warnings_to(shown), contextlib.redirect_stdout(sys.stderr):
        outcome: Outcome = options.run(options)
    if shown and isinstance(outcome.values, dict):
        outcome.values["warnings"] = [*outcome.values.get("warnings", []), *shown]
    return outcome


@contextlib.contextmanager
def _warnings_to(shown: list[str]) -> Iterator[None]:
    """Print warnings, and what our logger has to say, as lines of ours; collect them too."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        shown.append(str(message))
        _say(f"reslora: warning: {message}")

    handler = _Handler(show)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Gives the text of every record to a function."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


def _fail(sentence: str, code: int, is_json: bool, before: str = "reslora: ") -> int:
    """Tell what is wrong and return the exit code."""
    if not (is_json and _print(json.dumps({"error": sentence}))):
        _say(f"{before}{sentence}")
    return code


def _print(text: str) -> bool:
    """Print to stdout and tell whether it can be written; what it cannot show, as an escape."""
    if sys.__stdout__ is None:  # the caller has closed it; see _open_what_is_closed
        _say("reslora: stdout must be a place to write; got a closed one")
        return False
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not flushed
        if not isinstance(error, BrokenPipeError):
            _say(f"reslora: stdout must be a place to write; got {error.strerror}")
            return False
    return True


def _say(line: str) -> None:
    """Print a line to stderr; where nobody takes it, there is no other place."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
