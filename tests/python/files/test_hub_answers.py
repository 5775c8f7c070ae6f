"""What becomes of a name where the Hub refuses, fails, is silent, or answers."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hub_samples import (
    BASE,
    DROPPED,
    FIRST,
    NAME,
    SECOND,
    Handler,
    empty_cache,
    lay,
    refusal,
    serving,
    write_adapter,
    write_base,
)
from models import tiny_llama

from reslora import load
from reslora.commands.cli import main
from reslora.files import hub
from reslora.files.base_files import model_config
from reslora.files.model_folder import merge_folder

TOKEN = "`hf auth login`, or set HF_TOKEN"
FORBIDDEN = (
    "access is refused, or there is no such model: check the spelling of the name; what is private "
    f"needs a token: {TOKEN})"
)
UNREACHED = "it is not, or not whole, in the cache, and the Hub cannot be reached: "


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return empty_cache(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "RepoNotFound", FORBIDDEN),
        (401, "RepoNotFound", FORBIDDEN),
        (401, "", FORBIDDEN),
        (403, "", FORBIDDEN),
        (403, "GatedRepo", f"access is refused: ask for it on its page, then {TOKEN})"),
        (404, "RevisionNotFound", "there is no such revision)"),
        (503, "", UNREACHED),
        (DROPPED, "", UNREACHED),
    ],
)
def test_a_refusing_hub_is_asked_once_and_its_reason_told(
    cache, tmp_path, monkeypatch, status, code, reason
):
    with serving(monkeypatch, status=status, code=code) as server:
        text = refusal(revision="v2")
        assert text.startswith(f" at revision 'v2' ({reason}")
        assert len(server.asked) == 1
        write_adapter(tmp_path / "first", 1)
        lay(cache, NAME, FIRST, tmp_path / "first", ["v2"])
        if code == "RevisionNotFound":  # it was there, and is so no more
            assert refusal(revision="v2") == text
        else:
            load(tiny_llama(), NAME, revision="v2")


def test_a_hub_that_cannot_be_reached_or_does_not_answer_is_not_waited_for(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    with serving(monkeypatch) as server:
        released = threading.Event()
        monkeypatch.setattr(Handler, "do_GET", lambda _: released.wait())
        assert "and the Hub cannot be reached: " in refusal()
        released.set()
        server.shutdown()
        server.socket.close()  # from now on it is refused
        assert "and the Hub cannot be reached: " in refusal()
        write_adapter(tmp_path / "first", 1)
        lay(cache, NAME, FIRST, tmp_path / "first", ["main"])
        load(tiny_llama(), NAME)


@pytest.mark.parametrize("status", [503, 403, DROPPED])
def test_a_whole_cache_is_enough_where_the_hub_answers_but_once(
    cache, tmp_path, monkeypatch, status
):
    write_adapter(tmp_path / "first", 1)
    lay(cache, NAME, FIRST, tmp_path / "first", ["v1"])
    write_base(tmp_path / "base", 1)
    lay(cache, BASE, FIRST, tmp_path / "base", ["main"])
    with serving(monkeypatch, folder=tmp_path / "first", status=status, answers=1) as server:
        load(tiny_llama(), NAME, revision="v1")
        assert server.asked == ["GET /api/models/user/adapter/revision/v1"]
    with serving(monkeypatch, folder=tmp_path / "base", status=status, answers=1) as server:
        merge_folder(BASE, tmp_path / "first", tmp_path / "out")
        assert server.asked == ["GET /api/models/user/base"]


@pytest.mark.parametrize("answers", [1, 2, 3])
@pytest.mark.parametrize("status", [503, 403, DROPPED])
def test_a_hub_that_fails_after_an_answer_leaves_an_older_copy_or_a_sentence(
    cache, tmp_path, monkeypatch, caplog, status, answers
):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the tries of huggingface_hub
    write_adapter(tmp_path / "first", 1)
    older = write_adapter(tmp_path / "second", 2)
    fails = {"folder": tmp_path / "first", "status": status, "answers": answers}
    with serving(monkeypatch, **fails):
        assert refusal().startswith(f" ({FORBIDDEN if status == 403 else UNREACHED}")
    shutil.rmtree(cache, ignore_errors=True)
    lay(cache, NAME, SECOND, tmp_path / "second", ["main"])
    with serving(monkeypatch, **fails):
        got = load(tiny_llama(), NAME).state_dict()
    want = older.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want if "reslora" in key)
    assert (cache / "models--user--adapter/refs/main").read_text() == SECOND  # as before
    warned = [record.message for record in caplog.records if record.name == "reslora"]
    assert [f"commit {SECOND}, which is older: commit {FIRST}" in line for line in warned] == [True]


@pytest.mark.parametrize("status", [503, DROPPED])
def test_a_part_in_the_cache_is_no_adapter(cache, tmp_path, monkeypatch, status):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    write_adapter(tmp_path / "whole", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    lay(cache, NAME, FIRST, tmp_path / "part", ["main"])
    with serving(monkeypatch, folder=tmp_path / "whole", status=status, answers=1):
        assert refusal().startswith(f" ({UNREACHED}")
    with serving(monkeypatch, folder=tmp_path / "whole"):
        load(tiny_llama(), NAME)


@pytest.mark.parametrize("below", [".", "some/where"])
def test_the_files_of_an_adapter_alone_are_fetched_and_kept(cache, tmp_path, monkeypatch, below):
    model = write_adapter(tmp_path / "online" / below, 1)
    others = ("optimizer.pt", "model.safetensors", "README.md", "some/adapter_model.safetensors")
    for name in others:
        (tmp_path / "online" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "online" / name).write_text("something else")
    place = {} if below == "." else {"subfolder": below}
    with serving(monkeypatch, folder=tmp_path / "online") as server:
        got = load(tiny_llama(), NAME, **place).state_dict()
    fetched = {line.rpartition("/resolve/")[2] for line in server.asked if "/resolve/" in line}
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert fetched == {str(Path(FIRST) / below / name) for name in names}
    want = model.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want if "reslora" in key)
    again = load(tiny_llama(), NAME, **place).state_dict()  # the network is gone
    assert all(torch.equal(again[key], want[key]) for key in want if "reslora" in key)


# ---- The config of a base -----------------------------------------------------------------------


@pytest.mark.parametrize("command", [["doctor", "--model"], ["convert", "theirs", "out", "--base"]])
@pytest.mark.parametrize("status", [503, DROPPED])
def test_commands_that_read_the_config_alone_ask_once_and_say_one_sentence(
    cache, tmp_path, monkeypatch, capfd, caplog, command, status
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()  # a checkpoint of the authors' program
    values = {"rank": 1, "lora_alpha": 1, "target_modules": "q", "res_flag": 1, "pre_num": 1}
    (tmp_path / "theirs/reslora_config.json").write_text(json.dumps(values))
    pair = {f"q.loras.0.lora_{name}": torch.ones(1, 1) for name in "AB"}
    torch.save(pair, tmp_path / "theirs/pytorch_model_lora.bin")
    with serving(monkeypatch, status=status) as server:
        code = main([*command, BASE])
        assert len(server.asked) == 1
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"[base] BASE must be a folder or a name of the Hub that can be had; got {BASE} (" in err
    assert UNREACHED in err and not caplog.records


@pytest.mark.parametrize("name", [BASE, "tiny"])
@pytest.mark.parametrize("status", [503, DROPPED])
def test_a_config_in_the_cache_is_taken_without_a_word_where_the_hub_is_silent(
    cache, tmp_path, monkeypatch, capfd, caplog, name, status
):
    write_base(tmp_path / "base", 1)
    lay(cache, name, FIRST, tmp_path / "base", ["main"])
    capfd.readouterr()  # the bar of the writer
    with serving(monkeypatch, status=status) as server:
        code = main(["doctor", "--model", name, "--target", "q_proj"])
        assert len(server.asked) == 1
    out, err = capfd.readouterr()
    assert (code, err) == (0, "") and "q_proj" in out
    assert not caplog.records


def test_of_a_base_the_config_alone_is_fetched(cache, tmp_path, monkeypatch):
    write_base(tmp_path / "base", 1)
    with serving(monkeypatch, folder=tmp_path / "base") as server:
        assert model_config(BASE).hidden_size == tiny_llama().config.hidden_size
    fetched = {line.rpartition("/resolve/")[2] for line in server.asked if "/resolve/" in line}
    assert fetched == {f"{FIRST}/config.json"}
