"""Running the quickstart in tests: tiny settings, this interpreter, and no network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "quickstart.sh"
TINY = "--steps 4 --pretrain-steps 2 --eval-blocks 8 --seq-len 32 --batch-size 2".split()


def environment(cache: Path) -> dict[str, str]:
    """Return what the script runs in: this interpreter, one thread, and no way to a network."""
    nowhere = "http://127.0.0.1:9"
    return {
        **os.environ,
        "RESLORA_PYTHON": sys.executable,
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1",
    }


def quickstart(
    *arguments: object,
    cache: Path,
    limits: Callable[[], object] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; `limits` is called in its process first."""
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=environment(cache) | variables,
        preexec_fn=limits,
        capture_output=True,
        text=True,
        timeout=240,
    )


def interrupted(
    *arguments: object, cache: Path, when: Callable[[str], object], log: Path
) -> tuple[int, str]:
    """Send it Ctrl-C as soon as `when(stderr so far)` is true; return exit code and stderr."""
    with log.open("w") as stderr:
        run = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)],
            env=environment(cache) | {"PYTHONPROFILEIMPORTTIME": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            # A shell that runs the tests in the background lets its children ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        end = time.monotonic() + 200
        while not when(log.read_text()):
            assert run.poll() is None and time.monotonic() < end, spoken(log.read_text())
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=100)
    finally:
        run.kill()
    return run.returncode, spoken(log.read_text())


def spoken(stderr: str) -> str:
    """Return what is meant for people: without the times of imports."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("import time:"))
