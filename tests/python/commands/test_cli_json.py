"""With --json stdout holds one JSON document, whatever happens; errors are {"error": sentence}."""

import json
import subprocess
import sys

import pytest
from cli_samples import LETTERS, make, merge_in, run, write_tokenizer

import reslora.commands.inspect
from reslora.commands.cli import main


def error_of(out):
    """The sentence of a document that holds an error alone."""
    values = json.loads(out)
    assert list(values) == ["error"] and values["error"].count("\n") == 0
    return values["error"]


WRONG = [
    ["melt"],
    ["merge"],
    ["merge", "base", "adapter"],
    ["merge", "base", "adapter", "out", "--method", "best"],
    ["merge", "base", "adapter", "out", "--shard-size", "many"],
    ["export-lora", "adapter", "out", "--rank", "4", "--exact"],
    ["export-lora", "adapter", "out", "--fast"],
    ["inspect"],
    ["check-export", "a", "b"],
    ["plot", "everything", "a", "b.png"],
    ["convert", "a", "b"],
    ["doctor", "--pre-num"],
]


@pytest.mark.parametrize("arguments", WRONG)
def test_arguments_that_cannot_be_understood_are_a_document(capsys, arguments):
    said = run(capsys, *arguments)[2].splitlines()[-1].partition(": error: ")[2]
    for given in (["--json", *arguments], [*arguments, "--json"]):
        code, out, err = run(capsys, *given)
        assert (code, err) == (2, "") and error_of(out) == said and said


def test_a_value_for_json_is_refused_in_a_document(capsys):
    code, out, err = run(capsys, "inspect", "x", "--json=1")
    assert (code, err) == (2, "") and "--json" in error_of(out)


def test_without_a_command_the_help_is_a_document(capsys):
    text = run(capsys)[1]
    code, out, err = run(capsys, "--json")
    assert (code, err) == (0, "") and json.loads(out) == {"help": text.rstrip("\n")}


def test_json_after_two_dashes_is_no_option(capsys):
    code, out, err = run(capsys, "inspect", "--", "--json")
    assert (code, out) == (1, "") and "got --json" in err


@pytest.mark.parametrize(
    ("option", "key", "text"),
    [
        ("--version", "version", "reslora {}"),
        ("--cmake-prefix", "cmake_prefix", "{}"),
        ("--help", "help", "{}"),
    ],
)
def test_what_the_program_says_of_itself_is_a_document(capsys, option, key, text):
    code, out, err = run(capsys, option)
    assert (code, err) == (0, "")
    for given in (["--json", option], [option, "--json"]):
        code, document, err = run(capsys, *given)
        assert (code, err) == (0, "") and list(json.loads(document)) == [key]
        assert text.format(json.loads(document)[key]) + "\n" == out


FAILING = [
    ["merge", "none", "none", "out"],
    ["export-lora", "none", "out"],
    ["inspect", "none"],
    ["check-export", "none"],
    ["plot", "losses", "none", "out.png"],
    ["convert", "none", "out", "--base", "none"],
    ["doctor", "--pre-num", "-7"],
]


@pytest.mark.parametrize("arguments", FAILING, ids=lambda a: a[0])
def test_errors_of_every_command_are_documents(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    for given in (["--json", *arguments], [*arguments, "--json"]):
        code, out, nothing = run(capsys, *given)
        assert (code, nothing) == (1, "")
        assert f"reslora: {error_of(out)}\n" == err
    assert list(tmp_path.iterdir()) == []


def inspect_by(monkeypatch, replacement):
    monkeypatch.setattr(reslora.commands.inspect, "inspect", replacement)


def test_an_interruption_is_a_document(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    inspect_by(monkeypatch, interrupted)
    code, out, err = run(capsys, "inspect", "x", "--json")
    assert (code, err) == (130, "") and "interrupted" in error_of(out)


def test_a_mistake_of_ours_is_a_document_beside_its_traceback(monkeypatch, capsys):
    inspect_by(monkeypatch, lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        main(["inspect", "x", "--json"])
    assert error_of(capsys.readouterr().out) == "KeyError: 'missing'"


def test_what_others_print_goes_to_stderr(tmp_path, monkeypatch, capsys):
    make(tmp_path)
    own = reslora.commands.inspect.inspect
    inspect_by(monkeypatch, lambda path, **_: print("by the way") or own(path))
    code, out, err = run(capsys, "inspect", tmp_path / "adapter", "--json")
    assert code == 0 and json.loads(out)["kind"] == "ResLoRA adapter" and err == "by the way\n"


def test_warnings_are_in_the_document_and_on_stderr(tmp_path, capsys):
    make(tmp_path, statistics=False)
    code, out, err = merge_in(capsys, tmp_path, "--json")
    (sentence,) = json.loads(out)["warnings"]
    assert code == 0 and err == f"reslora: warning: {sentence}\n" and "'weight'" in sentence
    code, out, err = merge_in(capsys, tmp_path, "--json", "--method", "weight", out="chosen")
    assert (code, err) == (0, "") and "warnings" not in json.loads(out)


def test_what_our_logger_says_is_a_warning_too(tmp_path, capsys):
    make(tmp_path, res_mode="bs", pre_num=-1, r=3)
    arguments = ["export-lora", tmp_path / "adapter", tmp_path / "lora", "--rank", 1]
    code, out, err = run(capsys, *arguments, "--json")
    (sentence,) = json.loads(out)["warnings"]
    assert code == 0 and err == f"reslora: warning: {sentence}\n" and "is too small" in sentence


def test_every_command_prints_one_document(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text(" ".join(LETTERS * 2))
    expected = {
        ("merge", "base", "adapter", "out", "--verify", "text"): "verify",
        ("export-lora", "adapter", "lora"): "rank",
        ("inspect", "lora"): "kind",
        ("plot", "norms", "adapter", "norms.png"): "output",
        ("doctor", "--model", "base", "--target", "q_proj"): "links",
    }
    for arguments, key in expected.items():
        code, out, _ = run(capsys, *arguments, "--json")
        assert code == 0 and json.loads(out)[key]
    code, out, _ = run(capsys, "check-export", "adapter", "--json")
    assert code == 1 and len(json.loads(out)) == 4


def test_warnings_that_nobody_takes_are_no_error(tmp_path):
    make(tmp_path, statistics=False)
    for number, redirection in enumerate(("2>&-", "2>/dev/full")):
        command = f"exec '{sys.executable}' -m reslora merge base adapter {number} --json"
        done = subprocess.run(
            ["sh", "-c", f"{command} {redirection}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["output"] == str(number)
