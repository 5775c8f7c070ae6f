"""Saves an adapter again and again, and dies, stops or fails at each change of the disk in turn.

    LD_PRELOAD=die_at.so python crash_program.py CASE FOLDER STEP

Prints a line for each point at which the folder did not hold the old or the new adapter, whole, and
how many points there were. STEP is 1 for every point, 5 for every fifth. CASE "writers" lets two
processes save to one folder, STEP times, while a third one reads it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import adapted, randomize
from torch import nn

import reslora
from reslora.injection.adapted import find_layers, injection_of

KINDS = {"dies": 0, "stops": 1, "fails": errno.EIO}
LIMIT = 400  # points; a save has far fewer
shim = ctypes.CDLL(os.environ["LD_PRELOAD"])


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))


def made(seed: int, alpha: int = 4, norms: bool = False, r: int = 2) -> nn.Module:
    """Return an adapted model with values of its own, and norms where they are wanted."""
    torch.manual_seed(seed)
    model = randomize(adapted(base(), r=r, lora_alpha=alpha, target_modules="all-linear"))
    if norms:
        model.train()(torch.randn(5, 4)).sum().backward()
    return model


def content(folder: Path) -> tuple[object, ...] | None:
    """Return what a folder gives to a plain model, None where there is no adapter."""
    try:
        model = reslora.load(base(), folder)
    except FileNotFoundError:
        return None
    layers = find_layers(model)
    factors = [(x.reslora_A.tolist(), x.reslora_B.tolist()) for x in layers]
    norms = [None if x.norms is None else x.norms.tolist() for x in layers]
    config = injection_of(model, "test").config
    return factors, norms, config.lora_alpha, config.r


Save = Callable[[Path], None]


def saves(model: nn.Module, statistics: bool) -> Save:
    return lambda folder: reslora.save_pretrained(model, folder, statistics=statistics)


# What is there before, and what is saved over it.
CASES: dict[str, tuple[Save | None, Save]] = {
    "first": (None, saves(made(1, norms=True), True)),
    "alpha": (saves(made(1), False), saves(made(1, alpha=16), False)),
    "statistics over none": (saves(made(1), False), saves(made(2, norms=True), True)),
    "none over statistics": (saves(made(1, norms=True), True), saves(made(2), False)),
    "statistics": (saves(made(1, norms=True), True), saves(made(2, alpha=2, norms=True), True)),
    "rank": (saves(made(1, norms=True), True), saves(made(2, r=3), False)),
}


def outcome(save: Save, folder: Path, call: int, kind: int) -> tuple[int, int]:
    """Save in a process of its own. Return its id where it stopped, else 0, and its exit code."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            shim.die_at(os.fspath(folder).encode(), call, kind)
            save(folder)
            code = 0 if shim.calls_left() >= 0 else 4
        except OSError:
            code = 5
        finally:
            os._exit(code)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return child, -1
    return 0, os.waitstatus_to_exitcode(status)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")] if folder.is_dir() else []


def check(case: str, folder: Path, kind: str, step: int) -> int:
    """Print what is wrong at a point; return how many points there are."""
    before, save = CASES[case]
    template, place = folder / "template", folder / "adapter"
    if before is not None:
        before(template)
    old = content(template)
    save(folder / "new")
    new = content(folder / "new")
    for call in range(0, LIMIT, step):
        shutil.rmtree(place, ignore_errors=True)
        if before is not None:
            shutil.copytree(template, place)
        child, code = outcome(save, place, call, KINDS[kind])
        if code == 0 and not child:
            return call
        found = content(place)
        if found not in (old, new):
            print(f"{case}: {kind} at call {call}: neither the old nor the new adapter")
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if content(place) not in (old, new):
                print(f"{case}: {kind} at call {call}: torn once the writer was killed")
        save(place)
        if content(place) != new or leftovers(place):
            print(f"{case}: {kind} at call {call}: the next save left {leftovers(place)}")
    return LIMIT


def meet(folder: Path, rounds: int) -> None:
    """Let two processes save to one folder at once; print what a reader beside them got wrong."""
    ways = (saves(made(1, norms=True), True), saves(made(2, alpha=16, r=3), False))
    known: list[object] = []
    for number, save in enumerate(ways):
        save(folder / str(number))
        known.append(content(folder / str(number)))
    place = folder / "adapter"
    for number in range(rounds):
        children = [fork_to_save(save, place) for save in ways]
        while children:
            found = content(place)
            if found not in (None, *known) or (number and found is None):
                print(f"round {number}: a reader got a mix of both")
            children = [child for child in children if not has_ended(child)]
        if content(place) not in known or leftovers(place):
            print(f"round {number}: the folder holds a mix, or {leftovers(place)}")


def fork_to_save(save: Save, place: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            save(place)
            code = 0
        finally:
            os._exit(code)
    return child


def has_ended(child: int) -> bool:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended and status:
        print(f"a writer failed: {os.waitstatus_to_exitcode(status)}")
    return bool(ended)


def main(case: str, folder: Path, step: int) -> None:
    warnings.simplefilter("ignore")
    if case == "writers":
        meet(folder, step)
        return
    for kind in KINDS:
        own = folder / kind
        own.mkdir()
        print(f"points {kind} {check(case, own, kind, step)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
