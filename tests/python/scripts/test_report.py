"""benchmarks/paper/report.py: the analysis finds what was planted, the page says what is there."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import REPOSITORY
from paper_lines import LOSS, frozen_line, line_of, planted, runs_at_start, small_grid, tuning_of
from paper_modules import PAPER, imported

RESULTS = REPOSITORY / "benchmarks/results/paper"
UNDER_WAY = 20  # lines that a study which runs meanwhile may be ahead of the page
MODULES = ("comparison", "page", "paired", "picture", "report", "tables")
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def paper() -> Iterator[Any]:
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def whole_grid() -> dict[str, Any]:
    return json.loads((PAPER / "grid.json").read_text())


@pytest.fixture(scope="module")
def grid(whole_grid) -> dict[str, Any]:
    """One task at one rank."""
    return small_grid(whole_grid, "shakespeare")


def setting_of(paper: Any, grid: dict[str, Any], lines: Lines) -> Any:
    (setting,) = paper.comparison.settings_of(lines, grid)
    return setting


def compared(setting: Any, method: str) -> Any:
    return next(one for one in setting.comparisons if one.method.cell.method == method)


def report_of(paper: Any, grid: dict[str, Any], lines: Lines, times: Any = None) -> Any:
    return paper.report.Report(grid, {"shakespeare": lines}, times)


def two_methods(grid: dict[str, Any], lora: list[float], other: list[float]) -> Lines:
    """Return the lines of LoRA and bs 3 with these test losses for the seeds 1, 2, ..."""
    lines = [frozen_line()]
    for method, losses in (("lora", lora), ("bs 3", other)):
        lines += tuning_of(method, 2, grid)
        lines += runs_at_start(method, 2, grid, dict(enumerate(losses, 1)))
    return lines


FIVE = [3.80, 3.70, 3.90, 3.75, 3.85]


# ---- What was planted is found, and nothing else


def test_a_planted_difference_is_found(paper, grid) -> None:
    draw = random.Random(1)
    verdicts = []
    for _ in range(100):
        lines = planted(grid, {"bs 3": -0.03, "dora": 0.03}, draw)
        setting = setting_of(paper, grid, lines)
        assert setting.signal == "signal"
        verdicts += [compared(setting, "bs 3").verdict, compared(setting, "dora").verdict]
        assert compared(setting, "bs 3").interval.mean == pytest.approx(-0.03, abs=0.015)
    # The effect is about seven standard deviations of a difference: it is hardly ever missed.
    assert verdicts[::2].count("better") >= 98
    assert verdicts[1::2].count("worse") >= 98


def test_no_difference_is_found_in_noise(paper, grid) -> None:
    """1,000 studies of nine methods without an effect.

    The bounds are five standard deviations of the Monte Carlo error away. Intervals by the normal
    distribution would cover in 88 %, and p values without Holm find something in 31 %.
    """
    draw = random.Random(2)
    studies, covered, found, first = 1000, 0, 0, 0
    for _ in range(studies):
        setting = setting_of(paper, grid, planted(grid, {}, draw))
        intervals = [one.interval for one in setting.comparisons]
        covered += sum(one.low <= 0 <= one.high for one in intervals)
        first += intervals[0].low <= 0 <= intervals[0].high
        found += any(one.verdict != "no difference found" for one in setting.comparisons)
    error = math.sqrt(0.05 * 0.95 / studies)
    assert abs(first / studies - 0.95) < 5 * error  # independent studies
    assert abs(covered / studies / 9 - 0.95) < 5 * error  # nine share a LoRA: at most such an error
    assert found / studies <= 0.05 + 5 * error


def test_seeds_are_paired(paper, grid) -> None:
    """Seeds differ by more than methods do: means alone would hide what every seed shows."""
    other = [
        loss - 0.02 + wobble for loss, wobble in zip(FIVE, (0, 1e-3, -1e-3, 0, 0), strict=True)
    ]
    lines = two_methods(grid, FIVE, other)
    random.Random(0).shuffle(lines)  # the order of the lines says nothing
    one = compared(setting_of(paper, grid, lines), "bs 3")
    assert one.interval.mean == pytest.approx(-0.02)
    assert one.interval.high < -0.018 and one.corrected < 0.01 and one.verdict == "better"
    assert paper.tables.won_and_lost(one) == "5, 0"
    apart = [paper.paired.interval(values) for values in (FIVE, other)]
    assert apart[0].low < apart[1].high and apart[1].low < apart[0].high
    assert abs(apart[0].mean - apart[1].mean) < (apart[0].high - apart[0].low) / 4


def test_less_error_is_better_where_accuracy_counts(paper, whole_grid) -> None:
    grid = small_grid(whole_grid, "sst2")
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE])
    lines = [line | {"task": "sst2"} for line in lines if line["method"] != "frozen"]
    head = tuning_of("head", 0, grid) + runs_at_start("head", 0, grid, dict(enumerate(FIVE, 1)))
    lines += [line | {"task": "sst2"} for line in head]
    setting = setting_of(paper, grid, lines)
    assert compared(setting, "bs 3").interval.mean == pytest.approx(-0.2)  # points of error
    assert setting.mean_of(setting.reference) == pytest.approx(38.0)
    assert setting.signal == "no signal"  # LoRA is as good as the head alone


# ---- Missing cells


def test_missing_cells_and_seeds_are_said_and_have_no_verdict(paper, grid) -> None:
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE[:3]])
    lines += tuning_of("is", 2, grid)
    setting = setting_of(paper, grid, lines)
    one = compared(setting, "bs 3")
    assert one.interval.mean == pytest.approx(-0.02)
    assert (one.verdict, one.p_value, one.corrected) == (None, None, None)
    table = paper.page.main_table([setting]).splitlines()
    rows = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in table[2:]}
    assert rows["`bs 3`"] == "-0.0200 (-0.0200 to -0.0200), 3 of 5 seeds"
    assert rows["`is`"] == "rate found, 0 of 5 seeds"
    assert rows["`dora`"] == "missing"
    assert rows["LoRA, tuned"].startswith("3.8000 (") and rows["LoRA, tuned"].endswith(", 5 seeds")
    answer = paper.page.answer([setting], lines, grid)
    assert answer.startswith("It is not known yet: no shortcut has been compared with tuned LoRA")
    assert (
        "Of 11 planned cells (a method on a task at a rank) 2 are complete, 2 begun and 7" in answer
    )


def test_one_seed_has_no_interval(paper, grid) -> None:
    one = compared(setting_of(paper, grid, two_methods(grid, FIVE, [3.79])), "bs 3")
    assert one.interval is None and one.verdict is None
    assert paper.tables.difference_text(one, "loss") == "-0.0100, 1 of 5 seeds"


def test_methods_that_have_not_been_run_count_for_holm(paper, grid) -> None:
    draw = random.Random(3)
    lines = planted(grid, {"bs 3": -0.03}, draw)
    alone = [line for line in lines if line["method"] in ("lora", "bs 3", "frozen")]
    one, same = (compared(setting_of(paper, grid, part), "bs 3") for part in (lines, alone))
    assert one.p_value == same.p_value
    assert same.corrected == pytest.approx(9 * same.p_value)
    assert one.corrected == pytest.approx(9 * one.p_value)  # the smallest of nine


def test_without_lines_the_report_says_so(paper, whole_grid) -> None:
    report = paper.report.Report(whole_grid, {}, None)
    page = report.page((PAPER / "README.md").read_text())
    assert "It is not known yet" in page and "nothing could be said yet either" in page
    assert "Of 63 planned cells (a method on a task at a rank) 0 are complete, 0 begun" in page
    assert "for 6 this has not been run" in page and "There are no runs yet." in page
    assert "Nothing has been run of: shakespeare r 2, shakespeare r 8, gsm8k r 2" in report.details


# ---- Rates


def test_a_method_is_compared_at_its_tuned_rate_alone(paper, grid) -> None:
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE])
    elsewhere = [
        line_of("bs 3", 2, 0.024, seed, "test", 1.0) for seed in grid["test_seeds"]
    ]  # as if the rule had once found another rate
    setting = setting_of(paper, grid, lines + elsewhere)
    one = compared(setting, "bs 3")
    assert one.interval.mean == pytest.approx(-0.02) and len(one.differences) == 5
    details = paper.tables.details([setting], grid, None)
    assert (
        "`bs 3` has 10 test runs at other rates than the tuned one, which are left out" in details
    )


def test_a_best_rate_at_an_edge_is_said_and_not_compared(paper, grid) -> None:
    lines = two_methods(grid, FIVE, FIVE)
    for line in lines:
        if line["method"] == "bs 3" and line["phase"] == "tune" and line["rate"] == 0.024:
            line["validation"] = {"loss": 1.0, "accuracy": 0.0}
    setting = setting_of(paper, grid, lines)
    one = compared(setting, "bs 3")
    assert one.method.is_at_edge and one.method.rate is None
    assert one.verdict is None and one.differences == {}
    details = paper.tables.details([setting], grid, None)
    assert "the best rate of `bs 3` so far is at an edge of those tried" in details
    assert "rate not found yet (5 runs, the best so far at an edge)" in paper.page.main_table(
        [setting]
    )


def test_one_rate_stands_for_the_papers_protocol(paper, grid) -> None:
    """At LoRA's rate bs 3 is ahead, at its own it is behind."""
    lines = two_methods(grid, FIVE, [loss + 0.02 for loss in FIVE])
    for line in lines:
        if line["method"] == "bs 3" and line["phase"] == "tune" and line["rate"] == 0.012:
            line["validation"] = {"loss": 3.65, "accuracy": 0.0}
    setting = setting_of(paper, grid, lines)
    one = compared(setting, "bs 3")
    assert one.one_rate == (0.012, pytest.approx(-0.05)) and one.verdict == "worse"
    assert compared(setting, "is").one_rate is None
    answer = paper.page.answer([setting], lines, grid)
    assert "called the method better than LoRA in 1 of 1 of these comparisons" in answer
    assert "all seeds confirm 0, and would have missed 0 gains" in answer

    lost = [line for line in lines if (line["method"], line["rate"]) != ("bs 3", 0.012)]
    rate, difference = compared(setting_of(paper, grid, lost), "bs 3").one_rate
    assert rate == 0.00848528 and difference == 0.0  # of those left LoRA's best, the lower of two


# ---- Runs that diverged, lines that are there twice


def diverged(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"diverged": True, "validation": None, "test": None, "validation_curve": []}


def test_a_method_that_diverges_is_worse(paper, grid) -> None:
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE])
    lines[-1] = diverged(lines[-1])
    setting = setting_of(paper, grid, lines)
    one = compared(setting, "bs 3")
    assert (one.verdict, one.diverged, one.interval) == ("worse", 1, None)
    assert paper.tables.won_and_lost(one) == "4, 1"
    report = report_of(paper, grid, lines)
    assert "**diverged in 1, 5 seeds: worse**" in paper.page.main_table([setting])
    assert "1 of 21 diverged" in report.page((PAPER / "README.md").read_text())
    assert "nan" not in report.details.lower().replace("beginning", "")


def test_nan_counts_as_diverged(paper, grid) -> None:
    lines = two_methods(grid, FIVE, FIVE)
    lines[-1] = lines[-1] | {"test": {"loss": math.nan, "accuracy": 0.0}}
    assert compared(setting_of(paper, grid, lines), "bs 3").verdict == "worse"


def test_nothing_is_said_where_lora_itself_diverges(paper, grid) -> None:
    lines = two_methods(grid, FIVE, FIVE)
    place = next(n for n, line in enumerate(lines) if line["phase"] == "test" and line["rank"])
    lines[place] = diverged(lines[place])
    setting = setting_of(paper, grid, lines)
    one = compared(setting, "bs 3")
    assert (one.verdict, one.p_value, setting.signal) == (None, None, "no signal")
    assert paper.tables.difference_text(one, "loss") == "LoRA diverged, 5 seeds"


def test_a_tuning_run_that_diverged_is_no_rate(paper, grid) -> None:
    lines = two_methods(grid, FIVE, FIVE)
    high = [n for n, line in enumerate(lines) if line["rate"] > 0.012]
    for place in high:
        lines[place] = diverged(lines[place])
    setting = setting_of(paper, grid, lines)
    assert setting.reference.rate == 0.012 and not setting.reference.is_at_edge
    assert [rate for rate, _ in paper.picture.points_of([setting], grid)[0]["tuning"]["lora"]] == [
        0.006,
        0.00848528,
        0.012,
    ]


def test_of_lines_of_one_run_the_first_counts(paper, grid) -> None:
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE])
    again = [line | {"test": {"loss": 1.0, "accuracy": 0.9}} for line in lines if line["test"]]
    report = report_of(paper, grid, lines + again)
    (setting,) = report.settings
    assert compared(setting, "bs 3").interval.mean == pytest.approx(-0.02)
    page = report.page((PAPER / "README.md").read_text())
    assert "11 lines of a run that was there already left out" in page


# ---- Whether a task counts


@pytest.mark.parametrize(
    ("base", "signal"),
    [(5.0, "signal"), (3.81, "no signal"), (3.5, "no signal"), (None, "not run")],
)
def test_a_task_counts_where_lora_beats_the_base(paper, grid, base, signal) -> None:
    lines = two_methods(grid, FIVE, [loss - 0.02 for loss in FIVE])[1:]
    lines += [] if base is None else [frozen_line(base)]
    setting = setting_of(paper, grid, lines)
    assert setting.signal == signal
    finding = paper.page.answer([setting], lines, grid).splitlines()[0]
    assert ("a gain was found in 1 of these (`bs 3` better in 1 of 1" in finding) == (
        signal == "signal"
    )
    assert ("It is not known yet" in finding) == (signal != "signal")
    wins = paper.tables.details([setting], grid, None).partition("## Wins")[2]
    assert ("| `bs 3` | 1, 0, 0, 0 |" in wins) == (signal == "signal")


def test_no_gain_is_said_with_what_may_hide(paper, grid) -> None:
    differences = (0.002, -0.002, 0.001, -0.001, 0)
    other = [loss + more for loss, more in zip(FIVE, differences, strict=True)]
    lines = two_methods(grid, FIVE, other)
    setting = setting_of(paper, grid, lines)
    finding = paper.page.answer([setting], lines, grid).splitlines()[0]
    assert "1 of 4 planned comparisons of a shortcut with tuned LoRA is complete" in finding
    assert "no gain was found (neither better nor worse anywhere `bs 3`; where" in finding
    room = 100 * 2.7764 * math.sqrt(10e-6 / 4 / 5) / LOSS
    assert f"a gain of up to {room:.2g} % may hide" in finding
    details = paper.tables.details([setting], grid, None)
    assert "where the interval covers zero, 10 seeds are due: `bs 3`" in details


def test_more_parameters_are_marked(paper, grid) -> None:
    setting = setting_of(paper, grid, planted(grid, {"lora 2r": -0.05}, random.Random(4)))
    marked = [one.method.cell.method for one in setting.comparisons if one.has_more_parameters]
    assert marked == ["lora 2r"]
    table = paper.page.main_table([setting])
    assert "| `lora 2r` † | **-0.0" in table and table.endswith(
        "† trains more parameters than LoRA of this rank."
    )
    assert "| `lora 2r` † | 2.00 x |" in paper.tables.details([setting], grid, None)


# ---- Steps and time


def test_steps_to_a_loss_go_straight_between_points(paper) -> None:
    line = {"validation_curve": [[100, 4.0], [200, 3.0], [300, 3.5], [400, 2.0]]}
    steps = {
        target: paper.comparison.steps_to(line, target) for target in (4.5, 3.25, 3.0, 2.75, 1)
    }
    assert steps == {4.5: 100, 3.25: 175, 3.0: 200, 2.75: 350, 1: math.inf}


def test_steps_and_time_to_loras_loss(paper, grid) -> None:
    """A loss that ends 0.05 lower crosses LoRA's last halfway from 300 to 600 steps."""
    lines = two_methods(grid, FIVE, [loss - 0.05 for loss in FIVE])
    setting = setting_of(paper, grid, lines)
    assert compared(setting, "bs 3").steps == pytest.approx(dict.fromkeys(range(1, 6), 450))
    times = {
        "settings": {"pre_num": {"is": 1, "bs": 3, "ms": -1}},
        "results": {
            "steps": {n: {"ratio": {"median": r}} for n, r in (("peft", 1.5), ("bs", 1.2))}
        },
    }
    details = paper.tables.details([setting], grid, times)
    row = next(line for line in details.splitlines() if line.startswith("| `bs 3`"))
    assert row.endswith("| 450 of 600 (5 of 5 seeds) | 0.60 |")
    ratios = {
        name: paper.tables.step_ratio(grid["methods"][name], times) for name in grid["methods"]
    }
    known = {name: ratio for name, ratio in ratios.items() if ratio}
    assert known == {"lora": 1.5, "lora 2x alpha": 1.5, "lora+": 1.5, "bs 3": 1.2}

    worse = two_methods(grid, FIVE, [loss + 0.05 for loss in FIVE])
    details = paper.tables.details([setting_of(paper, grid, worse)], grid, times)
    assert "| not reached (0 of 5 seeds) |  |" in details


# ---- The program


def call(paper: Any, folder: Path, *arguments: str) -> int:
    return paper.report.main(
        ["--results", str(folder), "--page", str(folder / "page.md"), *arguments]
    )


@pytest.fixture
def folder(tmp_path, grid) -> Path:
    lines = planted(grid, {"bs 3": -0.03}, random.Random(5))
    (tmp_path / "shakespeare.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    shutil.copy(PAPER / "README.md", tmp_path / "page.md")
    return tmp_path


def test_a_written_report_is_fresh_until_it_is_changed(paper, folder, grid) -> None:
    pytest.importorskip("matplotlib")
    assert call(paper, folder, "--check") == 1 or not (folder / "tables.md").exists()
    assert call(paper, folder) == 0
    assert call(paper, folder, "--check") == 0
    with (folder / "shakespeare.jsonl").open("a") as file:  # a study that runs meanwhile
        file.write(json.dumps(line_of("lora", 8, 0.012, 1000, "tune", 3.0)) + "\n")
    assert call(paper, folder, "--check") == 0
    for name in ("page.md", "tables.md", "differences.svg"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r"(\d)(\d)(\d)", r"\3\1\2", text))
        assert call(paper, folder, "--check") == 1, name
        (folder / name).write_text(text)
    assert call(paper, folder, "--check") == 0
    assert call(paper, folder) == 0
    assert "<!-- 102 lines of shakespeare -->" in (folder / "page.md").read_text()


def test_the_picture_is_small_and_the_same_each_time(paper, folder) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for _ in range(2):
        assert call(paper, folder) == 0
        pictures.append((folder / "differences.svg").read_bytes())
    assert pictures[0] == pictures[1] and len(pictures[0]) < 60_000
    assert b"bs 3" in pictures[0] and b"shakespeare r 2 (signal)" in pictures[0]


def test_without_matplotlib_nothing_is_written(paper, folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call(paper, folder) == 2
    assert capsys.readouterr().err == (
        "report.py: the picture needs matplotlib: pip install matplotlib\n"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_page_shows_the_lines_that_are_there(paper) -> None:
    script = PAPER / "report.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
    counts = paper.report.COUNT.findall((PAPER / "README.md").read_text())
    assert len(counts) == 3
    for count, task in counts:
        path = RESULTS / f"{task}.jsonl"
        there = path.read_text().count("\n") if path.exists() else 0
        assert there - int(count) <= UNDER_WAY, f"report.py has not seen the last lines of {task}"
