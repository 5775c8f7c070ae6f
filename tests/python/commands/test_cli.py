"""The command reslora: what it prints, its exit codes, and one line for every error."""

import argparse
import copy
import fcntl
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch
from cli_samples import LETTERS, assert_merged, lora_of, make, merge_in, run, write_tokenizer
from models import adapted, tiny_bert, tiny_gpt2, tiny_llama
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from reslora import export_diffusers, export_lora, merge_and_unload
from reslora.commands import verify
from reslora.commands.options import parse_size
from reslora.files import folder_writer, model_folder

# ---- merge


def test_merging_prints_a_sentence(tmp_path, capsys):
    model = make(tmp_path)
    code, out, err = merge_in(capsys, tmp_path)
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert out.startswith(f"{tmp_path / 'out'}: 6 layers merged (2 by exact, 4 by projected), ")
    assert_merged(tmp_path / "out", model)


def test_merging_by_weights_unasked_warns(tmp_path, capsys):
    model = make(tmp_path, statistics=False)
    code, _, err = merge_in(capsys, tmp_path)
    assert code == 0 and err.count("\n") == 1
    assert "reslora: warning: no statistics" in err and "'weight'" in err
    assert_merged(tmp_path / "out", model, "weight")
    assert merge_in(capsys, tmp_path, "--method", "weight", out="chosen")[::2] == (0, "")


def test_merging_tells_rules_and_bytes_as_json(tmp_path, capsys):
    make(tmp_path)
    code, out, _ = merge_in(capsys, tmp_path, "--json", "--method", "factored")
    values = json.loads(out)
    assert code == 0 and values["output"] == str(tmp_path / "out")
    assert values["rules"]["model.layers.1.self_attn.v_proj"] == "factored"
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").values()
    assert values["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert values["fell_back_to_weight"] is False and values["replaced"] == []


def test_an_interrupted_merge_can_be_run_again(tmp_path, monkeypatch, capsys):
    model = make(tmp_path)
    seen = []

    class Bar(nullcontext):
        n = 0

        def __enter__(self):
            return self

        def update(self, count):
            seen.append(count)  # how often it is called depends on the threads
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_writer, "bar", lambda *_, **__: Bar())
        code, _, err = merge_in(capsys, tmp_path)
    assert code == 130 and "interrupted" in err and err.count("\n") == 1 and len(seen) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
    assert merge_in(capsys, tmp_path)[0] == 0
    assert_merged(tmp_path / "out", model)


def test_an_interruption_leaves_the_folder_that_was_there(tmp_path, monkeypatch, capsys):
    make(tmp_path)
    (tmp_path / "out").mkdir(mode=0o700)

    def interrupted(*_):
        raise KeyboardInterrupt

    for place, name in ((model_folder, "copy_rest"), (model_folder.Layout, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            code, out, err = merge_in(capsys, tmp_path)
        assert (code, out, err) == (
            130,
            "",
            "reslora: interrupted; nothing was left half-written\n",
        )
        assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "out"}
        assert list((tmp_path / "out").iterdir()) == []
    assert merge_in(capsys, tmp_path)[0] == 0


def test_two_merges_to_one_place_are_refused(tmp_path, capsys):
    make(tmp_path)
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    (folder / "theirs").write_text("half")
    (folder / ".writer").touch()
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = merge_in(capsys, tmp_path)
        assert code == 1 and "at a time" in err and err.count("\n") == 1
        assert (folder / "theirs").read_text() == "half" and not (tmp_path / "out").exists()
    finally:
        os.close(lock)
    assert merge_in(capsys, tmp_path)[0] == 0


def test_a_folder_of_somebody_else_is_not_taken_for_leftovers(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished/notes").write_text("mine")
    code, _, err = merge_in(capsys, tmp_path)
    assert code == 1 and "must be free for what is not finished" in err
    assert (tmp_path / ".out.unfinished/notes").read_text() == "mine"


# ---- merge --verify


@torch.no_grad()
def expected(models, ids):
    """Losses of base, unmerged and merged model, KL and agreement, by definition."""
    base, unmerged, merged = (model(ids[None]).logits[0].double() for model in models)
    losses = [float(cross_entropy(x[:-1], ids[1:])) for x in (base, unmerged, merged)]
    logs = [log_softmax(x, -1) for x in (merged, unmerged)]
    kl = float(kl_div(*logs, log_target=True, reduction="sum")) / len(ids)
    return *losses, kl, float((unmerged.argmax(-1) == merged.argmax(-1)).double().mean())


def test_a_merge_is_verified_on_text(tmp_path, capsys):
    base = tiny_llama(initializer_range=0.5)
    model = make(tmp_path, copy.deepcopy(base))
    write_tokenizer(tmp_path / "base")
    ids = torch.randint(3, 29, (50,))
    (tmp_path / "text").write_text(" ".join(LETTERS[i - 3] for i in ids))
    code, out, _ = merge_in(capsys, tmp_path, "--json", "--verify", tmp_path / "text")
    got = json.loads(out)["verify"]
    merged = merge_and_unload(copy.deepcopy(model))
    assert code == 0 and got.pop("tokens") == 50
    names = ["loss_base", "loss_unmerged", "loss_merged", "kl", "top1_agreement"]
    want = dict(zip(names, expected([base, model, merged], ids), strict=True))
    assert got == pytest.approx(want, rel=1e-4) and got["kl"] > 1e-6
    assert got["loss_base"] != pytest.approx(got["loss_merged"], rel=1e-3)


def test_verifying_prints_a_sentence(tmp_path, capsys):
    make(tmp_path, res_mode="none")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text(" ".join(LETTERS * 2))
    code, out, _ = merge_in(capsys, tmp_path, "--verify", tmp_path / "text")
    assert code == 0 and out.count("\n") == 2
    assert "on 52 tokens" in out and "same prediction for 100.00 %" in out


def test_text_of_one_token_is_refused_before_merging(tmp_path, capsys):
    make(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text("a")
    code, _, err = merge_in(capsys, tmp_path, "--verify", tmp_path / "text")
    assert code == 1 and "at least 2 tokens; got 1" in err
    assert not (tmp_path / "out").exists()


UNREADABLE = {
    "missing": (lambda path: None, "No such file or directory"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe"), "must be UTF-8 text"),
    "empty": (lambda path: path.write_text(" \n"), "which is empty"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_the_text_is_read_before_the_base_is_asked_for(tmp_path, monkeypatch, capsys, case):
    prepare, words = UNREADABLE[case]
    prepare(tmp_path / "text")
    monkeypatch.setattr(verify, "base_folder", lambda *_: pytest.fail("BASE was asked for"))
    arguments = ["some/base", tmp_path / "adapter", tmp_path / "out", "--verify", tmp_path / "text"]
    code, out, err = run(capsys, "merge", *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "[verify] FILE" in err and f"{tmp_path / 'text'}" in err and words in err


def test_a_text_that_is_missing_is_told_before_anything_slow_is_imported(tmp_path):
    lines = (
        "import sys",
        "from reslora.commands.cli import main",
        "code = main(['merge', 'some/base', 'adapter', 'out', '--verify', 'none'])",
        "print(code, *sorted({'transformers', 'huggingface_hub'} & set(sys.modules)))",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and "[verify] FILE must be one to read; got none" in done.stderr


@pytest.mark.parametrize("words", ["must be a causal language model; got vit", "have a tokenizer"])
def test_a_base_that_cannot_be_verified_is_refused_before_merging(tmp_path, capsys, words):
    make(tmp_path)
    if "vit" in words:
        (tmp_path / "base" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "text").write_text("a b c")
    code, _, err = merge_in(capsys, tmp_path, "--verify", tmp_path / "text")
    assert code == 1 and words in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "was interrupted"),
        (ValueError("[verify] losses must be finite"), 1, "failed: [verify] losses must be finite"),
    ],
)
def test_a_merge_that_cannot_be_verified_is_complete(
    tmp_path, monkeypatch, capsys, error, code, words
):
    def fail(*_):
        raise error

    model = make(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text("a b c")
    monkeypatch.setattr(verify, "verify_folder", fail)
    sentence = f"reslora: {tmp_path / 'out'} is complete; only --verify {words}\n"
    assert merge_in(capsys, tmp_path, "--verify", tmp_path / "text") == (code, "", sentence)
    assert_merged(tmp_path / "out", model)


# ---- export-lora


@pytest.mark.parametrize(
    ("options", "fits", "method"),
    [
        ({"res_mode": "bs"}, False, None),
        ({"res_mode": "is"}, False, None),
        ({"res_mode": "is"}, True, None),
        ({"res_mode": "ms", "pre_num": 2}, True, "lsq"),
        ({"res_mode": "ms", "pre_num": -1, "rank_pattern": {"v_proj": 4}}, False, "input"),
        ({"res_mode": "ms"}, False, "factored"),
    ],
)
def test_files_export_as_the_model_does(tmp_path, capsys, options, fits, method):
    model = make(tmp_path, fits=fits, **options)
    given = ["--method", method] if method else []
    out = tmp_path / "lora"
    code, text, err = run(capsys, "export-lora", tmp_path / "adapter", out, *given)
    assert (code, err) == (0, "")
    export_lora(model, tmp_path / "own", method)
    (got, config), (want, own) = lora_of(out), lora_of(tmp_path / "own")
    assert got.keys() == want.keys() and all(torch.equal(got[k], t) for k, t in want.items())
    same = ("r", "lora_alpha", "fan_in_fan_out", "modules_to_save", "base_model_name_or_path")
    assert {k: config[k] for k in same} == {k: own[k] for k in same}
    assert text == f"{out}: plain LoRA of rank {own['r']}\n"


def test_heads_and_conv1d_are_exported(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    bert = make(tmp_path / "a", tiny_bert(), **options)
    make(tmp_path, tiny_gpt2(), target_modules=["c_attn"])
    assert run(capsys, "export-lora", tmp_path / "a" / "adapter", tmp_path / "lora")[0] == 0
    tensors, config = lora_of(tmp_path / "lora")
    assert torch.equal(tensors["base_model.model.classifier.weight"], bert.classifier.weight)
    assert config["modules_to_save"] == ["classifier"] and config["fan_in_fan_out"] is False
    assert run(capsys, "export-lora", tmp_path / "adapter", tmp_path / "conv")[0] == 0
    assert lora_of(tmp_path / "conv")[1]["fan_in_fan_out"] is True


def test_a_rank_reduces_and_tells_the_error(tmp_path, capsys):
    make(tmp_path, res_mode="bs", pre_num=-1, r=3)
    adapter = tmp_path / "adapter"
    code, out, _ = run(capsys, "export-lora", adapter, tmp_path / "full", "--exact", "--json")
    assert code == 0 and json.loads(out)["rank"] == 9 and json.loads(out)["error"] == 0
    code, out, _ = run(capsys, "export-lora", adapter, tmp_path / "small", "--rank", 4, "--json")
    got = json.loads(out)
    full, small = lora_of(tmp_path / "full")[0], lora_of(tmp_path / "small")[0]
    errors = []
    for key in [key for key in full if "lora_A" in key]:
        pairs = [(t[key].double(), t[key.replace("_A", "_B")].double()) for t in (full, small)]
        (A, B), (a, b) = pairs
        assert a.shape[0] == b.shape[1] == 4
        errors.append(float((B @ A - b @ a).norm() / (B @ A).norm()))
        values = torch.linalg.svdvals(B @ A)  # no pair of rank 4 is nearer
        assert errors[-1] == pytest.approx(float(values[4:].norm() / values.norm()), abs=1e-5)
    assert code == 0 and got["rank"] == 4 and got["error"] == pytest.approx(max(errors), abs=1e-5)
    text = run(capsys, "export-lora", adapter, tmp_path / "text", "--rank", 4)[1]
    assert text.endswith(f"rank 4, relative error of the reduction {got['error']:.2g}\n")


def test_exporting_onto_the_adapter_is_refused(tmp_path, capsys):
    make(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    code, _, err = run(capsys, "export-lora", tmp_path / "adapter", tmp_path / "adapter")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert code == 1 and err.count("\n") == 1


# ---- check-export


def good(folder, **options):
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], res_mode="bs", **options)
    export_lora(model, folder / "lora", base_model_name_or_path="some/base")
    return folder / "lora"


def change(folder, add=None, **values):
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if add:
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file(tensors | {add[0]: torch.ones(add[1])}, weights)


def findings(capsys, folder):
    """Exit code, what is fatal and what is not, by reader; without the one for diffusers."""
    code, out, _ = run(capsys, "check-export", folder, "--json")
    found = {True: {}, False: {}}
    for finding in json.loads(out):
        own = found[finding["is_fatal"]].setdefault(finding["reader"], [])
        own.append(finding["sentence"])
    (sentence,) = found[False].pop("diffusers")
    assert "export_diffusers" in sentence
    return code, found[True], found[False]


def test_a_good_export_has_no_finding(tmp_path, capsys):
    assert findings(capsys, good(tmp_path)) == (0, {}, {})
    code, out, _ = run(capsys, "check-export", tmp_path / "lora")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4
    assert lines[:3] == [f"{r}: nothing known against it" for r in ("PEFT", "vLLM", "llama.cpp")]


HEAD = "base_model.model.score.weight"
DORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
BIAS = "base_model.model.model.layers.0.self_attn.q_proj.bias"
LONE = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
SERVED = {"vLLM", "llama.cpp"}
MISREAD = [
    ({"rank_pattern": {"q_proj": 2}}, SERVED, "rank_pattern is not read"),
    ({"alpha_pattern": {"q_proj": 2}}, SERVED, "alpha_pattern is not read"),
    ({"use_rslora": True}, {"llama.cpp"}, "use_rslora is ignored"),
    ({"modules_to_save": ["score"], "add": (HEAD, (3, 16))}, SERVED, "score"),
    ({"use_dora": True, "add": (DORA, (16,))}, SERVED, "DoRA"),
    ({"bias": "all", "add": (BIAS, (16,))}, SERVED, "biases"),
    ({"add": (LONE, (4, 16))}, {"PEFT"}, "has no lora_B"),
    ({"add": (LONE, (7, 16))}, {"PEFT", "llama.cpp"}, "rank"),
    ({"r": 3}, {"PEFT"}, "r is 3, but the file has pairs of rank [4]"),
]


@pytest.mark.parametrize(("values", "readers", "words"), MISREAD)
def test_what_a_reader_would_misread_is_named(tmp_path, capsys, values, readers, words):
    folder = good(tmp_path)
    change(folder, **values)
    code, fatal, _ = findings(capsys, folder)
    assert code == 1 and set(fatal) == readers
    assert all(any(words in sentence for sentence in own) for own in fatal.values())
    out = run(capsys, "check-export", folder)[1]
    assert all(f"{reader}: nothing known" not in out for reader in readers)


@pytest.mark.parametrize(
    ("rank", "flag"), [(16, None), (17, 32), (33, 64), (257, 320), (512, 512), (513, "refused")]
)
def test_ranks_are_what_vllm_serves(tmp_path, capsys, rank, flag):
    folder = tmp_path / "lora"
    folder.mkdir()
    name = "base_model.model.layers.0.q_proj"
    pair = {
        f"{name}.lora_A.weight": torch.ones(rank, 2),
        f"{name}.lora_B.weight": torch.ones(2, rank),
    }
    safetensors.torch.save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    code, fatal, other = findings(capsys, folder)
    if flag == "refused":
        assert code == 1 and "513 is above its largest, 512" in fatal["vLLM"][0]
    else:
        assert code == 0 and not fatal
        assert other == (
            {} if flag is None else {"vLLM": [f"rank {rank} needs --max-lora-rank {flag}"]}
        )


def test_a_missing_base_and_conv1d_are_no_refusal(tmp_path, capsys):
    folder = good(tmp_path)
    change(folder, base_model_name_or_path=None, fan_in_fan_out=True)
    code, fatal, other = findings(capsys, folder)
    assert (code, fatal) == (0, {})
    assert "AutoPeftModel" in other["PEFT"][0] and "--base" in other["llama.cpp"][0]
    assert "Conv1D" in other["vLLM"][0]


def test_an_unmerged_adapter_is_named(tmp_path, capsys):
    make(tmp_path)
    code, out, _ = run(capsys, "check-export", tmp_path / "adapter")
    assert code == 1 and out.count("unmerged ResLoRA adapter") == 4


def test_a_file_of_diffusers_is_for_diffusers(tmp_path, capsys):
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="bs")
    export_diffusers(model, tmp_path, "unet")
    code, out, _ = run(capsys, "check-export", tmp_path)
    lines = out.splitlines()
    assert lines[3] == "diffusers: nothing known against it" and len(lines) == 4
    assert all("export_lora" in line for line in lines[:3])
    assert code == 0  # as a good file of PEFT, which diffusers does not read
    export_diffusers(model, tmp_path, "model")
    assert "must begin with a component; got model" in run(capsys, "check-export", tmp_path)[1]


# ---- Errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["melt"],
        ["merge"],
        ["merge", "base", "adapter"],
        ["merge", "base", "adapter", "out", "--method", "best"],
        ["merge", "base", "adapter", "out", "--dtype", "int8"],
        ["merge", "base", "adapter", "out", "--shard-size", "many"],
        ["export-lora", "adapter", "out", "--rank", "x"],
        ["export-lora", "adapter", "out", "--rank", "4", "--exact"],
        ["export-lora", "adapter", "out", "--rank", "9" * 19],
        ["doctor", "--pre-num", "9" * 5000],
        ["inspect"],
        ["inspect", "user/name", "--revision", ""],
        ["inspect", ""],
        ["merge", "base", "adapter", "out", "--base-revision", ""],
        ["merge", "base", "adapter", "out", "--verify", ""],
        ["plot", "losses", "", "out.png"],
        ["check-export", "a", "b"],
    ],
)
def test_arguments_that_cannot_be_understood(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and err.startswith("usage: reslora")
    assert err.splitlines()[-1].startswith("reslora") and ": error: " in err.splitlines()[-1]


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


def folder_of_config(content):
    def prepare(folder):
        write(folder, "adapter_config.json", content)
        safetensors.torch.save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")

    return prepare


NONSENSE = [
    lambda f: None,
    lambda f: f.mkdir(),
    lambda f: f.write_bytes(b""),
    lambda f: f.write_bytes(b"\x00\xff" * 100),
    lambda f: write(f, "adapter_model.safetensors", b"x"),
    lambda f: write(f, "model.safetensors", b"x" * 20),
    lambda f: write(f, "pytorch_lora_weights.safetensors", b"x" * 20),
    lambda f: os.mkfifo(f),
    folder_of_config(b"[]"),
    folder_of_config(b"{"),
    folder_of_config(b"\xff"),
    folder_of_config(b'{"peft_type": "RESLORA"}'),
    folder_of_config(b'{"peft_type": ["LORA"]}'),
]


@pytest.mark.parametrize("prepare", NONSENSE)
@pytest.mark.parametrize("command", ["inspect", "check-export", "export-lora"])
def test_nonsense_is_one_line(tmp_path, capsys, command, prepare):
    path = tmp_path / "path"
    prepare(path)
    arguments = [command, path, *([tmp_path / "out"] if command == "export-lora" else [])]
    code, out, err = run(capsys, *arguments)
    if code == 0 or not err:  # tensors of an unknown kind, or findings
        assert command != "export-lora" and (path / "adapter_config.json").exists() and out
        return
    assert (code, out) == (1, "") and err.count("\n") == 1 and err.startswith("reslora: ")
    assert "[merge] BASE" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "weight"], "base weight"),
        (["--method", "lsq"], "needs a fit"),
        (["--method", "exact"], "rule 'exact'"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--rank", "-3"], "rank must be at least 1"),
    ],
)
def test_exports_that_cannot_be_made_are_one_line(tmp_path, capsys, options, words):
    make(tmp_path)
    code, out, err = run(capsys, "export-lora", tmp_path / "adapter", tmp_path / "lora", *options)
    assert (code, out) == (1, "") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", "meta", "privateuseone"])
def test_devices_that_cannot_serve_are_one_line(tmp_path, capsys, device):
    make(tmp_path)
    code, out, err = merge_in(capsys, tmp_path, "--device", device)
    sentence = f"reslora: [merge] device must be one that torch can use; got {device!r}\n"
    assert (code, out, err) == (1, "", sentence)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000", 10**6),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        (" 1.5 MB ", 1_500_000),
        ("500MiB", 500 * 2**20),
        ("2K", 2000),
        ("2KiB", 2048),
        ("1B", 1),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["9" * 400, "", "0", "0GB", "-1GB", "GB", "4TBB", "1e9", "nan", "4 G iB", "0.4", "0.0001K"],
)
def test_other_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size"):
        parse_size(text)


def test_a_link_as_output_and_a_foreign_device_are_refused_before_the_work(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    code, _, err = merge_in(capsys, tmp_path)
    assert code == 1 and "OUT must be a folder to make" in err
    (tmp_path / "out").unlink()
    code, _, err = merge_in(capsys, tmp_path, "--device", "toaster")
    assert code == 1 and "got 'toaster'" in err and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
