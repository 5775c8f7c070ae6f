"""How the command ends where not all goes well: output, Ctrl-C, and installations not whole."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from cli_samples import make, run, write_tokenizer

import reslora
from reslora import _build_info, _loading

INTERRUPTED = "interrupted; nothing was left half-written"


def shell(command, cwd):
    """Run a shell's command in which `reslora` stands for the program."""
    own = f"'{sys.executable}' -m reslora"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("reslora", own)],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


# ---- Output


@pytest.mark.parametrize(
    "command", ["inspect a.json --json", "inspect a.json", "--version", "merge --help", ""]
)
def test_output_that_cannot_be_written_is_an_error(tmp_path, command):
    (tmp_path / "a.json").write_text("{}")
    done = shell(f"reslora {command} >/dev/full", tmp_path)
    sentence = "reslora: stdout must be a place to write; got No space left on device\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_an_error_for_which_there_is_no_stdout_goes_to_stderr(tmp_path):
    done = shell("reslora inspect a.json --json >/dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("reslora: [inspect] PATH must exist; got a.json\n")


@pytest.mark.parametrize("command", ["--version", "inspect a.json", "inspect none --json"])
def test_a_closed_stdout_is_an_error(tmp_path, command):
    (tmp_path / "a.json").write_text("{}")
    done = shell(f"reslora {command} >&-", tmp_path)
    sentence, _, rest = done.stderr.partition("\n")
    assert done.returncode == 1
    assert sentence == "reslora: stdout must be a place to write; got a closed one"
    assert rest == ("reslora: [inspect] PATH must exist; got none\n" if "none" in command else "")


def test_what_matplotlib_logs_does_not_stand_between_our_lines(tmp_path):
    (tmp_path / "matplotlib.py").write_text(
        "import logging\nlogging.getLogger('matplotlib').warning('no home')\nraise ImportError"
    )
    done = draw_losses(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "reslora: plots need matplotlib: pip install matplotlib\n"


def draw_losses(folder):
    """Run `plot losses` where modules in `folder` stand for those that are installed."""
    (folder / "state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    return subprocess.run(
        [sys.executable, "-m", "reslora", "plot", "losses", "state.json", "out.png"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "reslora", "--version"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "a.json").write_text("{}")
    done = shell("reslora inspect a.json --json | head -1", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


# ---- Ctrl-C


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_an_interrupted_merge_is_one_line(tmp_path, option):
    make(tmp_path)
    os.mkfifo(tmp_path / "text")
    (tmp_path / "out").mkdir()
    command = ["merge", "base", "adapter", "out", "--verify", "text", *option]
    assert_interrupted(tmp_path, command, bool(option), tmp_path / "text")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "out", "text"}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_an_interrupted_start_is_one_line(tmp_path, option):
    (tmp_path / "torch.py").write_text("open('gate').read()")  # what takes long to import
    os.mkfifo(tmp_path / "gate")
    assert_interrupted(tmp_path, ["merge", *option], bool(option), tmp_path / "gate")


SITE = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == MODULE:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


def interrupted_at(module, command, folder):
    """Run a shell's command in which Ctrl-C comes when a module is about to be imported."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(f"MODULE = {module!r}{SITE}")
    return shell(f"export PYTHONPATH='{folder}/site'; {command}", folder)


@pytest.mark.parametrize("option", ["", "--json"])
def test_an_interrupted_import_of_a_library_is_not_swallowed(tmp_path, option):
    pytest.importorskip("numpy", reason="numpy is not installed")
    (tmp_path / "a.json").write_text("{}")
    done = interrupted_at("numpy.linalg", f"reslora inspect a.json {option}", tmp_path)
    assert done.returncode == 130
    if option:
        assert (json.loads(done.stdout), done.stderr) == ({"error": INTERRUPTED}, "")
    else:
        assert (done.stdout, done.stderr) == ("", f"reslora: {INTERRUPTED}\n")


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    pytest.importorskip("numpy", reason="numpy is not installed")
    done = interrupted_at("numpy.linalg", "trap '' INT; reslora --version", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_swallows_an_interrupt_does_not_keep_the_command_alive(tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    pass\n"
    )
    (tmp_path / "matplotlib/figure.py").write_text("Figure = None\nopen('loaded', 'w')\n")
    done = draw_losses(tmp_path)
    assert (tmp_path / "loaded").exists()  # the whole import goes on
    assert (done.returncode, done.stderr) == (130, f"reslora: {INTERRUPTED}\n")


def test_a_merge_tells_that_only_verifying_was_interrupted(tmp_path):
    make(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text("a b c")
    command = "reslora merge base adapter out --verify text"
    done = interrupted_at("transformers.models.llama.modeling_llama", command, tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "reslora: out is complete; only --verify was interrupted\n"
    assert (tmp_path / "out/model.safetensors").exists()


def assert_interrupted(folder, arguments, is_json, gate):
    """Run the program until it reads `gate`, a pipe that nobody fills, and interrupt it there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "reslora", *arguments], cwd=folder, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with gate.open("w"):  # waits for the reader
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    if is_json:
        assert (json.loads(out), err) == ({"error": INTERRUPTED}, "")
    else:
        assert (out, err) == ("", f"reslora: {INTERRUPTED}\n")


# ---- Files of an installation


class BuildInfo:
    """Finds `reslora._build_info` in a file."""

    def __init__(self, file):
        self.file = file

    def find_spec(self, name, *_):
        wanted = name == "reslora._build_info"
        return importlib.util.spec_from_file_location(name, self.file) if wanted else None


WHOLE = [f"{name} = {getattr(_build_info, name)!r}" for name in _loading.BUILD_VALUES]


def error_of_zeros() -> str:
    """Return what Python calls it where source code holds a zero: that has changed in 3.11."""
    try:
        compile("\0", "zeros", "exec")
    except (SyntaxError, ValueError) as error:
        return type(error).__name__
    raise AssertionError("zeros are no source code")


DAMAGES = [
    ("", "holds no VERSION"),
    ("VERSION = ", "cannot be read (SyntaxError)"),
    ("\0" * 9, f"cannot be read ({error_of_zeros()})"),
    ("print(VERSION)", "cannot be read (NameError)"),
    ("\n".join(WHOLE[:-1]), "holds no TORCH_MINOR"),
    ("\n".join([*WHOLE, "TORCH_CUDA = 13.2"]), "holds no TORCH_CUDA"),
]


@pytest.mark.parametrize("command", [None, ["reslora"], ["reslora", "doctor", "--json"]])
@pytest.mark.parametrize(("content", "words"), DAMAGES)
def test_a_damaged_installation_says_so(tmp_path, monkeypatch, capsys, content, words, command):
    (tmp_path / "_build_info.py").write_text(content)
    monkeypatch.setattr(reslora, "_build_info", _build_info)  # what the import below replaces
    monkeypatch.delitem(sys.modules, "reslora._build_info")
    monkeypatch.setattr(sys, "meta_path", [BuildInfo(tmp_path / "_build_info.py"), *sys.meta_path])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' own Ctrl-C stays
    sentence = (
        f"the installation of reslora is damaged, since its file _build_info.py {words}: in its "
        "repository, build reslora again with `pip install --no-build-isolation .`"
    )
    if command is None:
        with pytest.raises(ImportError) as refused:
            _loading.load()
        assert str(refused.value) == sentence
        return
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", *command])
    with pytest.raises(SystemExit) as ended:
        _loading.load()
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    if "--json" in command:
        assert (json.loads(out), err) == ({"error": sentence}, "")
    else:
        assert (out, err) == ("", f"reslora: {sentence}\n")


# ---- Configs that transformers reads


DAMAGED_CONFIGS = [
    (b"[" * 100_000, "nested at most 100 deep"),
    (b"9" * 5000, "numbers of at most 4,300 digits"),
    (b"\xff", "must be UTF-8"),
    (b'{"model_type": "none"}', "BASE must have a config.json"),
]


@pytest.mark.parametrize("command", [["doctor", "--model", "base"], ["merge", "--verify", "text"]])
def test_a_damaged_config_of_a_base_is_one_sentence(tmp_path, monkeypatch, capsys, command):
    make(tmp_path)
    write_tokenizer(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a b c")
    arguments = [*command, "base", "adapter", "out"] if command[0] == "merge" else command
    for content, words in DAMAGED_CONFIGS:
        (tmp_path / "base/config.json").write_bytes(content)
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert err.startswith("reslora: [base] ") and words in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()
