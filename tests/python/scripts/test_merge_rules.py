"""bench_merge.py --settings: adapters kept, records resumed; small bases; the summary."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_samples import LETTERS, write_tokenizer
from models import tiny_llama
from paper_modules import BENCHMARKS, imported

MODULES = (
    "bench_merge",
    "merge_bases",
    "merge_rules",
    "merge_rules_summary",
    "merge_summary",
    "merge_tasks",
    "merge_training",
    "small_models",
)
DEFAULTS = {"r": 2, "steps": 2, "rows": [16, 64], "batches": 2, "tests": 3}
SETTINGS = {
    "text": {"task": "shakespeare", "shortcut": "ms", "pre_num": 2},
    "other text": {"task": "shakespeare", "shortcut": "ms", "pre_num": 2, "calibration": "sst2"},
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Import the files of the benchmark, and forget them afterwards."""
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Write a tiny model with a tokenizer of letters, and texts of random letters."""
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    tiny_llama(pad_token_id=1).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    draw = random.Random(0)

    def letters(count: int) -> str:
        return " ".join(draw.choices(LETTERS, k=count))

    for name in ("tinyshakespeare", "wikitext2", "sst2"):
        (folder / "data" / name).mkdir(parents=True)
    (folder / "data/tinyshakespeare/input.txt").write_text(letters(96 * 100))
    for part in ("valid", "test"):
        (folder / f"data/wikitext2/{part}.txt").write_text(letters(96 * 30))
    for part in ("train", "test"):
        lines = [f"{n % 2} {letters(5 + n % 20)}\n" for n in range(64)]
        (folder / f"data/sst2/stsa.binary.{part}").write_text("".join(lines))
    return SimpleNamespace(folder=folder, model=folder / "model", data=folder / "data")


def run(bench: Any, places: Any, folder: Path, settings: dict[str, Any], *options: str) -> int:
    """Run settings with everything that is written in a folder."""
    content = {"defaults": DEFAULTS, "settings": settings}
    (folder / "settings.json").write_text(json.dumps(content))
    words = ["--model", places.model, "--data", places.data, "--results", folder / "results"]
    words += ["--settings", folder / "settings.json", "--adapters", folder / "adapters", *options]
    return bench.bench_merge.main([str(word) for word in words])


def read(folder: Path, label: str, name: str) -> dict[str, Any]:
    return json.loads((folder / f"results/{label}/{name}-0.json").read_text())


# ---- Settings, end to end


def test_two_labels_measure_the_same_adapter(bench, places, tmp_path, monkeypatch) -> None:
    assert run(bench, places, tmp_path, SETTINGS, "--label", "before") == 0
    adapters = list((tmp_path / "adapters").iterdir())
    assert len(adapters) == 1  # calibration is no part of training
    monkeypatch.setattr(bench.merge_rules, "Trainer", lambda *_: pytest.fail("trained again"))
    assert run(bench, places, tmp_path, SETTINGS, "--label", "after") == 0
    old, new = (read(tmp_path, label, "text") for label in ("before", "after"))
    assert old["unmerged"] == new["unmerged"]
    wanted = {*bench.merge_rules.RULES, "lsq, 16 rows", "lsq, 64 rows", "lsq"}
    assert set(new["rules"]) == wanted
    for rule in wanted:
        assert new["rules"][rule]["kl"] == old["rules"][rule]["kl"] > 0, rule
        assert 0 <= new["rules"][rule]["top1"] <= 1
    assert new["rules"]["lsq, 16 rows"]["rows"] == 16
    assert new["rules"]["lsq"]["rows"] == 2 * 8 * 96
    cost = new["rules"]["lsq"]
    assert cost["cpu_seconds"] > 0 and cost["forward_cpu_seconds"] > 0 and cost["peak_bytes"] >= 0
    other = read(tmp_path, "after", "other_text")
    assert other["rules"]["weight"] == new["rules"]["weight"]
    assert other["rules"]["lsq"]["kl"] != new["rules"]["lsq"]["kl"]


def test_records_that_are_there_are_skipped(bench, places, tmp_path, monkeypatch) -> None:
    path = tmp_path / "results/after/text-0.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    measured = []

    def planted(setting: Any, seed: int, places: Any) -> dict[str, Any]:
        measured.append((setting.name, seed))
        return {"unmerged": {}, "rules": {}}

    monkeypatch.setattr(bench.merge_rules, "run_setting", planted)
    assert run(bench, places, tmp_path, SETTINGS, "--seeds", "0", "1") == 0
    assert measured == [("other text", 0), ("text", 1), ("other text", 1)]
    assert path.read_text() == "{}\n"


def test_a_rule_that_cannot_be_had_is_noted_and_the_others_are_measured(bench, places) -> None:
    task = bench.merge_bases.load("shakespeare", "tiny-llama", places.model, None, places.data, 2)
    model = bench.merge_training.adapted(task, 0, r=2, res_mode="is", target_modules="all-linear")
    _, reference = bench.merge_training.evaluate(model, task)
    rules = ("weight", "input", "sideways")
    found = {rule: bench.merge_rules.measured(model, task, rule, reference) for rule in rules}
    assert "kl" in found["weight"]
    assert "needs" in found["input"]["unavailable"]  # nothing was trained, so norms are not there
    assert "unavailable" in found["sideways"]


@pytest.mark.parametrize(
    ("own", "options", "sentence"),
    [
        ({"colour": 1}, (), "a setting knows name, task, "),
        ({}, ("--only", "poems"), "--only must name settings: one; got poems"),
        ({"base": "t5"}, (), "--models must be given for t5"),
    ],
)
def test_a_bad_setting_is_refused_in_a_sentence(
    bench, places, tmp_path, capsys, own, options, sentence
) -> None:
    settings = {"one": SETTINGS["text"] | own}
    assert run(bench, places, tmp_path, settings, *options) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"bench_merge.py: {sentence}")


def test_the_settings_of_the_project_have_names_of_their_own_and_known_bases(bench) -> None:
    settings = bench.merge_rules.read_settings(BENCHMARKS / "merge_settings.json")
    assert {s.base for s in settings} == set(bench.merge_bases.KINDS)
    trained = {s.adapter(0) for s in settings if s.calibration is None}
    assert len(trained) == sum(s.calibration is None for s in settings)
    assert {s.adapter(0) for s in settings} == trained  # another text needs no other training


@pytest.mark.parametrize("method", ["ms 1", "bs 1"])
def test_a_cell_of_the_tables_measures_every_rule(bench, places, method) -> None:
    task = bench.merge_tasks.load("sst2", places.model, places.data)
    settings = bench.bench_merge.Settings(r=2, steps=4, calibration_batches=2, refine_steps=1)
    record = bench.bench_merge.run_cell(task, method, 0, settings)
    summary = bench.merge_summary
    assert set(record["rules"]) == ({"exact"} if method in summary.EXACT else set(summary.RULES))
    assert all(math.isfinite(entry["kl"]) for entry in record["rules"].values())


# ---- Rows and small bases


@pytest.mark.parametrize("rows", [1, 16, 40, 64, 100])
def test_a_stream_is_cut_to_so_many_rows(bench, places, rows) -> None:
    task = bench.merge_bases.load("sst2", "tiny-llama", places.model, None, places.data, 9)
    whole = next(task.training(0))
    batches = bench.merge_bases.first_rows(task.training(0), rows, task.pad)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == rows
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["attention_mask"].any(1).all()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == task.pad).all()
    kept = batches[0]["attention_mask"].bool()
    assert torch.equal(batches[0]["input_ids"][kept], whole["input_ids"][: len(kept)][kept])


@pytest.mark.parametrize(("base", "task"), [("gpt2", "text"), ("t5", "text"), ("bert", "sst2")])
def test_a_small_base_is_pretrained_and_measured(
    bench, places, tmp_path, monkeypatch, capsys, base: str, task: str
) -> None:
    monkeypatch.setattr(bench.small_models, "WIDTH", 16)
    monkeypatch.setattr(bench.small_models, "LAYERS", 2)
    words = ["--tokenizer", places.model, "--data", places.data, "--output", tmp_path / "models"]
    words += ["--minutes", "0.02", "--models", base]
    assert bench.small_models.main([str(word) for word in words]) == 0
    losses = json.loads((tmp_path / f"models/{base}/loss.json").read_text())
    assert losses["trained"] < losses["random"] and losses["steps"] > 1
    said = capsys.readouterr().out
    assert f"{losses['trained']:.3f}" in said and f"{losses['random']:.3f}" in said

    name = {"text": "shakespeare"}.get(task, task)
    settings = {base: {"base": base, "task": name, "shortcut": "is"}}
    assert run(bench, places, tmp_path, settings, "--models", str(tmp_path / "models")) == 0
    rules = read(tmp_path, "after", base)["rules"]
    assert all(math.isfinite(entry["kl"]) for entry in rules.values())
    assert rules["lsq, 16 rows"]["rows"] == 16


# ---- The summary


def record_of(name: str, kl: dict[str, float], seed: int = 0, seconds: float = 2.0) -> Any:
    """Return a record with planted figures."""
    rules: dict[str, Any] = {rule: {"kl": value} for rule, value in kl.items()}
    rules["lsq"] |= {
        "cpu_seconds": seconds,
        "forward_cpu_seconds": 1.0,
        "peak_bytes": 3e6,
        "forward_peak_bytes": 1e6,
    }
    return {"setting": {"name": name, "rows": [16, 64]}, "seed": seed, "rules": rules}


def plant(folder: Path, label: str, records: list[Any]) -> None:
    (folder / label).mkdir()
    for number, record in enumerate(records):
        (folder / label / f"{number}.json").write_text(json.dumps(record))


PAPER = {"weight": 0.04, "input": 0.02, "factored": 0.03, "projected": 0.01}
OLD = {**PAPER, "lsq, 16 rows": 0.04, "lsq, 64 rows": 0.01, "lsq": 0.002}
NEW = {**PAPER, "lsq, 16 rows": 0.01, "lsq, 64 rows": 0.01, "lsq": 0.001}


def test_the_summary_says_what_was_reached_and_what_was_not(bench, tmp_path, capsys) -> None:
    worse = NEW | {"lsq": 0.004, "lsq, 16 rows": 0.08}
    plant(tmp_path, "before", [record_of("mild", OLD), record_of("strong", OLD)])
    plant(tmp_path, "after", [record_of("mild", NEW), record_of("strong", worse, seconds=9.0)])
    assert bench.merge_rules_summary.main(["--records", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    mild = (
        "| mild | 0.0400 | 0.0200 | 0.0300 | 0.0100 | 0.00200 | 0.00100 | 0.500 | 0.0500 | 0.500 |"
    )
    assert mild in text
    assert "| geometric mean |  |  |  |  |  |  | 0.500 | 0.100 | 1.00 |" in text
    assert "| mild | 2.00 -> 0.500 | 0.500 -> 0.500 |" in text
    assert "| strong | 2.00 -> 9.00 | 1.00 -> 1.00 | 3.00 -> 3.00 | 1.00 -> 1.00 |" in text
    for line in (
        "number of rows: 3 of 4; missed: strong (0), 16 rows 4.00.",
        "does what all did before: 1 of 2; missed: strong (0), 64 rows 8.00.",
        "never worse than before: 1 of 2; missed: strong (0) 2.00.",
        "aim 0.6: 1.00.",
        "`projected` not worse than the paper's better rule: 2 of 2.",
        "four times what it took: 1 of 2; missed: strong (0) 4.50.",
        "twice the memory: 2 of 2.",
    ):
        assert line in text, line


def test_the_summary_of_one_label_leaves_comparisons_out(bench, tmp_path, capsys) -> None:
    seeds = [record_of("mild", NEW, 0), record_of("mild", NEW | {"lsq": 0.004}, 1)]
    del seeds[0]["rules"]["projected"]
    plant(tmp_path, "after", seeds)
    assert bench.merge_rules_summary.main(["--records", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| mild | 0.0400 | 0.0200 | 0.0300 | 0.0100 |  | 0.00200 | 0.500 | 0.100 |  |" in text
    assert "`lsq` by default never worse than before: nothing to judge by." in text
    assert bench.merge_rules_summary.main(["--records", str(tmp_path), "--after", "none"]) == 2
