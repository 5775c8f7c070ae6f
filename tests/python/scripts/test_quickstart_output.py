"""Where the quickstart writes: refusals before the work, full disks, interrupts, and run again."""

import ctypes
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from quickstart_program import SCRIPT, TINY, environment, interrupted, quickstart, spoken

EXAMPLES = SCRIPT.parent / "python"
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Return a cache that holds the small model, and the results of plain LoRA."""
    cache, output = (tmp_path_factory.mktemp(name) for name in ("cache", "output"))
    done = quickstart(*TINY, "--res-mode", "none", "--output", output, cache=cache)
    assert done.returncode == 0, done.stderr
    return cache, output


@pytest.fixture(scope="module")
def cache(first_run):
    return first_run[0]


def obey_modes() -> None:
    """Let the mode bits of files bind root too, from the next program on."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


def assert_refused_at_once(done, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = spoken(done.stderr)
    assert errors.startswith("quickstart: ") and errors.count("\n") == 1
    for part in words:
        assert part in errors
    # Nothing slow had begun.
    assert "import time:" in done.stderr
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)


# ---- A place that cannot be written to --------------------------------------------------------

UNWRITABLE = {
    "read-only": ("locked", "Permission denied"),
    "in a read-only one": ("locked/new/out", "Permission denied"),
    "below a file": ("file/out", "Not a directory"),
    "of the system": ("/proc/out", "/proc/out"),
    "too long a name": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("option", ["--output", "--cache"])
@pytest.mark.parametrize("name", UNWRITABLE)
def test_an_unwritable_place_is_refused_before_the_work(option, name, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "file").write_text("kept")
    place, reason = UNWRITABLE[name]
    good = {"--output": tmp_path / "out", "--cache": tmp_path / "cache"}
    places = [part for pair in (good | {option: tmp_path / place}).items() for part in pair]
    done = quickstart(
        *TINY, *places, cache=tmp_path, limits=obey_modes, PYTHONPROFILEIMPORTTIME="1"
    )
    assert_refused_at_once(
        done, reason, *([] if "long" in name else [f"{option} must be a folder"])
    )
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"locked", "file"}


def test_a_cache_that_holds_the_model_may_be_read_only(cache, tmp_path):
    """Asked for too much room, so that the run ends right after."""
    kept = cache / "reslora"
    kept.chmod(0o555)
    try:
        done = quickstart(
            *TINY, "--r", 10**12, "--output", tmp_path / "out", cache=cache, limits=obey_modes
        )
    finally:
        kept.chmod(0o755)
    assert "--output must have room" in done.stderr


def test_a_place_that_another_run_writes_to_is_refused(cache, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = quickstart(*TINY, "--output", tmp_path, cache=cache, PYTHONPROFILEIMPORTTIME="1")
    finally:
        os.close(descriptor)
    assert_refused_at_once(done, "--output must be a folder that no other run writes to")
    assert not list(tmp_path.iterdir())


# ---- Room -------------------------------------------------------------------------------------

WITH_FREE = """
import collections, shutil, sys
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(int(sys.argv[1]))
import finetune
sys.exit(finetune.main(sys.argv[2:]))
"""


def with_free(free: int, *arguments: object, cache: Path, **variables: str):
    """Run it where a disk says that it has so many bytes free."""
    return subprocess.run(
        [sys.executable, "-c", WITH_FREE, str(free), *map(str, arguments)],
        env=environment(cache)
        | {"PYTHONPATH": str(EXAMPLES), "PYTHONPROFILEIMPORTTIME": "1"}
        | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("mode", "count", "needed"), [("none", 2, 20), ("is", 3, 29), ("all", 5, 49)]
)
def test_too_little_room_for_the_methods_is_refused(cache, tmp_path, mode, count, needed):
    options = ["--res-mode", mode, "--output", tmp_path / "out", "--cache", cache / "reslora"]
    done = with_free(19_000_000, *TINY, *options, cache=cache)
    words = f"room for {count} methods", f"about {needed} MB; got 19 MB free"
    assert_refused_at_once(done, "--output must have ", *words)
    assert not list(tmp_path.iterdir())


def test_the_room_asked_for_is_what_is_written(first_run):
    """Two methods ask for 20 MB."""
    written = sum(path.stat().st_size for path in first_run[1].rglob("*") if path.is_file())
    assert 10e6 < written < 20e6


def test_too_little_room_for_the_small_model_is_refused(tmp_path):
    places = ["--output", tmp_path / "out", "--cache", tmp_path / "cache"]
    done = with_free(5_000_000, *TINY, *places, cache=tmp_path)
    assert_refused_at_once(done, "--cache must have room for the small model, about 6 MB; got 5 MB")
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_in_the_cache_is_removed(tmp_path):
    """Folders in which another run is at work stay. Asked for too much room, so that it ends."""
    for name in ("killed", "at-work", "new"):
        (tmp_path / f"cache/.unfinished-{name}/model").mkdir(parents=True)
    for name in ("killed", "at-work"):
        os.utime(tmp_path / f"cache/.unfinished-{name}", (0, 0))
    descriptor = os.open(tmp_path / "cache/.unfinished-at-work", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = with_free(1, "--cache", tmp_path / "cache", cache=tmp_path)
    finally:
        os.close(descriptor)
    assert_refused_at_once(done, "--cache must have room")
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {".unfinished-at-work", ".unfinished-new"}


def test_a_run_at_work_holds_the_lock_of_its_temporary_folder(tmp_path):
    done = run_program(f"""
import os, pathlib
import interrupts
parent = pathlib.Path({str(tmp_path)!r})
with interrupts.temporary(parent) as folder:
    os.utime(folder, (0, 0))
    interrupts.remove_abandoned(parent)
    print(folder.is_dir())
""")
    assert (done.stdout, done.stderr) == ("True\n", "")


def make_model(folder: Path, **config: object) -> Path:
    """Make a folder that looks like a model with a billion weights of two bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2_000_000_000)
    return folder


# Two methods of 4 GB and adapters of 7 * 2 * 8 / 1024 of that.
@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "bfloat16", "hidden_size": 1024},
        {"torch_dtype": "float16", "n_embd": 1024},
        {"text_config": {"dtype": "bfloat16", "hidden_size": 1024}},
    ],
)
def test_the_room_is_that_of_the_base_in_fp32(tmp_path, config):
    model = make_model(tmp_path / "base", **config)
    options = ["--model", model, "--res-mode", "none", "--output", tmp_path / "out"]
    done = with_free(8_000_000_000, *options, cache=tmp_path)
    assert_refused_at_once(done, "about 8,875 MB; got 8,000 MB free")
    assert not (tmp_path / "out").exists()


def test_the_room_for_a_model_in_the_cache_of_the_hub_is_known(tmp_path):
    kept = tmp_path / "hub/models--someone--big"
    make_model(kept / "snapshots" / ("0" * 40), dtype="bfloat16", hidden_size=1024)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("0" * 40)
    options = ["--model", "someone/big", "--res-mode", "none", "--output", tmp_path / "out"]
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = with_free(8_000_000_000, *options, cache=tmp_path, **hub)
    assert_refused_at_once(done, "about 8,875 MB; got 8,000 MB free")


class Hub(BaseHTTPRequestHandler):
    """Answers what a model's size is, or 503, and notes what was asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.is_down:
            return self.send_error(503)
        size = {"parameters": {"BF16": 10**9}, "total": 10**9}
        body = json.dumps({"id": "someone/big", "safetensors": size}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def asked_of_hub(tmp_path, *, is_down: bool):
    """Run it with a model of the Hub; return how it ended and what the Hub was asked of it."""
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.is_down = [], is_down
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--model", "someone/big", "--res-mode", "none", "--output", tmp_path / "out"]
        hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        hub["HF_HUB_OFFLINE"] = "0"
        done = with_free(8_000_000_000, *options, cache=tmp_path, **hub)
        server.shutdown()
    return done, [path for path in server.asked if "someone/big" in path]


def test_the_hub_is_asked_for_the_size_before_the_download(tmp_path):
    done, asked = asked_of_hub(tmp_path, is_down=False)
    assert_refused_at_once(done, "about 8,875 MB; got 8,000 MB free")
    assert asked == ["/api/models/someone/big"]  # and for no file


def test_a_hub_that_fails_is_asked_once(tmp_path):
    done, asked = asked_of_hub(tmp_path, is_down=True)
    assert done.returncode == 2
    errors = spoken(done.stderr)
    assert errors.splitlines()[-1].startswith("quickstart: --model 'someone/big' cannot be loaded")
    assert "Retrying" not in errors
    assert asked == ["/api/models/someone/big"]


# No file may have more bytes than these: the small model has 5.3 MB, which the writer of its format
# refuses; an adapter has 0.48 MB, which our library refuses.
FULL = {"small model": 2_000_000, "adapter": 300_000}


@pytest.mark.parametrize("name", FULL)
def test_no_room_in_the_middle_is_one_sentence_and_leaves_nothing(cache, tmp_path, name):
    limit = FULL[name]
    own = cache / "reslora" if name == "adapter" else tmp_path / "cache"
    done = quickstart(
        *TINY, "--res-mode", "none", "--output", tmp_path / "out", "--cache", own, cache=cache,
        limits=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "quickstart: there is no room for a file; got " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---- Interrupts -------------------------------------------------------------------------------


def is_imported(module: str):
    """Return the condition that this module has just been imported."""
    return lambda stderr: re.search(rf"\| +{re.escape(module)}$", stderr, re.MULTILINE)


def assert_ends_as_interrupted(code: int, errors: str) -> None:
    assert code == 130
    assert errors.splitlines()[-1].startswith("quickstart: interrupted")
    assert errors.count("quickstart: ") == 1 and "Traceback" not in errors


IMPORTED = ["shutil", "places", "torch._C", "transformers", "matplotlib.font_manager"]


@pytest.mark.parametrize("module", IMPORTED)
def test_an_interrupt_in_the_imports_is_one_sentence(cache, tmp_path, module):
    found = interrupted(
        *TINY, "--output", tmp_path / "out", cache=cache,
        when=is_imported(module), log=tmp_path / "log",
    )  # fmt: skip
    assert_ends_as_interrupted(*found)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_interrupt_in_pretraining_leaves_the_cache_sound(cache, tmp_path):
    places = ["--output", tmp_path / "out", "--cache", tmp_path / "cache"]
    found = interrupted(
        *TINY, "--pretrain-steps", 100_000, *places, cache=cache,
        when=lambda stderr: "pretraining:" in stderr, log=tmp_path / "log",
    )  # fmt: skip
    assert_ends_as_interrupted(*found)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_interrupt_in_training_keeps_earlier_results(cache, tmp_path):
    (tmp_path / "none-alpha16").mkdir()
    earlier = [tmp_path / name for name in ("results.json", "none-alpha16/adapter")]
    for path in earlier:
        path.write_text("earlier")
    found = interrupted(
        *TINY, "--steps", 100_000, "--output", tmp_path, cache=cache,
        when=lambda stderr: "LoRA (alpha 16):" in stderr, log=tmp_path / "log",
    )  # fmt: skip
    assert_ends_as_interrupted(*found)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "none-alpha16", "log"}
    assert all(path.read_text() == "earlier" for path in earlier)


def test_after_an_interrupt_in_delivery_a_run_into_the_same_place_succeeds(cache, tmp_path):
    output = tmp_path / "out"
    options = [*TINY, "--res-mode", "none", "--output", output]
    found = interrupted(
        *options, cache=cache, log=tmp_path / "log",
        when=lambda _: list(output.glob(".unfinished-*/none-alpha32/lora-exact")),
    )  # fmt: skip
    assert_ends_as_interrupted(*found)
    assert not output.exists()
    # What a run left that was killed is removed; results of an earlier one are replaced.
    (output / ".unfinished-0123/none-alpha16").mkdir(parents=True)
    (output / "none-alpha16/merged").mkdir(parents=True)
    (output / "none-alpha16/merged/model-00001-of-00002.safetensors").write_text("earlier")
    done = quickstart(*options, cache=cache)
    assert done.returncode == 0, done.stderr
    names = {"results.json", "loss.png", "none-alpha16", "none-alpha32"}
    assert {path.name for path in output.iterdir()} == names
    assert not list((output / "none-alpha16/merged").glob("model-0*"))


def run_program(text: str, home: str = str(Path.home()), **options):
    return subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES), "HOME": home},
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_matplotlib_says_nothing_of_a_home_that_cannot_be_written():
    forget = "os.environ.pop('MPLCONFIGDIR', 0), os.environ.pop('XDG_CONFIG_HOME', 0)"
    done = run_program(f"import os; {forget}; import report", home="/proc/nowhere")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_waits_for_the_results_to_be_in_place(tmp_path):
    """The interrupt comes while the first of two results is being moved."""
    for name in ("a", "b"):
        (tmp_path / "stage" / name).mkdir(parents=True)
    done = run_program(f"""
import os, pathlib, signal
import interrupts, places
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.watch("program")
rename = os.rename
def rename_and_interrupt(*paths):
    rename(*paths)
    os.kill(os.getpid(), signal.SIGINT)
os.rename = rename_and_interrupt
folder = pathlib.Path({str(tmp_path)!r})
places.publish(folder / "stage", folder)
print("not reached")
""")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("\nprogram: interrupted")
    assert {path.name for path in tmp_path.iterdir()} == {"stage", "a", "b"}


def test_an_interrupt_is_not_swallowed_where_exceptions_are():
    done = run_program("""
import os, signal
import interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.watch("program")
class Swallowing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
Swallowing()
print("not reached")
""")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("\nprogram: interrupted") and done.stderr.count("\n") == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_whatever_ends_it_leaves_no_temporary_folder(tmp_path, name):
    done = run_program(f"""
import os, pathlib, signal
import interrupts
signal.signal(signal.{name}, signal.SIG_DFL)
interrupts.watch("program")
with interrupts.temporary(pathlib.Path({str(tmp_path / "new/out")!r})):
    os.kill(os.getpid(), signal.{name})
""")
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr.startswith("\nprogram: interrupted")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_that_is_ignored_stays_so():
    """As it is for a program that a shell runs in the background."""
    done = run_program(
        """
import os, signal
import interrupts
interrupts.watch("program")
os.kill(os.getpid(), signal.SIGINT)
print("reached")
""",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout) == (0, "reached\n"), done.stderr
