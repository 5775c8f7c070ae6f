"""Saves an adapter again and again, and dies, stops or fails at each change of the disk in turn.

    LD_PRELOAD=die_at.so python crash_program.py CASE FOLDER STEP

Prints a line for each point at which the folder did not hold the old or the new adapter, whole, and
how many points there were. STEP is 1 for every point, 5 for every fifth. CASE "writers" lets two
processes save to one folder, STEP times, while a third one reads it. CASE "recovery" lets whoever
reads a folder after a crash die too, at each of its own changes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from cpp_programs import build_folder
from models import adapted, randomize
from safetensors.torch import load_file, save_file
from torch import nn

import reslora
from reslora.files.model_folder import merge_folder
from reslora.injection.adapted import find_layers, injection_of

KINDS = {"dies": 0, "stops": 1, "fails": errno.EIO}
stopped: list[int] = []  # writers that were stopped and live
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


Content = tuple[object, ...] | None


def content(folder: Path) -> Content:
    """Return what a folder gives to a plain model, None where there is no adapter."""
    try:
        model = reslora.load(base(), folder)
    except FileNotFoundError:
        return None
    layers = find_layers(model)
    factors = [(x.reslora_A.tolist(), x.reslora_B.tolist()) for x in layers]
    norms = [None if x.norms is None else x.norms.tolist() for x in layers]
    config = injection_of(model, "test").config
    return factors, config.lora_alpha, config.r, norms


def content_by_peft(folder: Path) -> Content:
    """Return what a folder gives by PeftModel.from_pretrained, "told" where it says it changed."""
    from peft import PeftModel

    import reslora.peft  # noqa: F401

    try:
        model = PeftModel.from_pretrained(base(), folder)
    except ValueError as error:
        if "Can't find 'adapter_config.json'" in str(error):
            return None
        raise
    except RuntimeError as error:
        if "options and weights must be of one save" in str(error):
            return ("told",)
        raise
    layers = find_layers(model)
    factors = [(x.reslora_A.tolist(), x.reslora_B.tolist()) for x in layers]
    config = injection_of(model, "test").config
    return factors, config.lora_alpha, config.r


def content_of_export(folder: Path) -> Content:
    """Return a plain LoRA, as PEFT reads it: "told" where its two files do not fit each other."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config.is_file() and weights.is_file()):
        return None
    options = json.loads(config.read_text())
    tensors = load_file(weights)
    if any(options["r"] != x.shape[0] for key, x in tensors.items() if ".lora_A." in key):
        return ("told",)  # which PEFT refuses
    return options["r"], options["lora_alpha"], [tensors[key].tolist() for key in sorted(tensors)]


def content_of_merge(folder: Path) -> Content:
    """Return all files of a merged model, None where the folder is not there."""
    if not folder.exists():
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return tuple(sorted((path.name, path.read_bytes()) for path in files))


Read = Callable[[Path], Content]
Save = Callable[[Path], object]


def saves(model: nn.Module, statistics: bool) -> Save:
    return lambda folder: reslora.save_pretrained(model, folder, statistics=statistics)


def peft_saves(seed: int, alpha: int = 4, r: int = 2) -> Save:
    """Return the plug-in's save."""

    def save(folder: Path) -> None:
        from peft import get_peft_model

        from reslora.peft import ResLoraConfig

        torch.manual_seed(seed)
        config = ResLoraConfig(r=r, lora_alpha=alpha, target_modules=["0", "1", "2"])
        randomize(get_peft_model(base(), config)).save_pretrained(folder)

    return save


def exports(seed: int, r: int = 2) -> Save:
    return lambda folder: reslora.export_lora(made(seed, r=r), folder, merge_method="weight")


def merges(folder: Path) -> None:
    """Merge an adapter into files, where that is not done."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory() as place:
        reslora.save_pretrained(made(1), f"{place}/adapter")
        os.mkdir(f"{place}/base")
        save_file(base().state_dict(), f"{place}/base/model.safetensors")
        Path(f"{place}/base/config.json").write_text("{}")
        merge_folder(f"{place}/base", f"{place}/adapter", folder, "weight")


class CppSave:
    """The save of a C++ program, which takes the place of the process where it is to die."""

    def __init__(self, seed: int, alpha: int = 4, norms: bool = False, r: int = 2) -> None:
        self.program = os.fspath(build_folder() / "tests/reslora_saves")
        self.options = [str(seed), str(alpha), str(int(norms)), str(r)]

    def __call__(self, folder: Path) -> None:
        subprocess.run([self.program, folder, *self.options], check=True)

    def become(self, folder: Path, call: int, kind: int) -> None:
        settings = {**os.environ, "RESLORA_DIE_AT": f"{call} {kind} {folder}"}
        os.execve(self.program, [self.program, os.fspath(folder), *self.options], settings)


# What is there before, and what is saved over it.
CASES: dict[str, tuple[Save | None, Save]] = {
    "first": (None, saves(made(1, norms=True), True)),
    "alpha": (saves(made(1), False), saves(made(1, alpha=16), False)),
    "statistics over none": (saves(made(1), False), saves(made(2, norms=True), True)),
    "none over statistics": (saves(made(1, norms=True), True), saves(made(2), False)),
    "statistics": (saves(made(1, norms=True), True), saves(made(2, alpha=2, norms=True), True)),
    "rank": (saves(made(1, norms=True), True), saves(made(2, r=3), False)),
    "plug-in first": (None, peft_saves(1)),
    "plug-in": (peft_saves(1), peft_saves(2, alpha=16)),
    "plug-in over statistics": (saves(made(1, norms=True), True), peft_saves(2, r=3)),
    "C++ first": (None, CppSave(1, norms=True)),
    "C++": (CppSave(1, norms=True), CppSave(2, alpha=16, r=3)),
    "export first": (None, exports(1)),
    "export": (exports(1), exports(2)),
    "export rank": (exports(1), exports(2, r=3)),
    "merge": (None, merges),
}


def readers(case: str) -> list[Read]:
    """Return what reads a folder at a point, one after the other; the last knows most."""
    if case.startswith("plug-in"):
        return [content_by_peft, content]
    if case.startswith("export"):
        return [content_of_export]
    return [content_of_merge if case == "merge" else content]


def is_right(case: str, child: int, found: Content, known: tuple[Content, ...]) -> bool:
    """Tell whether what was read is known: all of it, or the part that PEFT reads.

    PEFT may find that files do not fit each other: two of a plain LoRA, of which none decides,
    until the next save; options and weights while the writer that stopped between them lives.
    """
    if found == ("told",):
        return case == "export rank" or (case.startswith("plug-in") and child > 0)
    return any(
        found == (own if own is None or found is None else own[: len(found)]) for own in known
    )


def outcome(save: Save, folder: Path, call: int, kind: int) -> tuple[int, int]:
    """Save in a process of its own. Return its id where it stopped, else 0, and its exit code."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if isinstance(save, CppSave):
                save.become(folder, call, kind)
            shim.die_at(os.fspath(folder.parent).encode(), call, kind)
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
    read = readers(case)[-1]
    save(folder / "new")
    known = read(template), read(folder / "new")
    for call in range(0, LIMIT, step):
        shutil.rmtree(place, ignore_errors=True)
        if before is not None:
            shutil.copytree(template, place)
        child, code = outcome(save, place, call, KINDS[kind])
        if code == 0 and not child:
            return call
        if child:
            stopped.append(child)
        for reader in readers(case):
            if not is_right(case, child, reader(place), known):
                print(f"{case}: {kind} at call {call}: {reader.__name__}: neither old nor new")
        if child:
            stopped.remove(child)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if not is_right(case, 0, read(place), known):
                print(f"{case}: {kind} at call {call}: torn once the writer was killed")
        save(place)
        if read(place) != known[1] or leftovers(place):
            print(f"{case}: {kind} at call {call}: the next save left {leftovers(place)}")
    return LIMIT


def check_recoveries(folder: Path, step: int) -> int:
    """Print where a folder is torn once a reader dies while it ends what a dead writer began."""
    before, save = CASES["rank"]
    template, torn, place = folder / "template", folder / "torn", folder / "adapter"
    assert before is not None
    before(template)
    save(folder / "new")
    known = content(template), content(folder / "new")

    def restore(source: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)

    for call in range(0, LIMIT, step):
        restore(template)
        if outcome(save, place, call, KINDS["dies"])[1] == 0:
            return call
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(place, torn)
        for again in range(LIMIT):
            restore(torn)
            _, code = outcome(content, place, again, KINDS["dies"])
            if content(place) not in known:
                print(f"recovery: a save died at call {call}, a reader at {again}: torn")
            if code == 0:
                break
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
    if case == "recovery":
        print(f"points dies {check_recoveries(folder, step)}")
        return
    for kind in KINDS:
        own = folder / kind
        own.mkdir()
        try:
            print(f"points {kind} {check(case, own, kind, step)}", flush=True)
        finally:
            for child in stopped:  # after an error
                os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
