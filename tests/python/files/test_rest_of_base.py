"""What is copied from a base beside its weights: files, and nothing from behind a folder link."""

import json
import os

import pytest

from reslora.files.folder_writer import copy_rest, size_of_rest


def test_links_to_files_are_copied_and_links_to_folders_are_not(tmp_path):
    base, secret, out = tmp_path / "base", tmp_path / "secret", tmp_path / "out"
    for folder in (base / "deep/er", base / ".cache", secret, out):
        folder.mkdir(parents=True)
    (secret / "key").write_text("secret")
    (tmp_path / "blob").write_text("a tokenizer")
    (base / "tokenizer.json").symlink_to(tmp_path / "blob")  # as in a cache of the Hub
    (base / "deep/er/notes.txt").write_text("12345")
    (base / "deep/model.safetensors").write_text("weights")
    (base / ".cache/hidden").write_text("hidden")
    (base / "config.json").write_text(json.dumps({"dtype": "float32"}))
    (base / "assets").symlink_to(secret, target_is_directory=True)
    (base / "deep/more").symlink_to(secret, target_is_directory=True)
    (base / "zero").symlink_to("/dev/zero")
    (base / "gone").symlink_to("nowhere")
    os.mkfifo(base / "pipe")
    with pytest.warns(UserWarning, match=r"not copied from BASE; got .* \(5\)"):
        copy_rest(base, out, "bfloat16")
    found = {os.fspath(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"tokenizer.json", "deep/er/notes.txt", "config.json"}
    assert (out / "tokenizer.json").read_text() == "a tokenizer"
    assert not (out / "tokenizer.json").is_symlink()
    assert json.loads((out / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert size_of_rest(base) == len("a tokenizer") + 5 + len('{"dtype": "float32"}')
