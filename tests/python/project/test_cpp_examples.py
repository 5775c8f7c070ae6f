"""The training programs of examples/cpp on small settings: what they print, write and resume."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_programs import REPOSITORY, build_example, environment, run

from reslora import _C

pytestmark = pytest.mark.timeout(1800)
DATA = REPOSITORY.parent / "shared" / "data"
ROW = re.compile(r"^(lora|lora, 2 alpha|is|bs \d|ms \d|ms all) +(\d\.\d+) +(\d\.\d+) +(\S+)", re.M)
SMALL = ("--steps", "12", "--adapt-steps", "8", "--layers", "2", "--width", "32")


def needs(name: str) -> Path:
    """Return a data set's folder, or skip."""
    if not (DATA / name).exists():
        pytest.skip(f"the data set {name} is absent")
    return DATA / name


def complaint(*command: str | Path) -> str:
    """Run a program that must fail with one sentence on stderr; return it."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def char_transformer() -> Path:
    """The program, built against the installed package."""
    return build_example("char_transformer")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two small texts of our own, as options."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the adapter of a layer reads what the layer before it has read"
    (folder / "one.txt").write_text("\n".join([words] * 400))
    (folder / "two.txt").write_text("\n".join([words.upper()] * 400))
    return ("--text", str(folder / "one.txt"), "--other", str(folder / "two.txt"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what the program wrote for others, by path."""
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}
    return {str(path): content for path, content in sorted(found.items())}


def test_char_transformer_adapts_by_every_method_and_resumes_bit_by_bit(
    char_transformer: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    printed = run(char_transformer, *texts, *SMALL, "--out", straight)
    rows = ROW.findall(printed)
    assert [row[0] for row in rows] == ["lora", "lora, 2 alpha", "is", "bs 2", "ms 2", "ms all"]
    assert all(float(off) < 1e-5 for name, _, _, off in rows if name[:2] in ("lo", "bs"))
    files = files_of(straight)
    assert len(files) == 3 * 6  # adapter, statistics, lora
    lora, _ = _C.load_tensors(str(straight / "is/lora/adapter_model.safetensors"))
    assert "base_model.model.layers.1.down_proj.lora_A.weight" in lora

    stopped = tmp_path / "stopped"
    options = (*texts, *SMALL, "--out", stopped, "--checkpoint-every", "1")
    said = complaint(char_transformer, *options, "--stop-after", "7")
    assert "stopped after step 7 of pretraining, as asked; run again to go on" in said
    run(char_transformer, *options)  # pretraining was taken up
    for name in ("lora", "ms_all"):
        shutil.rmtree(stopped / name)
    said = complaint(char_transformer, *options, "--stop-after", "3")
    assert "stopped after step 3 of lora" in said
    run(char_transformer, *options)
    assert files_of(stopped) == files


def test_char_transformer_says_what_it_lacks(char_transformer: Path, tmp_path: Path) -> None:
    said = complaint(char_transformer, "--data", tmp_path / "none", "--out", tmp_path)
    assert "input.txt cannot be read; name one of your own with --text and --other" in said
    assert "options are name and value:" in complaint(char_transformer, "--nope", "1")
    assert "--steps must be a whole number of at least 0; got ten" in complaint(
        char_transformer, "--data", needs("tinyshakespeare").parent, "--steps", "ten"
    )
    assert "--layers must be a whole number of at least 1; got 0" in complaint(
        char_transformer, "--data", needs("tinyshakespeare").parent, "--layers", "0"
    )
    (tmp_path / "pretrained.pt").write_text("no archive")
    said = complaint(char_transformer, "--data", needs("tinyshakespeare").parent, "--out", tmp_path)
    assert "pretrained.pt cannot be read: it is damaged; remove it" in said
    assert "[--out char_out]" in run(char_transformer, "--help")
    (tmp_path / "short.txt").write_text("short")
    said = complaint(char_transformer, "--text", tmp_path / "short.txt")
    assert "a text must hold" in said


def test_mnist_prints_accuracies_by_shortcut_and_m(tmp_path: Path) -> None:
    program = build_example("mnist")
    assert "is not in" in complaint(program, "--data", tmp_path)
    printed = run(program, "--data", needs("mnist"), "--epochs", "1", "--layers", "4")
    rows = ROW.findall(printed)
    assert len(rows) == 8
    assert all(float(before) > 0.4 for _, before, _, _ in rows)  # five classes: chance is 0.2
    exact = [row for row in rows if row[0][:2] in ("lo", "bs")]
    assert all(abs(float(before) - float(merged)) <= 0.002 for _, before, merged, _ in exact)
