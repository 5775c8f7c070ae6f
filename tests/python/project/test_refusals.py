"""Every function of the public headers stands in the C++ table of what calls refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
HEADERS = REPOSITORY / "include/reslora"
ROW = r'refuses_\w+\(\s*"([^"]+)"'
# Tables whose rows for one function are made by a function of their own.
OWN_ROWS = r'of_(?:block|view|factors|fits|pair)\(\s*"([\w:]+)"'


def without_comments(text: str) -> str:
    """Return C++ without comments, macros of the preprocessor and bodies of templates' defaults."""
    text = re.sub(r"//[^\n]*|^#[^\n]*", "", text, flags=re.MULTILINE)
    return re.sub(r"\bTORCH_ARG\([^;]*;", "", text)


def end_of(text: str, start: int, brackets: str) -> int:
    """Return where the bracket at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == brackets[0]) - (text[place] == brackets[1])
        if depth == 0:
            return place
    raise AssertionError(f"no {brackets[1]} for {text[start : start + 40]}")


def without_bodies(text: str) -> str:
    """Return declarations alone: each {...} becomes a semicolon."""
    out, place = "", 0
    while (start := text.find("{", place)) >= 0:
        out += text[place:start] + ";"
        place = end_of(text, start, "{}") + 1
    return out + text[place:]


def name_of(declaration: str) -> str | None:
    """Return the function that a declaration declares, None where it declares none."""
    if re.search(r"\b(using|friend|enum|struct|class|typedef)\b", declaration.split("(")[0]):
        return None
    if "= default" in declaration or "= delete" in declaration:
        return None
    plain = re.sub(r"template <.*?>\s*(?=\w)", "", declaration, flags=re.DOTALL)
    match = re.search(r"(operator\s*[=!<>+]+|~?\w+)\s*\(", plain)
    return re.sub(r"\s", "", match[1]) if match and not match[1].startswith("~") else None


def functions_of_class(name: str, body: str) -> Iterator[str]:
    """Yield `Class::function` for what is public of a class."""
    public = re.split(r"\b(?:private|protected):", body)[0].split("public:", 1)[-1]
    for declaration in without_bodies(public).split(";"):
        if (function := name_of(declaration)) is not None:
            yield f"{name}::{function}"


def functions_of(header: str) -> set[str]:
    """Return every function that a public header declares."""
    text, found = without_comments(header), set()
    for match in re.finditer(r"class RESLORA_API (\w+)[^;{]*\{", text):
        end = end_of(text, match.end() - 1, "{}")
        found |= set(functions_of_class(match[1], text[match.end() : end]))
    free = re.sub(r"(class|struct|enum class) (?:RESLORA_API )?\w+[^;{()]*\{", "@{", text)
    while (start := free.find("@{")) >= 0:
        free = free[:start] + free[end_of(free, start + 1, "{}") + 1 :]
    free = re.sub(r"namespace [\w:]+ \{", "", free)
    for declaration in without_bodies(free).split(";"):
        if "RESLORA_API" in declaration or "inline" in declaration:
            function = name_of(declaration.replace("RESLORA_API", ""))
            found |= {function} if function else set()
    return found


def rows_of(table: str) -> set[str]:
    """Return the functions that have a row in a file of the table."""
    rows = set(re.findall(ROW, table)) | set(re.findall(OWN_ROWS, table))
    for names in re.findall(r"refuse_nothing\(\s*\{(.*?)\}\)", table, flags=re.DOTALL):
        rows |= set(re.findall(r'"([^"]+)"', names))
    return rows


def all_rows() -> set[str]:
    tables = (REPOSITORY / "tests/cpp").rglob("refusals_test.cpp")
    return set().union(*(rows_of(path.read_text(encoding="utf-8")) for path in tables))


def test_functions_are_found_in_headers() -> None:
    header = """
    /// f(x) is no function.
    RESLORA_API at::Tensor first(const at::Tensor& x,
                                 int64_t n = 0);
    class RESLORA_API Box {
     public:
      explicit Box(int64_t size);
      Box(Box&&) = default;
      ~Box();
      int64_t size() const { return size_; }
      template <typename T, std::enable_if_t<true, bool> = true>
      void add(T&& item) const;
     private:
      void hidden();
    };
    struct Plain { int64_t value = size_of(3); };
    inline bool operator==(const Plain& a, const Plain& b) { return same(a, b); }
    using Call = std::function<void(int64_t)>;
    """
    wanted = {"first", "Box::Box", "Box::size", "Box::add", "operator=="}
    assert functions_of(header) == wanted


def test_every_public_function_has_a_row() -> None:
    declared = {
        function
        for path in sorted(HEADERS.glob("*.h"))
        for function in functions_of(path.read_text(encoding="utf-8"))
    }
    assert len(declared) > 150
    assert sorted(declared - all_rows()) == []


def test_every_row_is_of_a_public_function() -> None:
    declared = {
        function
        for path in HEADERS.glob("*.h")
        for function in functions_of(path.read_text(encoding="utf-8"))
    }
    assert sorted(all_rows() - declared) == []
