"""What the scripts say and leave on machines that lack something, made of stand-ins."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from machine import QUICKSTART, REPOSITORY, Machine, copy_of_checkout, wait_for

PIP_PRINTS = """
echo "Collecting torch"
echo "  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (915.3 MB)"
echo "  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)"
echo "Installing collected packages: torch, tqdm"
"""
BUILD_PRINTS = """
for i in 0 1 9 10 11 20; do echo "  [$i/21] Building CXX object src/file.cpp.o"; done
echo "  -- reslora: without CUDA kernels, since no CUDA toolkit was found; put nvcc on PATH"
echo "  [21/21] Linking CXX shared module _C.so"
"""
BUILD_FAILS = """
echo "  [3/21] Building CXX object src/chain.cpp.o"
echo "  FAILED: src/chain.cpp.o"
echo "  chain.cpp:7:1: error: 'x' was not declared in this scope"
exit 1
"""

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def tests_script(tmp_path: Path) -> Path:
    """Return a copy of tests/run.sh: the real one may be what runs this test."""
    return copy_of_checkout(tmp_path / "checkout") / "tests/run.sh"


def environment_of(machine: Machine) -> Path:
    return machine.cache / "venv"


# ---- The plain case


def test_a_first_run_installs_and_builds_and_a_second_one_does_neither(machine: Machine) -> None:
    code, printed, errors = machine.run(STUB_PIP=PIP_PRINTS, STUB_BUILD=BUILD_PRINTS)
    assert code == 0, errors
    assert printed.startswith("ran ") and "finetune.py" in printed
    assert machine.asked("-m pip install") == 2
    assert machine.run()[0] == 0
    assert machine.asked("-m pip install") == 2


def test_progress_is_told_by_count_and_by_large_downloads(machine: Machine) -> None:
    _, _, errors = machine.run(STUB_PIP=PIP_PRINTS, STUB_BUILD=BUILD_PRINTS)
    lines = [line.removeprefix("quickstart: ") for line in errors.splitlines()]
    told = [
        line for line in lines if re.match("downloading|installing [0-9]|compiling|without", line)
    ]
    assert told == [
        "downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (915.3 MB)",
        "installing 2 packages",
        "compiling, 10 of 21",
        "compiling, 20 of 21",
        "without CUDA kernels, since no CUDA toolkit was found; put nvcc on PATH",
        "compiling, 21 of 21",
    ]


def test_other_bounds_install_again(machine: Machine) -> None:
    machine.run()
    assert machine.run(RESLORA_NEWEST="1")[0] == 0
    assert machine.asked("-m pip install --progress-bar") == 2


def test_what_is_installed_is_bounded(machine: Machine, tmp_path: Path) -> None:
    keep = f'shift 2; while [[ $1 != -c ]]; do shift; done; cat "$2" >>{tmp_path}/bounds'
    machine.run(STUB_PIP=keep)
    bounds = (tmp_path / "bounds").read_text()
    assert bounds == (REPOSITORY / "tests/constraints.txt").read_text()
    (tmp_path / "bounds").unlink()
    machine.run(STUB_PIP=keep, RESLORA_NEWEST="1")
    assert (tmp_path / "bounds").read_text() == ""
    (tmp_path / "bounds").unlink()
    machine.run(STUB_PIP=keep, RESLORA_TORCH="torch==2.11.*")
    bounds = (tmp_path / "bounds").read_text()
    assert "transformers==" in bounds and "torch==" not in bounds


def test_every_package_that_the_scripts_name_has_a_bound() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [name for extra in extras.values() for name in extra]
    lines = (REPOSITORY / "tests/constraints.txt").read_text().splitlines()
    bounded = {line.split("==")[0] for line in lines if "==" in line}
    names = {re.match(r"[\w.-]+", r)[0] for r in wanted + project["build-system"]["requires"]}
    assert names - bounded == set()


# ---- What a machine lacks


def test_no_network_is_one_sentence_and_leaves_no_environment(machine: Machine) -> None:
    """Of the real pip, whose index is a port that nobody listens on."""
    real = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    machine.program("python3", real)
    code, _, errors = machine.run(
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1", PIP_CONFIG_FILE="/dev/null"
    )
    assert code == 1
    assert errors.splitlines()[-1] == (
        "quickstart: pip could not reach its package index: a network is needed the first time; "
        f"{machine.cache}/pip.log has its words; run it again to go on"
    )
    assert not environment_of(machine).exists()


def test_what_pip_cannot_install_is_told_in_its_words(machine: Machine) -> None:
    code, _, errors = machine.run(STUB_PIP="echo 'ERROR: [Errno 28] No space left'; exit 1")
    assert code == 1
    assert "ERROR: [Errno 28] No space left" in errors
    assert errors.splitlines()[-1].startswith("quickstart: pip could not install the packages; ")
    assert not environment_of(machine).exists()


def test_no_space_is_said_before_anything_is_made(machine: Machine, tests_script: Path) -> None:
    machine.program("df", "#!/bin/sh\necho Avail\necho 3100000\n")
    code, _, errors = machine.run()
    assert code == 1
    assert errors == (
        f"quickstart: 8 GB are needed in {machine.cache}, for torch and other packages; got 3 GB "
        "free: free some, or name another folder with XDG_CACHE_HOME\n"
    )
    assert not list(machine.cache.iterdir()) and machine.asked("-m ") == 0
    code, _, errors = machine.run(tests_script)
    assert code == 1
    assert errors.startswith("run.sh: 8 GB are needed in ") and errors.endswith("RESLORA_VENV\n")


def test_a_complete_environment_needs_no_space(machine: Machine) -> None:
    machine.run()
    machine.program("df", "#!/bin/sh\necho Avail\necho 100000\n")
    assert machine.run()[0] == 0


def test_missing_packages_are_named_where_nobody_may_install_them(
    machine: Machine, tests_script: Path
) -> None:
    machine.program("id", "#!/bin/sh\necho 1000\n")
    machine.program("apt-get", '#!/bin/sh\necho apt-get "$@" >>"$STUB_LOG"\n')
    for name in ("c++", "g++"):
        (machine.bin / name).unlink()
    code, _, errors = machine.run()
    assert code == 1
    assert errors == (
        "quickstart: these Debian packages are missing: g++; install them with 'sudo apt-get "
        "install g++' and run this again\n"
    )
    code, _, errors = machine.run(tests_script)
    assert code == 1
    assert errors.startswith("run.sh: these Debian packages are missing: g++")
    assert machine.asked("apt-get") == 0
    assert not environment_of(machine).exists()


def test_root_installs_missing_packages(machine: Machine) -> None:
    machine.program("id", "#!/bin/sh\necho 0\n")
    (machine.bin / "c++").rename(machine.bin / "found")
    install = f'case "$*" in *install*) mv {machine.bin}/found {machine.bin}/c++ ;; esac'
    machine.program("mv", f'#!/bin/sh\nexec {shutil.which("mv")} "$@"\n')
    machine.program("apt-get", f'#!/bin/sh\necho apt-get "$@" >>"$STUB_LOG"\n{install}\n')
    code, printed, errors = machine.run()
    assert code == 0 and "ran " in printed
    assert "quickstart: installing g++" in errors.splitlines()
    assert machine.asked("apt-get install") == 1 and machine.asked("apt-get update") == 1


def test_a_failing_apt_shows_its_words(machine: Machine) -> None:
    machine.program("id", "#!/bin/sh\necho 0\n")
    (machine.bin / "c++").unlink()
    machine.program("apt-get", "#!/bin/sh\necho 'E: Unable to locate package g++' >&2\nexit 100\n")
    code, _, errors = machine.run()
    assert code == 1
    assert "E: Unable to locate package g++" in errors
    assert errors.splitlines()[-1].startswith("quickstart: these Debian packages are missing: g++")


def test_an_old_python_is_named_with_its_version(machine: Machine, tests_script: Path) -> None:
    old = '#!/bin/bash\ncase "$*" in *exit*) exit 1 ;; *) echo 3.10.12 ;; esac\n'
    machine.program("python3", old)
    machine.program("id", "#!/bin/sh\necho 1000\n")
    for script, name in ((None, "quickstart"), (tests_script, "run.sh")):
        code, _, errors = machine.run(script) if script else machine.run()
        assert code == 1
        assert errors.startswith(
            f"{name}: Python 3.11 or newer is needed; got 3.10.12 as {machine.bin}/python3: "
        )
        assert errors.count("\n") == 1
    assert not environment_of(machine).exists()


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null/home"])
def test_a_home_that_cannot_be_written_is_one_sentence(machine: Machine, home: str) -> None:
    code, _, errors = machine.run(HOME=home)
    assert code == 1
    assert errors == (
        f"quickstart: {home}/.cache/reslora cannot be written; name another folder with "
        "XDG_CACHE_HOME\n"
    )


def test_the_tests_need_no_home(machine: Machine, tests_script: Path) -> None:
    machine.program("ctest", "#!/bin/sh\necho ctest\n")
    machine.program("git", "#!/bin/sh\n")
    for name in ("ccache", "clang-format", "doxygen", "pkg-config"):
        machine.program(name, "#!/bin/sh\n")
    code, printed, errors = machine.run(tests_script, HOME="/proc/nowhere")
    assert code == 0, errors
    assert "tests/summary.py" in printed


def ask(machine: Machine, words: str, **variables: str) -> str:
    """Return what a line of shell prints after setup.sh was read."""
    line = f"program=test; source {REPOSITORY}/tests/setup.sh; {words}"
    own = {"PATH": str(machine.bin), "HOME": str(machine.home), "STUB_LOG": str(machine.log)}
    done = subprocess.run(
        ["/bin/bash", "-c", line], env=own | variables, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


def test_readme_names_the_packages_that_a_bare_machine_lacks(machine: Machine) -> None:
    (machine.bin / "c++").unlink()
    said = ask(machine, "find_python() { :; }; missing_packages use")
    (line,) = re.findall(r"^sudo apt-get install (.*?) +#", README, re.M)
    assert {*said.split(), "git"} == set(line.split())


def test_a_compiler_may_come_with_options(machine: Machine) -> None:
    assert ask(machine, "missing_packages use", CXX="g++ -m64") == ""
    assert ask(machine, "missing_packages use", CXX="nowhere -m64") == "g++\n"


def test_an_interpreter_may_have_a_space_in_its_path(machine: Machine) -> None:
    place = machine.home / "my py"
    place.mkdir()
    (machine.bin / "python3").rename(place / "python3")
    assert ask(machine, "find_python", PYTHON=str(place / "python3")) == f"{place}/python3\n"


def test_a_wrong_interpreter_is_named(machine: Machine) -> None:
    code, _, errors = machine.run(PYTHON="/nowhere/python")
    assert code == 1
    assert errors == "quickstart: PYTHON must name an interpreter; got '/nowhere/python'\n"


@pytest.mark.parametrize("folder", [".:/root", "/usr"])
def test_an_exported_cdpath_changes_nothing(machine: Machine, folder: str) -> None:
    assert ask(machine, "echo $repository", CDPATH=folder) == f"{REPOSITORY}\n"


def test_a_system_without_locks_or_sizes_is_worked_on(machine: Machine) -> None:
    machine.program("flock", "#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 65\n")
    machine.program("df", "#!/bin/sh\necho Avail\necho -\n")
    code, printed, errors = machine.run()
    assert code == 0, errors
    assert "ran " in printed and "waiting" not in errors and "syntax" not in errors


@pytest.mark.parametrize("caches", ["relative/folder", ""])
def test_a_relative_cache_counts_as_none(machine: Machine, caches: str) -> None:
    assert machine.run(XDG_CACHE_HOME=caches)[0] == 0
    assert (environment_of(machine) / "bin/python").is_file()


# ---- How it is called


@pytest.mark.parametrize("jobs", ["0", "-1", "abc", "", "2.5"])
def test_jobs_that_are_no_number_are_refused_before_anything_is_made(
    machine: Machine, tests_script: Path, jobs: str
) -> None:
    for script, name in ((QUICKSTART, "quickstart"), (tests_script, "run.sh")):
        code, _, errors = machine.run(script, RESLORA_JOBS=jobs)
        assert code == 1
        assert errors == (
            f"{name}: RESLORA_JOBS must be a whole number of at least 1; got '{jobs}'\n"
        )
    assert not list(machine.home.iterdir()) and not machine.log.read_text()
    assert not (tests_script.parents[1] / "build").exists()


def test_jobs_that_are_a_number_are_taken(machine: Machine) -> None:
    _, _, errors = machine.run(RESLORA_JOBS="3")
    assert "quickstart: building reslora with 3 compile jobs (minutes, the first time)" in errors


@pytest.mark.parametrize("shell", ["sh", "bash --posix"])
def test_another_shell_works_too(machine: Machine, tests_script: Path, shell: str) -> None:
    code, printed, errors = machine.run(shell=shell)
    assert code == 0, errors
    assert printed.startswith("ran ")
    code, _, errors = machine.run(tests_script, shell, RESLORA_JOBS="0")
    assert (code, errors.count("\n")) == (1, 1) and errors.startswith("run.sh: RESLORA_JOBS must")


def test_a_private_umask_and_a_checkout_of_others_do_for_quickstart(
    machine: Machine, tmp_path: Path
) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    files = [*checkout.rglob("*")]
    for path in (*files, checkout):
        path.chmod(path.stat().st_mode & ~0o222)
    before = os.umask(0o077)
    try:
        code, printed, errors = machine.run(checkout / "examples/quickstart.sh")
    finally:
        os.umask(before)
        checkout.chmod(0o755)
    assert code == 0, errors
    assert printed.startswith("ran ")
    assert [*checkout.rglob("*")] == files  # root may write, and must not
    assert machine.run(checkout / "examples/quickstart.sh")[0] == 0
    assert machine.asked("-m pip install") == 2


# ---- At once, and stopped


def test_two_runs_at_once_wait_for_each_other(machine: Machine) -> None:
    machine.cache.mkdir(parents=True)
    with open(machine.cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = machine.start()
        first_line = second.stderr.readline()
        assert first_line == (
            f"quickstart: waiting for another run that is at work in {machine.cache}\n"
        )
        assert second.poll() is None and not environment_of(machine).exists()
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "ran " in printed


# Touches a file and waits, in one process, so that an interrupt finds nothing half-started.
HANG = f"""exec {sys.executable} -c '
import os, pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
pathlib.Path(os.environ["HOME"], "hangs").touch()
time.sleep(100)'"""


@pytest.mark.parametrize("point", ["STUB_VENV", "STUB_PIP"])
def test_an_interrupt_before_all_is_installed_leaves_no_environment(
    machine: Machine, point: str
) -> None:
    code, errors = machine.interrupt(machine.start(**{point: HANG}), machine.home / "hangs")
    assert code == 130
    assert errors.splitlines()[-1] == "quickstart: interrupted; run it again to go on"
    assert not environment_of(machine).exists()
    assert machine.run()[0] == 0


def test_an_interrupted_build_keeps_the_packages_and_builds_again(machine: Machine) -> None:
    code, errors = machine.interrupt(machine.start(STUB_BUILD=HANG), machine.home / "hangs")
    assert code == 130
    assert errors.splitlines()[-1] == "quickstart: interrupted; run it again to go on"
    assert machine.run()[0] == 0
    assert machine.asked("-m pip install --progress-bar") == 1
    assert machine.asked("--no-deps") == 2


def test_an_interrupted_apt_ends_the_run(machine: Machine) -> None:
    machine.program("id", "#!/bin/sh\necho 0\n")
    (machine.bin / "c++").unlink()
    machine.program("apt-get", f"#!/bin/sh\n{HANG}\n")
    code, _ = machine.interrupt(machine.start(), machine.home / "hangs")
    assert code == 130
    assert not environment_of(machine).exists()


def test_an_interrupted_upgrade_keeps_the_environment(machine: Machine) -> None:
    machine.run()
    started = machine.start(STUB_PIP=HANG, RESLORA_NEWEST="1")
    assert machine.interrupt(started, machine.home / "hangs")[0] == 130
    assert (environment_of(machine) / "bin/python").is_file()
    wait_for(lambda: machine.run()[0] == 0)
    assert machine.asked("-m pip install --progress-bar") == 3


def test_a_failing_build_shows_the_compilers_words(machine: Machine) -> None:
    code, _, errors = machine.run(STUB_BUILD=BUILD_FAILS)
    assert code == 1
    assert "chain.cpp:7:1: error: 'x' was not declared in this scope" in errors
    assert errors.splitlines()[-1] == (
        "quickstart: reslora could not be built; the words above say why, and "
        f"{machine.cache}/build.log has the rest"
    )
    assert not (environment_of(machine) / "reslora-made-of.txt").exists()
    assert machine.run()[0] == 0
