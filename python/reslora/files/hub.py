"""Names of the Hub: where the files of an adapter or a base model lie on this machine.

Example::

    local_folder("user/base", "merge", "BASE", revision="v2")  # .../snapshots/<commit>

A folder that is there is taken before a name of the Hub, as in PEFT. huggingface_hub keeps the
files in its own cache, by its own settings (HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE). The Hub is
asked once, within a time limit: where it does not answer, what the cache holds is taken at once,
and where the cache holds all that its answer names, nothing more is asked.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

logger = logging.getLogger("reslora")
TIMEOUT = 10.0  # seconds
BASE = "BASE"  # what a base model is called in sentences


def local_folder(
    name: str | os.PathLike[str],
    op: str,
    what: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    files: Sequence[str] | None = None,
) -> Path:
    """Return a folder, or the local copy of one of the Hub (fetched where it is not there).

    A string that begins with ".", "/" or "~" is a path, and so is a dangling link. What is neither
    a path that is there nor a name of the Hub is returned as it is, unless it is such a string.

    Args:
        name: a path, or a name such as "user/name"; only a string is a name of the Hub.
        op: what begins the sentence of an error.
        what: what the name is of, for the sentence; only a BASE may have no user, as "gpt2".
        revision: branch, tag or commit of a name of the Hub; None: its default branch.
        subfolder: the folder below it.
        files: what is fetched of it, of which one at least must be there; None: everything.

    Raises:
        ValueError: for a revision of a path, and a subfolder that leads out of the folder.
        FileNotFoundError: for a path that is not there, and a name of the Hub that cannot be had.
        ImportError: for a name of the Hub without huggingface_hub.
    """
    below = PurePosixPath(subfolder or "")
    if below.is_absolute() or ".." in below.parts:
        raise ValueError(f"[{op}] subfolder must be a path below {what}; got {subfolder!r}")
    if Path(name).exists():
        if revision is not None:
            raise ValueError(
                f"[{op}] a revision is of a name of the Hub; got {revision!r} and {name}, which is "
                "a path here"
            )
        return Path(name) / below
    if isinstance(name, str) and (name.startswith((".", "/", "~")) or os.path.lexists(name)):
        raise FileNotFoundError(
            f"[{op}] {what} must be a folder or a name of the Hub; got no such folder: {name}"
        )
    form = r"([\w.-]+/)?[\w.-]+" if what == BASE else r"[\w.-]+/[\w.-]+"
    if not isinstance(name, str) or not re.fullmatch(form, name):
        return Path(name) / below
    return _fetched(name, op, what, revision, below, files)


def _fetched(
    name: str,
    op: str,
    what: str,
    revision: str | None,
    below: PurePosixPath,
    files: Sequence[str] | None,
) -> Path:
    """Return the local copy of a folder of the Hub."""
    patterns = None if files is None else [str(below / file) for file in files]
    shown = name if revision is None else f"{name} at revision {revision!r}"
    try:
        folder = _snapshot(name, revision, patterns) / below
    except ImportError:
        raise ImportError(
            f"[{op}] {what} must be a folder; got {name} (for names of the Hub: pip install "
            "huggingface_hub)"
        ) from None
    except Exception as error:
        _refuse(op, what, shown, _reason(error))
    if files is not None and not any((folder / file).is_file() for file in files):
        place = f" in {below}" if below.parts else ", or only in a subfolder"
        _refuse(op, what, shown, f"it holds no {files[0]}{place}")
    return folder


def _refuse(op: str, what: str, shown: str, reason: str) -> NoReturn:
    raise FileNotFoundError(
        f"[{op}] {what} must be a folder or a name of the Hub that can be had; got {shown} "
        f"({reason})"
    )


def _snapshot(name: str, revision: str | None, patterns: list[str] | None) -> Path:
    """Return where the cache has a commit; what it lacks of it is fetched.

    Where the Hub answers once and then fails, what the cache holds of the revision is taken.
    """
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
    except (errors.HFValidationError, errors.RevisionNotFoundError):
        raise
    except Exception:  # no network or no access: the cache may hold it
        kept = _cached(name, revision, patterns)
        if kept is None:
            raise
        return kept
    kept = _cached(name, revision, patterns)
    names = [file.rfilename for file in info.siblings or ()]
    wanted = [file for file in names if patterns is None or file in patterns]
    older = kept if kept is not None and kept.name != info.sha else None
    if kept is not None and older is None and wanted and _holds(kept, wanted):
        return kept
    try:
        return _downloaded(name, revision, info.sha, patterns, wanted)
    except Exception as error:
        if older is None:
            raise
        logger.warning(
            "[hub] %s is taken from the cache, at commit %s, which is older: commit %s cannot be "
            "fetched (%s)", name, older.name, info.sha, _first_line(error),
        )  # fmt: skip
        return older


def _downloaded(
    name: str,
    revision: str | None,
    commit: str | None,
    patterns: list[str] | None,
    wanted: list[str],
) -> Path:
    """Fetch what the cache lacks of a commit, then note there that it is the revision.

    In this order an older copy keeps its name where fetching fails.
    """
    from huggingface_hub import snapshot_download

    allowed = _escaped(patterns)
    folder = Path(snapshot_download(name, revision=commit or revision, allow_patterns=allowed))
    if not _holds(folder, wanted):  # where the Hub fails, huggingface_hub returns what it has
        raise ConnectionError("it did not send all files")
    with suppress(Exception):  # all files are here
        snapshot_download(name, revision=revision, allow_patterns=allowed)
    return folder


def _cached(name: str, revision: str | None, patterns: list[str] | None) -> Path | None:
    """Return where the cache has a revision, without asking the Hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_escaped(patterns), local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(folder)


def cached_folder(name: str, revision: str | None, file: str) -> Path | None:
    """Return where this machine has a file of a path or of a name of the Hub; nothing is asked."""
    if Path(name).exists():
        return Path(name) if (Path(name) / file).is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file, revision=revision)
    except (ImportError, ValueError):  # no name of the Hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def _escaped(patterns: list[str] | None) -> list[str] | None:
    return None if patterns is None else [glob.escape(pattern) for pattern in patterns]


def _holds(folder: Path, files: list[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def _reason(error: BaseException) -> str:
    """Return why a name cannot be had, and the way out."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    token = "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError | errors.LocalEntryNotFoundError):
        return _first_line(error)
    if isinstance(error, errors.GatedRepoError):
        return f"access is refused: ask for it on its page, then {token}"
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) in (401, 403):
        return (
            "access is refused, or there is no such model: check the spelling of the name; what is "
            f"private needs a token: {token}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a folder"
    return (
        f"it is not, or not whole, in the cache, and the Hub cannot be reached: "
        f"{_first_line(error)}; or give a folder"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _status(error: BaseException) -> int | None:
    """Return the status of the answer that an error of huggingface_hub tells of."""
    return getattr(getattr(error, "response", None), "status_code", None)
