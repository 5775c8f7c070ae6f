"""Texts that every machine with Python and torch has, and how they become blocks of tokens.

    docstrings = corpus.docstrings()              # Python's standard library: to pretrain on
    train, held_out = corpus.header_comments()    # the C++ headers of torch: to adapt to

Each text is a list of documents. The held-out part is kept apart by file, and a comment that occurs
in both parts counts for the first only. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from console import UserError

# Longer files are cut here, so that one wrong path cannot fill the memory.
MAX_CHARACTERS = 20_000_000

_COMMENT = re.compile(
    r"""
    "(?:\\.|[^"\\\n])*"                        # a string: matched to be skipped
    | (?P<lines>(?:^[ \t]*//[^\n]*\n)+)        # consecutive lines of //
    | (?P<block>/\*.*?\*/)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_MARKERS = re.compile(r"^[ \t]*(?:/{2,}[!<]*|/\*+|\*+/|\*)?[ \t]?|\*/[ \t]*$", re.MULTILINE)
_BOILERPLATE = re.compile(
    r"copyright|spdx|licen[sc]e|@generated|clang-format|NOLINT", re.IGNORECASE
)


def docstrings() -> list[str]:
    """Return the docstrings of Python's standard library, one document per file."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        folders = set(path.relative_to(root).parts)
        if folders & {"site-packages", "dist-packages", "test", "tests", "idle_test"}:
            continue
        document = "\n\n".join(_docstrings_of(path))
        if len(document) > 100:
            documents.append(document)
    if not documents:
        raise UserError(f"Python's standard library has no source files in {root}")
    return documents


def _docstrings_of(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def header_comments() -> tuple[list[str], list[str]]:
    """Return the comments of torch's own C++ headers as (train, held-out) documents, by file."""
    root = Path(torch.__file__).parent / "include"
    parts: tuple[list[Path], list[Path]] = ([], [])
    for folder in ("ATen", "c10", "torch"):
        for path in sorted((root / folder).rglob("*.h")):
            name = path.relative_to(root)
            if "ops" not in name.parts:  # ATen/ops is generated, one signature after the other
                parts[zlib.crc32(name.as_posix().encode()) % 10 == 0].append(path)
    seen: set[str] = set()
    train, held_out = (_comment_documents(paths, seen) for paths in parts)
    if not train or not held_out:
        raise UserError(f"torch was installed without its C++ headers, looked in {root}")
    return train, held_out


def _comment_documents(paths: list[Path], seen: set[str]) -> list[str]:
    documents = []
    for path in paths:
        comments = [c for c in _comments_of(path) if c not in seen]
        seen.update(comments)
        if comments:
            documents.append("\n\n".join(dict.fromkeys(comments)))
    return documents


def _comments_of(path: Path) -> Iterator[str]:
    for match in _COMMENT.finditer(path.read_text(encoding="utf-8", errors="replace")):
        raw = match["lines"] or match["block"]
        if not raw or _BOILERPLATE.search(raw):
            continue
        text = _MARKERS.sub("", raw).strip()
        is_prose = len(text.split()) >= 6 and sum(map(str.isalpha, text)) > 0.6 * len(text)
        if is_prose:
            yield text


def text_file(path: Path) -> tuple[list[str], list[str]]:
    """Return a text file as (train, held-out): the last tenth is held out."""
    if not path.is_file():
        raise UserError(f"--data must name a text file; got {str(path)!r}, which is not a file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise UserError(f"--data must be UTF-8 text; got {str(path)!r} ({error.reason})") from None
    except OSError as error:
        raise UserError(f"--data cannot be read; got {str(path)!r} ({error.strerror})") from None
    if not text.strip():
        raise UserError(f"--data must hold text; got {str(path)!r}, which is empty")
    cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
    return [text[:cut]], [text[cut:]]


def blocks(documents: list[str], tokenizer, seq_len: int) -> torch.Tensor:
    """Return the documents as int64 [count, seq_len], an end token after each, the rest dropped."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(
            f"the text must give at least one block of --seq-len {seq_len} tokens in its training "
            f"and its held-out part; got {len(tokens)} tokens"
        )
    return torch.tensor(tokens[: count * seq_len]).view(count, seq_len)


def batches(data: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [batch_size, seq_len] without end, in an order that `seed` alone decides."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(len(data), generator=generator)])
        yield data[waiting[:batch_size]]
        waiting = waiting[batch_size:]
