"""What the quickstart answers before it installs anything, on a machine that has only Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine import QUICKSTART, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def ask(machine: Machine, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run it with arguments; nothing may be installed, or left, by what it answers."""
    before = sorted(machine.folder.rglob("*"))
    answer = machine.run(QUICKSTART, "bash", *arguments, **variables)
    assert machine.asked("-m ") == 0
    left = set(machine.folder.rglob("*")) - {machine.home / ".cache", machine.cache}
    assert sorted(left) == before
    return answer


@pytest.mark.parametrize("home", [{}, {"HOME": "/proc/nowhere"}])
def test_help_is_printed_first(machine: Machine, home: dict[str, str]) -> None:
    machine.program("df", "#!/bin/sh\necho Avail\necho 0\n")
    code, printed, errors = ask(machine, "--res-mode", "is", "--help", **home)
    assert (code, errors) == (0, "")
    assert printed.startswith("usage: quickstart ") and "--pretrain-steps" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "4"], "unrecognized arguments: --rank 4"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--data", "no file.txt"], "--data must name a text file; got 'no file.txt'"),
        (["--model", "../none"], "--model must name a folder or a model of the Hub; no folder '"),
        (["--model", "dangling"], "--model must name a folder or a model of the Hub; no folder '"),
        (["--output", "/proc/out"], "--output must be a folder that can be written to; got '/pr"),
        (["--cache", "/proc/out"], "--cache must be a folder that can be written to; got '/proc"),
    ],
)
def test_a_bad_request_is_refused_first(
    machine: Machine, arguments: list[str], sentence: str
) -> None:
    (machine.folder / "dangling").symlink_to("nowhere")
    code, printed, errors = ask(machine, *arguments)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"quickstart: {sentence}") and errors.count("\n") == 1


def test_a_good_request_goes_on_with_its_arguments(machine: Machine) -> None:
    arguments = ["--model", "user/name", "--output", "my results"]
    code, printed, errors = machine.run(QUICKSTART, "bash", *arguments)
    assert code == 0, errors
    assert printed.endswith("finetune.py --model user/name --output my results\n")
    assert not (machine.folder / "my results").exists()
