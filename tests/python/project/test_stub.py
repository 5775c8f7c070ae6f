"""The types of the compiled module, `_C.pyi`, say what it holds: names, parameters, defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import reslora
from reslora import _C

STUB = Path(reslora.__file__).with_name("_C.pyi")
Parameters = list[tuple[str, bool]]  # name, whether it has a default


def said(node: ast.FunctionDef) -> Parameters:
    """Return the parameters of a function in the stub."""
    given = node.args
    first = len(given.args) - len(given.defaults)
    own = [(a.arg, i >= first) for i, a in enumerate(given.args)]
    own += [
        (a.arg, d is not None) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return own[1:] if own and own[0][0] == "self" else own


def held(function: object) -> Parameters | None:
    """Return the parameters that pybind11 wrote into a docstring; None where it wrote none."""
    found = re.match(r"\w+\((.*?)\)(?: -> |\n|$)", str(function.__doc__).splitlines()[0] + "\n")
    if found is None:
        return None
    parts, depth, start, text = [], 0, 0, found.group(1)
    for i, letter in enumerate(text + ","):
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    own = [
        (part.split(":")[0].strip(), "=" in part) for part in parts if part not in ("", "*", "/")
    ]
    return own[1:] if own and own[0][0] == "self" else own


def summary(text: str | None) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def documented(value: object) -> str:
    """Return the summary in a compiled docstring, which begins with signatures."""
    text = value.__doc__ or ""
    first, _, rest = text.partition("\n")
    return summary(rest if re.match(r"\w+\(.*\)", first) else text)


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def differences(where: str, body: list[ast.stmt], holder: object) -> list[str]:
    """Return what a module or class of the stub says otherwise than the compiled one."""
    found = []
    nodes = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    values = {
        n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    compiled = public(list(vars(holder)))
    found += [f"{where}{name} is not in the stub" for name in compiled - set(nodes) - values]
    found += [f"{where}{name} is in the stub alone" for name in values - compiled]
    found += [f"{where}{name} is in the stub alone" for name in public(list(nodes)) - compiled]
    for name, node in nodes.items():
        value = getattr(holder, name, None)
        own_text, stub_text = documented(value), summary(ast.get_docstring(node))
        if not stub_text.startswith(own_text.rstrip(".")):  # the stub may say more
            found.append(f"{where}{name} is {own_text!r}; the stub says {stub_text!r}")
        if isinstance(node, ast.ClassDef):
            found += differences(f"{where}{name}.", node.body, value)
        elif not node.decorator_list and (own := held(value)) is not None and own != said(node):
            found.append(f"{where}{name} takes {own}; the stub says {said(node)}")
        if ast.get_docstring(node) is None and not node.decorator_list and public([name]):
            found.append(f"{where}{name} has no docstring in the stub")
    return found


def test_the_stub_says_what_the_compiled_module_holds():
    assert differences("", ast.parse(STUB.read_text(encoding="utf-8")).body, _C) == []
