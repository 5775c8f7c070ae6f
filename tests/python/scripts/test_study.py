"""benchmarks/paper: the rule that finds rates, the lines, the methods, and a small study."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paper_modules import PAPER, imported

MODULES = ("cells", "lines", "methods", "rasa", "rates", "study", "tasks", "training")
Scores = dict[int, float]


@pytest.fixture(scope="module")
def paper() -> Iterator[Any]:
    """Import the study's files, and forget them and what they set afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    with imported(*MODULES) as modules:
        yield modules
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def grid() -> dict[str, Any]:
    return json.loads((PAPER / "grid.json").read_text())


# ---- The rule


def tune(paper: Any, curve: Callable[[int], float], start: int = 0) -> Scores:
    """Measure a planted curve until the rule has nothing more to ask."""
    scores: Scores = {}
    while places := paper.rates.next_indices(scores, start):
        assert not set(places) & set(scores)
        scores |= {n: curve(n) for n in places}
    return scores


@pytest.mark.parametrize(
    ("curve", "best", "measured"),
    [
        (lambda n: abs(n), 0, {-2, -1, 0, 1, 2}),  # inside at once
        (lambda n: abs(n - 0.9), 1, {-2, -1, 0, 1, 2}),  # between two of the coarse steps
        (lambda n: abs(n - 6), 6, {-2, 0, 2, 4, 5, 6, 7, 8}),  # at the upper edge
        (lambda n: abs(n + 5), -5, {2, 0, -2, -4, -6, -5, -7, -8}),  # at the lower edge
        (lambda n: math.inf if n > 0 else -n, 0, {-2, -1, 0, 1, 2}),  # diverges above the best
        (lambda n: math.nan if n > -5 else abs(n + 8), -8, {2, 0, -2, -4, -6, -8, -10, -7, -9}),
    ],
)
def test_the_best_rate_has_both_neighbours_measured(paper, curve, best, measured) -> None:
    scores = tune(paper, curve)
    assert paper.rates.best_index(scores) == best
    assert {best - 1, best + 1} <= set(scores)
    assert set(scores) == measured


@pytest.mark.parametrize("seed", range(50))
def test_no_noise_leaves_the_best_rate_at_an_edge(paper, seed: int) -> None:
    noise = random.Random(seed)
    scores = tune(paper, lambda n: (n - 3) ** 2 / 40 + noise.random(), start=noise.randrange(-4, 5))
    best = paper.rates.best_index(scores)
    assert min(scores) < best < max(scores)
    assert {best - 1, best + 1} <= set(scores)


def test_rates_are_the_same_numbers_in_files_and_in_the_rule(paper) -> None:
    for index in range(-20, 20):
        rate = json.loads(json.dumps(paper.rates.rate_at(index, 0.012)))
        assert paper.rates.index_of(rate, 0.012) == index
    with pytest.raises(ValueError, match=r"rate must be 0.012 \* 2\^\(n/2\) for a whole n; got"):
        paper.rates.index_of(0.01, 0.012)


def cut_down(grid: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Return a grid whose questions are changed."""
    return grid | {"questions": [question | changed for question in grid["questions"]]}


def pretended(paper: Any, grid: dict[str, Any], run: Any) -> dict[str, Any]:
    """Return the line of a run that did not take place; each method has a best rate of its own."""
    index = paper.rates.index_of(run.rate, grid["lattice_base"]) if run.rate else 0
    loss = 3 + abs(index - len(run.method) % 7 + 3)
    metrics = {"validation": {"loss": loss}, "diverged": index > 4, "seconds": 1 + run.rank}
    return run.as_dict() | metrics | {"steps": 4, "test": None}


def complete(
    paper: Any, grid: dict[str, Any], lines: list[dict[str, Any]], task: str, jobs: int = 1
) -> list[dict[str, Any]]:
    """Go on with pretended runs until nothing is missing; of those at hand a number is done."""
    lines = list(lines)
    while runs := paper.cells.next_runs(lines, grid, task):
        lines += [pretended(paper, grid, run) for run in runs[:jobs]]
    return lines


def test_any_part_of_the_lines_leads_to_the_same_study(paper, grid) -> None:
    grid = cut_down(grid, methods=["lora", "bs 3", "rasa", "frozen"])
    whole = complete(paper, grid, [], "shakespeare")
    runs = {paper.lines.run_of(line) for line in whole}
    assert len(runs) == len(whole)
    draw = random.Random(0)
    for number in range(6):
        count = draw.randrange(len(whole))
        is_resumed = number % 2 == 0  # else lines are lost, and more rates may be tried again
        part = whole[:count] if is_resumed else draw.sample(whole, count)
        expected = paper.cells.next_runs(part, grid, "shakespeare")
        draw.shuffle(part)
        assert paper.cells.next_runs(part, grid, "shakespeare") == expected
        again = {
            paper.lines.run_of(line)
            for line in complete(paper, grid, part, "shakespeare", number + 1)
        }
        assert again == runs if is_resumed else again >= runs
        assert {run for run in again - runs if run.phase == "test"} == set()


def test_every_cell_is_tested_at_its_own_best_rate_and_after_tuning(paper, grid) -> None:
    lines = complete(paper, grid, [], "sst2")
    question = next(q for q in grid["questions"] if "sst2" in q["tasks"])
    cells = list(paper.cells.cells_of(question, grid, "sst2"))
    assert len(cells) == 21  # ten methods at two ranks, and the head alone
    for cell in cells:
        own = [line for line in lines if (line["method"], line["rank"]) == (cell.method, cell.rank)]
        phases = [line["phase"] for line in own]
        assert phases == sorted(phases, reverse=True)  # tune, then test
        tuned = [line for line in own if line["phase"] == "tune"]
        tested = [line for line in own if line["phase"] == "test"]
        sound = [line for line in tuned if not line["diverged"]]
        best = min(sound, key=lambda line: line["validation"]["loss"])
        assert {line["rate"] for line in tested} == {best["rate"]}
        assert [line["seed"] for line in tested] == grid["test_seeds"][:5]
        assert {line["seed"] for line in tuned} == {1000}


def test_the_reference_is_complete_before_another_method_begins(paper, grid) -> None:
    lines = complete(paper, grid, [], "shakespeare")
    assert paper.cells.next_runs([], grid, "shakespeare")[0].method == "lora"
    order = [(line["rank"], line["method"]) for line in lines]
    assert [key for key, *_ in zip(order, range(8), strict=False)] == [(2, "lora")] * 8
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == len(set(order)) - 1  # a cell that has begun is completed first


# ---- The lines


def line_of(paper: Any, seed: int) -> dict[str, Any]:
    return paper.lines.Run("smoke", "lora", 2, 0.012, seed, "test").as_dict() | {"seed": seed}


def test_what_a_killed_writer_left_is_dropped(paper, tmp_path) -> None:
    path = tmp_path / "paper/smoke.jsonl"
    assert paper.lines.read(path) == []
    assert paper.lines.append(path, line_of(paper, 0))
    with path.open("a") as file:
        file.write('{"task": "smo')
    assert paper.lines.read(path) == [line_of(paper, 0)]
    assert paper.lines.append(path, line_of(paper, 1))
    assert not paper.lines.append(path, line_of(paper, 1))  # it is there already
    assert paper.lines.read(path) == [line_of(paper, 0), line_of(paper, 1)]
    path.write_text("{}\nnone\n{}\n")
    with pytest.raises(ValueError, match=r"smoke\.jsonl must hold JSON lines; line 2 is none"):
        paper.lines.read(path)


# ---- The methods


def smoke(paper: Any, grid: dict[str, Any]) -> Any:
    return paper.tasks.load("smoke", grid["tasks"]["smoke"], None)


def adapted(paper: Any, grid: dict[str, Any], method: str, rank: int = 2, seed: int = 0) -> Any:
    model = smoke(paper, grid).rows.load_model(seed)
    return paper.methods.adapt(model, grid["methods"][method], rank, seed, grid["targets"])


def factors_of(model: Any) -> dict[str, torch.Tensor]:
    """Return every A by the path of its layer, whatever has made it."""
    found = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.")
        for ending in (".lora_A.default.weight", ".reslora_A"):
            if path.endswith(ending):
                found[path.removesuffix(ending)] = parameter.detach()
    return found


ADAPTED = ("lora", "lora 2x alpha", "lora 2r", "lora+", "dora", "is", "ms all", "bs 3", "bs all")


def test_all_methods_of_a_seed_begin_with_the_same_factors(paper, grid) -> None:
    expected = factors_of(adapted(paper, grid, "lora"))
    assert len(expected) == 28
    for method in ADAPTED:
        found = factors_of(adapted(paper, grid, method))
        assert found.keys() == expected.keys(), method
        for name, A in expected.items():
            assert torch.equal(found[name][:2], A), (method, name)
    other = factors_of(adapted(paper, grid, "lora", seed=1))
    assert not any(torch.equal(other[name], A) for name, A in expected.items())
    for name, layer in adapted(paper, grid, "rasa").named_modules():
        if isinstance(layer, paper.rasa.RasaLinear):
            number = int(name.split(".")[2])
            assert torch.equal(layer.A, expected[name][:1])
            assert torch.equal(layer.pool.A[number], expected[name][1])


@pytest.mark.parametrize("rank", [2, 8])
def test_methods_train_as_many_parameters_as_they_claim(paper, grid, rank: int) -> None:
    def count(method: str) -> int:
        trained = paper.methods.trained(adapted(paper, grid, method, rank))
        return sum(p.numel() for p in trained)

    lora, outputs, k = count("lora"), 4 * (16 + 8 + 8 + 16 + 24 + 24 + 16), 1
    for method in ("lora 2x alpha", "lora+", "is", "ms all", "bs 3", "bs all"):
        assert count(method) == lora, method
    assert count("lora 2r") == 2 * lora
    assert count("dora") == lora + outputs
    assert count("rasa") == lora + 28 * (rank - k + 4 * k)
    assert count("frozen") == 0


def test_every_method_begins_as_the_base_model(paper, grid) -> None:
    task = smoke(paper, grid)
    base = task.rows.load_model(0).eval()
    batch = {key: task.validation[0][key] for key in ("input_ids", "attention_mask")}
    for method in (*ADAPTED, "rasa"):
        logits = adapted(paper, grid, method).eval()(**batch).logits
        torch.testing.assert_close(logits, base(**batch).logits, msg=method)


def test_rasa_adds_own_and_shared_directions(paper) -> None:
    r, k, alpha, L = 3, 1, 6.0, 3
    model = torch.nn.ModuleDict({f"{n}": torch.nn.ModuleDict() for n in range(L)})
    for block in model.values():
        block["q"] = torch.nn.Linear(5, 4)
    names = [f"{n}.q" for n in range(L)]
    base = [block["q"] for block in model.values()]
    paper.rasa.inject_rasa(model, names, r, k, alpha, lambda name, *shape: torch.randn(*shape))
    layers = [block["q"] for block in model.values()]
    pool = layers[0].pool
    assert all(layer.pool is pool for layer in layers)
    x = torch.randn(7, 5)
    for layer, plain in zip(layers, base, strict=True):
        assert torch.equal(layer(x), plain(x))  # every B is zero
        assert layer.d.tolist() == [alpha / 4] * 2 + [alpha / 6] * 3
    with torch.no_grad():
        for parameter in paper.methods.trained(model):
            parameter.normal_()
    for layer, plain in zip(layers, base, strict=True):
        own = layer.B @ torch.diag(layer.d[: r - k]) @ layer.A
        shared = pool.B @ torch.diag(layer.d[r - k :]) @ pool.A
        torch.testing.assert_close(layer(x), plain(x) + x @ (own + shared).T)
    assert [paper.rasa.shared_rank(r, 8, 1) for r in (1, 2, 8, 16, 32)] == [1, 1, 1, 2, 4]


def test_lora_plus_trains_b_faster_by_its_ratio(paper, grid) -> None:
    model = adapted(paper, grid, "lora+")
    optimizer = paper.methods.make_optimizer(model, grid["methods"]["lora+"], 0.5)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (8.0 if "lora_B" in name else 0.5)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


# ---- Runs


def run(paper: Any, grid: dict[str, Any], method: str, phase: str, rate: float = 0.012) -> Any:
    one = paper.lines.Run("smoke", method, 2, rate, 0, phase)
    return paper.training.one_run(one, smoke(paper, grid), grid, "cpu", {"commit": None})


@pytest.mark.parametrize("method", ["lora", "dora", "bs 3", "ms all", "rasa"])
def test_a_repeated_run_gives_the_same_bits(paper, grid, method: str) -> None:
    first, second = (run(paper, grid, method, "test") for _ in range(2))
    differ = {key for key in first if first[key] != second[key]}
    assert differ <= {"seconds", "seconds_per_step", "peak_memory_bytes"}
    assert [step for step, _ in first["training_curve"]] == [2, 4]
    assert [step for step, _ in first["validation_curve"]] == [2, 4]
    assert first["steps"] == 4 and not first["diverged"]


def test_a_run_that_diverges_says_so_and_counts_as_infinitely_bad(paper, grid) -> None:
    task = smoke(paper, grid)
    model = task.rows.load_model(0)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    task.rows.load_model = lambda seed: model
    one = paper.lines.Run("smoke", "lora", 2, 0.012, 1000, "tune")
    line = paper.training.one_run(one, task, grid, "cpu", {})
    assert line["diverged"] and line["validation"] is None and line["training_curve"] == []
    json.dumps(line, allow_nan=False)
    lines = [line, line | {"rate": 0.024}, line | {"rate": 0.006}]
    pending, best = paper.cells.tuned(paper.cells.Cell("smoke", "lora", 2, 2), lines, grid)
    assert (pending, best) == ([-4], None)  # of rates that diverge, the lowest is the best


def test_the_rate_warms_up_and_falls_to_zero(paper) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule = paper.training._schedule(optimizer, {"steps": 6, "warm_up": 2})
    assert [optimizer.param_groups[0]["lr"] for _ in schedule] == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]


def test_tuning_reads_no_test_data(paper, grid, tmp_path, monkeypatch) -> None:
    task = smoke(paper, grid)
    task.read_test = lambda: pytest.fail("the test data were read")
    one = paper.lines.Run("smoke", "lora", 2, 0.012, 1000, "tune")
    assert paper.training.one_run(one, task, grid, "cpu", {})["test"] is None

    model, data = tmp_path / "model", tmp_path / "data"
    for folder in (model, *(data / name for name in ("tinyshakespeare", "gsm8k", "sst2"))):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    text = b"word " * 1800 + b"\xff" * 1000  # the last tenth is no text at all
    (data / "tinyshakespeare/input.txt").write_bytes(text)
    rows = "".join(json.dumps({"question": f"{n}?", "answer": "x" * 40}) + "\n" for n in range(90))
    (data / "gsm8k/train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for part in ("train", "dev"):
        (data / f"sst2/stsa.binary.{part}").write_text("1 good\n0 bad\n" * 20)
    letters = SimpleNamespace(
        from_pretrained=lambda folder: lambda text: {"input_ids": [ord(c) for c in text]}
    )
    monkeypatch.setattr(paper.tasks, "PreTrainedTokenizerFast", letters)
    sizes = {"shakespeare": (8500 // 96, 500 // 96), "gsm8k": (87, 3), "sst2": (40, 40)}
    for name, (train, validation) in sizes.items():
        task = paper.tasks.load(name, grid["tasks"][name], paper.tasks.Places(model, data))
        assert len(task.rows.train) == train
        assert sum(len(batch["labels"]) for batch in task.validation) == validation
        with pytest.raises((UnicodeDecodeError, FileNotFoundError)):
            task.read_test()


# ---- The program


def call(paper: Any, arguments: list[str]) -> int:
    """Run the program here; return its exit code."""
    threads = torch.get_num_threads()
    try:
        return paper.study.main(arguments)
    except SystemExit as stop:
        return stop.code
    finally:
        torch.set_num_threads(threads)


def study(folder: Path, *arguments: str) -> list[str]:
    program = [sys.executable, PAPER / "study.py", "--task", "smoke", "--results", folder]
    return [*map(str, program), *arguments]


def test_a_killed_study_leaves_whole_lines_and_goes_on(paper, grid, tmp_path) -> None:
    """The grid is cut down to what shows it: two methods, one of them tuned."""
    slow = cut_down(grid, methods=["lora", "frozen"], seeds=1)
    longer = grid["tasks"]["smoke"] | {"steps": 40, "validation_at": [40]}
    slow["tasks"] = grid["tasks"] | {"smoke": longer}
    (tmp_path / "grid.json").write_text(json.dumps(slow))
    path = tmp_path / "smoke.jsonl"
    arguments = study(tmp_path, "--grid", str(tmp_path / "grid.json"), "--budget", "2")
    with subprocess.Popen([*arguments, "--jobs", "2"], stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        first = begun.stdout.readline()
        begun.send_signal(signal.SIGKILL)
    assert "smoke tune: lora r 2, rate 0.0" in first and " runs done, about " in first
    time.sleep(0.2)
    before = path.read_text()
    assert before.endswith("\n") and before.count("\n") == len(paper.lines.read(path))
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith(before)
    runs = [paper.lines.run_of(line) for line in paper.lines.read(path)]
    assert len(set(runs)) == len(runs)
    assert paper.cells.next_runs(paper.lines.read(path), slow, "smoke") == []
    assert "0 left, 0.0 h" in done.stdout.splitlines()[-1]
    assert {"torch", "peft", "transformers", "reslora"} == set(
        paper.lines.read(path)[0]["versions"]
    )


def test_no_run_depends_on_the_report(paper, monkeypatch) -> None:
    """Lines name the commit of what makes runs, so that a page that was written changes none."""
    reporting = set(paper.study.REPORTING)
    code = "import sys, study; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=PAPER, capture_output=True, text=True, check=True
    )
    names = {Path(path).name for path in shown.stdout.split() if Path(path or ".").parent == PAPER}
    assert names | reporting == {
        path.name for path in PAPER.iterdir() if path.suffix in (".py", ".md")
    }
    assert not names & reporting
    asked = []
    monkeypatch.setattr(paper.study, "_commit", lambda folder, *paths: asked.append(paths))
    assert paper.study.origin()["study_commit"] is None
    left_out = {path.rpartition("/")[2] for path in asked[1] if path.startswith(":(top,exclude)")}
    assert left_out == reporting


def test_no_run_starts_that_would_end_after_the_budget(paper, tmp_path, capsys) -> None:
    arguments = ["--task", "smoke", "--results", str(tmp_path), "--budget", "0.001"]
    assert call(paper, arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("smoke: 0 runs done, about 22 left")
    assert not (tmp_path / "smoke.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "poems", "--show"], "--task must be one of shakespeare, gsm8k, sst2, smoke; "),
        (["--task", "sst2", "--budget", "1", "--model", "nowhere"], "--model must be a folder"),
        (["--task", "smoke"], "--budget or --show must be given"),
        (["--task", "smoke", "--show", "--jobs", "0"], "--jobs must be at least 1; got 0"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(paper, arguments, sentence, tmp_path, capsys):
    assert call(paper, [*arguments, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.removeprefix("study.py: ").removeprefix("error: ").startswith(sentence)


def test_the_grid_fits_the_rules(paper, grid) -> None:
    """Starts lie on the lattice, curves end with the training, and every name is there."""
    for name, task in grid["tasks"].items():
        assert task["steps"] % task["window"] == 0, name
        assert all(step % task["window"] == 0 for step in task["validation_at"]), name
        assert task["validation_at"][-1] == task["steps"], name
    assert grid["tuning_seed"] not in grid["test_seeds"]
    for question in grid["questions"]:
        for task in question["tasks"]:
            for cell in paper.cells.cells_of(question, grid, task):
                if cell.method != "frozen":
                    start = grid["methods"][cell.method]["start"][str(cell.rank)]
                    paper.rates.index_of(start, grid["lattice_base"])
        assert len(grid["test_seeds"]) >= question["seeds"]
