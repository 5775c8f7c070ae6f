"""Every rule stands once: no sentence in both languages, and a page that says where it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
# Each language has its own arguments of the op and its own state of a model to look at.
OF_EACH_LANGUAGE = {
    "adapters must be enabled",
    "adapters must be merged",
    "adapters must not be merged yet",
    "pass either weight or base_out",
    "strict_links demands every link",
}
QUOTED = r'"(?:[^"\\\n]|\\.)*"'


def rule_of(sentence: str) -> str:
    """Return what comes before what was got, without who says it and the values in it."""
    text = re.sub(r"^\[[^\]]*\] ", "", sentence).split("; got")[0]
    return re.sub(r"\{[^}]*\}|\[\{\}\]", "{}", text).replace("'", "").strip()


def is_rule(sentence: str) -> bool:
    return bool(re.match(r"\[[a-z_.{}A-Z]+\] \S+ \S+ \S+ \S", sentence))


def rules_of_cpp() -> dict[str, str]:
    """Return the file of every sentence in the library and its bindings."""
    found = {}
    for folder in ("src", "python/csrc"):
        for path in sorted((REPOSITORY / folder).rglob("*.*")):
            if path.suffix not in (".cpp", ".h"):
                continue
            text = path.read_text(encoding="utf-8")
            for match in re.finditer(rf"{QUOTED}(?:\s*{QUOTED})*", text):
                sentence = "".join(part[1:-1] for part in re.findall(QUOTED, match[0]))
                if is_rule(sentence):
                    found[rule_of(sentence)] = path.name
    return found


def rules_of_python() -> dict[str, str]:
    """Return the file of every sentence in the package."""
    found = {}
    for path in sorted((REPOSITORY / "python/reslora").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            sentence = ""
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                sentence = "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                sentence = node.value
            if is_rule(sentence):
                found[rule_of(sentence)] = path.name
    return found


def test_no_sentence_stands_in_both_languages():
    cpp, python = rules_of_cpp(), rules_of_python()
    assert len(cpp) > 100 and len(python) > 100
    both = {rule: (cpp[rule], python[rule]) for rule in cpp.keys() & python.keys()}
    both.pop("{} must {}")  # the kinds that the library says options must be of
    assert both.keys() == OF_EACH_LANGUAGE, both


@pytest.mark.parametrize(
    ("constant", "place"),
    [
        (r"adapter_config\.json", "include/reslora/adapter_folder.h"),
        (r"adapter_model\.safetensors", "include/reslora/adapter_folder.h"),
        (r"adapter_statistics\.safetensors", "include/reslora/adapter_folder.h"),
        (r"base_model\.model\.", "include/reslora/adapter_folder.h"),
        (r"\.reslora_A\.weight", "src/io/factor_names.h"),
        ("RESLORA", "include/reslora/config_json.h"),
        (r"reslora\.chains", "src/io/adapter_io.cpp"),
        (r"reslora\.adapter_sum", "src/io/statistics_io.cpp"),
    ],
)
def test_a_constant_stands_once(constant, place):
    """As a text of its own: sentences and docstrings may name it."""
    found = set()
    for folder in ("src", "include", "python"):
        for path in (REPOSITORY / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h"):
                text = path.read_text(encoding="utf-8")
                if re.search(rf'"{constant}"', re.sub(r"///.*|\"\"\"[\s\S]*?\"\"\"", "", text)):
                    found.add(str(path.relative_to(REPOSITORY)))
    assert found == {place}


def test_the_page_of_rules_names_files_that_are_there():
    page = (REPOSITORY / ".github/ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.split("## Where each rule stands")[1]
    named = re.findall(r"`((?:src|include|python|tests)/[^`]+)`", table)
    assert len(named) > 20
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
