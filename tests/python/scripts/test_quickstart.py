"""The quickstart, end to end with tiny settings, and its refusals. No network is used."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quickstart_program import SCRIPT, TINY, environment, quickstart
from safetensors import safe_open
from transformers import AutoModelForCausalLM

METHODS = ["none-alpha16", "none-alpha32", "is-alpha16", "bs-alpha16", "ms-alpha16"]
RULES = {
    "none": ["exact"],
    "is": ["lsq", "input", "weight"],
    "bs": ["exact"],
    "ms": ["lsq", "input", "weight", "factored"],
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first_run(cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("what it's put in")  # a shell needs quotes around it
    done = quickstart(*TINY, "--output", output, cache=cache)
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.fixture(scope="module")
def record(first_run):
    return json.loads((first_run[0] / "results.json").read_text())


def test_trains_every_method_from_the_same_start_on_the_same_batches(record):
    results = record["results"]
    assert [f"{r['res_mode']}-alpha{r['lora_alpha']:g}" for r in results] == METHODS
    assert {len(r["train_losses"]) for r in results} == {4}
    assert len({r["train_losses"][0] for r in results}) == 1  # B is zero: the base model's loss
    assert len({r["loss_before"] for r in results}) == 1
    assert len({r["trainable"] for r in results}) == 1
    assert all(r["loss_trained"] != r["loss_before"] and r["seconds"] > 0 for r in results)


def test_reports_every_merge_rule_with_its_alphas_and_errors(record):
    for result in record["results"]:
        assert [row["rule"] for row in result["merges"]] == RULES[result["res_mode"]]
        exact = result["res_mode"] in ("none", "bs")
        for row in result["merges"]:
            assert (row["merge_error"] < 1e-5) == exact
            has_alphas = any(layer["alpha_star"] for layer in row["layers"])
            assert has_alphas == (row["rule"] in ("input", "weight", "factored"))
            if exact:
                assert row["loss_merged"] == pytest.approx(result["loss_trained"], abs=1e-5)


def test_files_read_back_by_peft_and_transformers_agree(record):
    rows = [row for result in record["results"] for row in result["merges"]]
    assert len(rows) == 10
    assert all(row["peft_difference"] <= 1e-5 for row in rows)
    differences = [row["transformers_difference"] for row in rows if "merged_folder" in row]
    assert len(differences) == 5
    assert max(differences) <= 1e-5


def test_exports_differ_between_rules_and_from_the_base(record):
    """Agreement alone would also hold for files that do nothing."""
    result = next(r for r in record["results"] if r["res_mode"] == "is")
    folders = [Path(row["lora_folder"]) for row in result["merges"]]
    assert json.loads((folders[0] / "adapter_config.json").read_text())["peft_type"] == "LORA"
    files = [safe_open(folder / "adapter_model.safetensors", "pt") for folder in folders]
    key = next(k for k in files[0].keys() if "layers.1." in k and "lora_B" in k)
    by_lsq, by_input, by_weight = (file.get_tensor(key) for file in files)
    assert by_input.abs().max() > 0
    assert not by_input.equal(by_weight) and not by_lsq.equal(by_input)


def test_merged_folder_is_a_whole_model(record):
    folder = record["results"][2]["merges"][0]["merged_folder"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("reslora" in name or "lora_" in name for name in model.state_dict())
    assert (Path(folder) / "tokenizer.json").is_file()


def test_writes_the_figure_the_table_and_what_it_does_not_show(first_run):
    output, done = first_run
    assert (output / "loss.png").read_bytes()[:8] == PNG
    assert "loss=" in done.stderr  # the progress bar
    header = next(line for line in done.stdout.splitlines() if line.startswith("method"))
    for column in ("trainable", "seconds", "before", "trained", "merged by", "merge error"):
        assert column in header
    for name in ("LoRA (alpha 16)", "LoRA (alpha 32)", "ResLoRA is", "ResLoRA bs", "ResLoRA ms"):
        assert name in done.stdout
    assert "does not show that ResLoRA is better or worse than LoRA" in " ".join(
        done.stdout.split()
    )
    assert not list(output.glob(".unfinished-*"))


def test_second_run_takes_the_model_from_the_cache_and_gives_the_same_losses(
    first_run, record, cache, tmp_path
):
    done = quickstart(*TINY, "--res-mode", "bs", "--output", tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "pretrained in an earlier run" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    before = {r["method"]: r["train_losses"] for r in record["results"]}
    assert [r["res_mode"] for r in results] == ["none", "none", "bs"]
    for result in results:
        assert result["train_losses"] == pytest.approx(before[result["method"]], rel=1e-5)


def test_adapts_a_model_and_a_text_of_the_user(record, cache, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps.\n" for i in range(300)))
    base = record["results"][0]["merges"][0]["merged_folder"]
    arguments = ["--model", base, "--data", text, "--res-mode", "ms", "--pre-num", -1, "--r", 2]
    arguments += ["--target-modules", "q_proj,v_proj", "--output", tmp_path / "out"]
    done = quickstart(*TINY, *arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["settings"]["model"] == base
    names = {layer["name"] for layer in record["results"][2]["merges"][0]["layers"]}
    assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "v_proj"}


def commands_of(stdout: str) -> list[str]:
    """Return the commands that are printed at the end, as they are."""
    lines = stdout[stdout.index("\nTo go on") :].splitlines()
    return [line for line in lines if line.startswith("  ") and not line.startswith("  #")]


def run_as_printed(command: str, folder: Path, **variables: str) -> str:
    """Run a command in a shell, somewhere else; return what it printed."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment(folder) | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    return done.stdout


def test_the_commands_printed_at_the_end_take_the_best_rule(first_run, tmp_path):
    output, done = first_run
    inspect, merge, export = commands_of(done.stdout)
    adapter = str(output / "is-alpha16/adapter")
    assert all(adapter in shlex.split(command) for command in (inspect, merge, export))
    assert "fits of" in run_as_printed(inspect, tmp_path)
    merged = run_as_printed(merge, tmp_path)
    assert re.search(r"\d+ by lsq", merged)
    assert "by weight" not in merged and "by input" not in merged
    run_as_printed(export, tmp_path)
    assert re.search(r"merged by [\w, ]*lsq\)", (output / "lora/README.md").read_text())
    assert (output / "merged-bfloat16/model.safetensors").is_file()
    # What was made by them is not what a later run names.
    program = "import report, sys; print(report.next_steps(*eval(sys.argv[1])))"
    results = [{"method": "none", "res_mode": "none", "adapter_folder": "a"}]
    done = subprocess.run(
        [sys.executable, "-c", f"from pathlib import *; {program}", repr((results, "b", output))],
        env=environment(tmp_path) | {"PYTHONPATH": str(SCRIPT.parent / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    _, merge, export = map(shlex.split, commands_of(f"\n{done.stdout}"))
    assert merge[-3] == f"{output / 'merged-bfloat16-2'}" and export[-1] == f"{output / 'lora-2'}"


def test_a_name_of_the_hub_is_printed_as_it_is(record, cache, tmp_path):
    """The Hub's cache is laid out by hand; nobody listens where the Hub is looked for."""
    kept = tmp_path / "hub/models--someone--small"
    snapshot = kept / "snapshots" / ("0" * 40)
    shutil.copytree(record["results"][0]["merges"][0]["merged_folder"], snapshot)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("0" * 40)
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    arguments = ["--model", "someone/small", "--res-mode", "ms", "--output", tmp_path / "out"]
    done = quickstart(*TINY, *arguments, cache=cache, **hub)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr and "reach the Hub" not in done.stderr
    _, merge, _ = commands_of(done.stdout)
    assert shlex.split(merge)[4:6] == ["someone/small", f"{tmp_path / 'out/ms-alpha16/adapter'}"]
    assert re.search(r"\d+ by lsq", run_as_printed(merge, tmp_path, **hub))


BAD = {
    "unknown shortcut": (["--res-mode", "xs"], "--res-mode must be one of is, bs, ms, all, none"),
    "missing file": (["--data", "no/such/file.txt"], "--data must name a text file"),
    "folder as file": (["--data", "."], "--data must name a text file"),
    "not a number": (["--steps", "many"], "--steps must be a whole number; got 'many'"),
    "no steps": (["--steps", "0"], "--steps must be at least 1; got 0"),
    "rank 0": (["--r", "0"], "--r must be at least 1; got 0"),
    "pre-num below -1": (["--pre-num", "-2"], "--pre-num must be at least -1; got -2"),
    "no rate": (["--lr", "nan"], "--lr must be above 0 and finite; got nan"),
    "unknown option": (["--rank", "4"], "unrecognized arguments: --rank 4"),
    "empty target": (["--target-modules", "q_proj,"], "must be names separated by commas"),
    "no target": (["--target-modules", ""], "--target-modules must be names separated by commas"),
    "seed too large": (["--seed", "9" * 20], f"--seed must be at most {2**63 - 1}; got 99"),
    "no output": (["--output", ""], "--output must name a folder; got nothing"),
    "no such folder": (["--model", "./nowhere"], "or a model of the Hub; no folder './nowhere'"),
    "file as model": (["--model", __file__], "--model must name a folder or a model of the Hub"),
    "unknown device": (["--device", "tpu"], "--device must be cpu or cuda; got 'tpu'"),
    "file as output": (["--output", __file__], "--output must name a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_one_sentence(name, tmp_path):
    arguments, sentence = BAD[name]
    done = quickstart(*arguments, cache=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.startswith("quickstart: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD_INPUT = {
    "empty text": (["--data", "empty.txt"], "--data must hold text"),
    "short text": (["--data", "short.txt"], "at least one block of --seq-len 32 tokens"),
    "binary": (["--data", "binary.txt"], "--data must be UTF-8 text"),
    "no model in folder": (["--model", "."], "'.' has no config.json"),
    "unknown target": (["--target-modules", "no_proj"], "'no_proj', which matches nothing"),
    "too long": (["--seq-len", "513"], "--seq-len must be at most 512 for this model; got 513"),
}
# One process for all of them, since importing torch and transformers takes seconds.
EACH = """
import contextlib, io, json, os, sys
import finetune
answers = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = finetune.main(arguments)
    answers.append((code, errors.getvalue(), os.path.exists("out")))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(first_run, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {"good": b"a b c\n" * 9000, "empty": b" \n", "short": b"short", "binary": b"\xff\xfe"}
    for name, content in texts.items():
        (folder / f"{name}.txt").write_bytes(content)
    common = [*TINY, "--cache", str(cache / "reslora"), "--output", "out", "--data", "good.txt"]
    requests = [common + arguments for arguments, _ in BAD_INPUT.values()]
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(requests)],
        env=environment(cache) | {"PYTHONPATH": str(SCRIPT.parent / "python")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(BAD_INPUT, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence(name, answers):
    code, errors, is_output_there = answers[name]
    assert not is_output_there
    assert code == 2
    assert BAD_INPUT[name][1] in errors
    # Before it, libraries that are imported may log a line of their own.
    last = errors.splitlines()[-1]
    assert last.startswith("quickstart: ") and errors.count("quickstart: ") == 1
