"""benchmarks/gpu.sh on machines of stand-ins: what it takes as it is, and what it asks pip for."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

import pytest
from machine import PYTHON, Machine, copy_of_checkout

# Importing pip would let setuptools take the distutils of the standard library from then on.
PIP = Path(sysconfig.get_path("purelib")) / "pip"
# Sees a GPU, and has the packages whose metadata lie in ~/site.
WITH_GPU = f"""#!/bin/bash
case "$*" in
  *is_available*) exit 0 ;;
  tests/lacking.py*) PYTHONPATH=$HOME/site exec {sys.executable} -S "$@" ;;
esac
{PYTHON}"""
# In the ranges of pyproject.toml, and other versions than those of tests/constraints.txt.
AT_HAND = {
    "cmake": "3.31.0", "numpy": "2.1.0", "peft": "0.18.0", "pytest": "8.0.0",
    "torch": "2.11.0+cu130", "tqdm": "4.66.0", "transformers": "4.57.0", "Jinja2": "3.0.0",
}  # fmt: skip


class GpuMachine(Machine):
    """A machine with a GPU, and a checkout to measure."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.checkout = copy_of_checkout(folder / "checkout")
        self.program("python3", WITH_GPU)
        self.program("nvidia-smi", "#!/bin/sh\n")

    def measure(
        self, packages: dict[str, str], *arguments: str, **variables: str
    ) -> tuple[int, str, str]:
        """Run gpu.sh where the interpreter at hand has these packages."""
        site = self.home / "site"
        site.mkdir()
        (site / "pip").symlink_to(PIP)
        for name, version in packages.items():
            place = site / f"{name}-{version}.dist-info"
            place.mkdir()
            (place / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        return self.run(self.checkout / "benchmarks/gpu.sh", "bash", *arguments, **variables)

    def given_to_pip(self, name: str) -> list[str]:
        """Return the lines of a file that pip was given."""
        return (self.checkout / "build" / name).read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> GpuMachine:
    return GpuMachine(tmp_path)


def test_what_is_at_hand_is_taken_and_pip_is_asked_for_nothing(machine: GpuMachine) -> None:
    code, printed, errors = machine.measure(AT_HAND, "--minutes", "9")
    assert code == 0, errors
    own = rf"--started [\d.]+ --base {machine.folder}"  # it is started there
    assert re.fullmatch(rf"ran benchmarks/gpu/run\.py {own} --minutes 9\n", printed)
    assert errors == f"gpu.sh: taking torch and all else that {machine.bin}/python3 has\n"
    assert machine.asked("-m pip") == machine.asked("-m venv") == 0


def test_packages_that_pythonpath_names_stay_at_hand(machine: GpuMachine) -> None:
    machine.program("python3", WITH_GPU.replace('echo "ran $*"', 'echo "with $PYTHONPATH"'))
    assert machine.measure(AT_HAND, PYTHONPATH="/carried")[1] == "with /carried\n"


def test_an_interpreter_without_pip_is_taken_as_it_is(machine: GpuMachine) -> None:
    (machine.home / "no pip").mkdir()
    machine.program("python3", WITH_GPU.replace("$HOME/site", '"$HOME/no pip"'))
    code, printed, _ = machine.measure(AT_HAND)
    assert (code, printed.split()[:2]) == (0, ["ran", "benchmarks/gpu/run.py"])
    assert machine.asked("-m pip") == 0


def test_a_trial_on_the_cpu_asks_for_no_gpu(machine: GpuMachine) -> None:
    (machine.bin / "nvidia-smi").unlink()
    code, printed, _ = machine.measure(AT_HAND, "--device", "cpu", "--scale", "16")
    assert (code, printed.split()[-4:]) == (0, ["--device", "cpu", "--scale", "16"])


def test_pip_is_asked_for_what_is_absent_and_may_replace_nothing(machine: GpuMachine) -> None:
    packages = {k: v for k, v in AT_HAND.items() if k != "peft"} | {"transformers": "4.40.0"}
    code, _, errors = machine.measure(packages)
    assert code == 0, errors
    assert errors.splitlines()[1:] == [
        "gpu.sh: installing what is absent there: peft>=0.18,<1 transformers>=4.56,<6"
    ]
    assert machine.given_to_pip("requirements.txt") == [
        "peft>=0.18,<1",
        "transformers>=4.56,<6",
    ]
    assert machine.asked("--retries 1 --timeout 10") == 1  # where there is no network, seconds
    bounded = {line.split("==")[0] for line in machine.given_to_pip("bounds.txt")}
    assert {"peft", "accelerate"} < bounded
    assert bounded.isdisjoint({"torch", "numpy", "jinja2"})


def test_programs_serve_in_place_of_packages(machine: GpuMachine) -> None:
    machine.program("cmake", "#!/bin/sh\necho cmake version 3.25.1\n")
    packages = {k: v for k, v in AT_HAND.items() if k != "cmake"}
    assert machine.measure(packages)[0] == 0
    assert machine.asked("-m pip install") == 0


def test_what_pip_cannot_install_is_said_and_the_rest_is_measured(machine: GpuMachine) -> None:
    packages = {k: v for k, v in AT_HAND.items() if k != "tqdm"}
    code, printed, errors = machine.measure(packages, STUB_PIP="echo no network >&2; exit 1")
    assert (code, printed.split()[:2]) == (0, ["ran", "benchmarks/gpu/run.py"])
    assert errors.splitlines()[1:] == [
        "gpu.sh: installing what is absent there: tqdm",
        "no network",
        "gpu.sh: pip could not install that, its words say why; what needs it is left out",
    ]


def test_a_torch_that_is_too_old_is_left_alone(machine: GpuMachine) -> None:
    code, printed, errors = machine.measure(AT_HAND | {"torch": "2.9.0"})
    assert code == 0, errors
    assert "gpu.sh: making a virtual environment in .venv-gpu" in errors
    assert printed.startswith("ran benchmarks/gpu/run.py")
