"""What merging a model on disk costs beside copying it: seconds, and memory beyond `import torch`.

python benchmarks/bench_file_merge.py --folder FOLDER             # 4 GB of random numbers
python benchmarks/bench_file_merge.py --folder FOLDER --size 0.5  # GB; for a quick look

Copying is `cp` and `sync` of the same files on the same disk; rounds are interleaved. Memory is the
peak of anonymous memory (RssAnon) of a process that only merges, less that of one that only imports
torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

import reslora
from reslora.files.checkpoint import read_adapter
from reslora.files.model_folder import merge_folder
from reslora.injection.adapted import injection_of

HIDDEN, INNER, SHARDS = 2048, 5632, 4
MEMORY = """
import sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"): peak = max(peak, int(line.split()[1]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
import torch
if len(sys.argv) > 1:
    from reslora.files.model_folder import merge_folder
    merge_folder(*sys.argv[1:])
time.sleep(0.05)
print(peak * 1024)
"""


class Block(nn.Module):
    """The linear layers of a transformer block, without what lies between them."""

    def __init__(self, device: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, **options)
        self.up_proj = nn.Linear(HIDDEN, INNER, **options)
        self.down_proj = nn.Linear(INNER, HIDDEN, **options)


class Model(nn.Module):
    """Blocks by number, named as transformers names them."""

    def __init__(self, blocks: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(device) for _ in range(blocks))


def make_base(folder: Path, blocks: int) -> None:
    """Write a sharded base of random bf16 weights."""
    folder.mkdir(parents=True)
    shapes = {name: p.shape for name, p in Model(blocks, "meta").named_parameters()}
    names = list(shapes)
    weight_map = {}
    for shard in range(SHARDS):
        part = names[shard::SHARDS]
        path = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {n: torch.randn(shapes[n], dtype=torch.bfloat16) for n in part}
        reslora._C.save_tensors(folder / path, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(part, path)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, blocks: int) -> None:
    """Write an adapter of every layer, with random A and B."""
    config = reslora.ResLoraConfig(r=8, target_modules="all-linear", res_mode="bs")
    model = reslora.inject(Model(blocks, "meta"), config)
    chains = [(c.key, c.links.layers) for c in injection_of(model, "bench").chains]
    tensors = {}
    for name, inputs, outputs, r, _ in (layer for _, layers in chains for layer in layers):
        tensors[f"{name}.reslora_A.weight"] = torch.randn(r, inputs) / inputs**0.5
        tensors[f"{name}.reslora_B.weight"] = torch.randn(outputs, r) / 100
    folder.mkdir(parents=True)
    text = config.to_json()
    reslora._C.save_adapter(folder / "adapter_model.safetensors", text, chains, tensors)
    (folder / "adapter_config.json").write_text(text)


def check(base: Path, adapter: Path, merged: Path) -> None:
    """Compare one merged tensor of each kind with the formula."""
    read, config = read_adapter(adapter)
    before, after = (reslora._C.ModelFiles(weight_paths(f)) for f in (base, merged))
    for key, layers in read.chains:
        blocks = []
        for name, scaling in ((shape.name, shape.scaling) for shape in layers[:2]):
            A, B = (read.tensors[f"{name}.reslora_{x}.weight"] for x in "AB")
            W = before.tensor(f"{name}.weight").float()
            blocks.append(reslora._C.formulas.Block(W, None, A, B, scaling))
        wanted = reslora._C.formulas.merged_bs(blocks, 1, config.pre_num)
        got = after.tensor(f"{layers[1].name}.weight").float()
        harness.require_close(key, got, wanted, relative=torch.finfo(torch.bfloat16).eps)


def weight_paths(folder: Path) -> list[str]:
    """Return the shards of a model folder."""
    return [str(path) for path in sorted(folder.glob("*.safetensors"))]


def copy(base: Path, target: Path) -> None:
    """Copy a folder and wait until it is on the disk."""
    subprocess.run(["cp", "-r", base, target], check=True)
    subprocess.run(["sync"], check=True)


def anonymous_bytes(*arguments: Path) -> int:
    """Return the peak of anonymous memory of a merge, or of importing torch."""
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def run(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Make the files, check one merge, then time merging and copying in interleaved rounds."""
    per_block = 2 * (HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    blocks = max(2, round(gigabytes * 1e9 / per_block))
    base, adapter, target = folder / "base", folder / "adapter", folder / "out"
    make_base(base, blocks)
    make_adapter(adapter, blocks)
    merge_folder(base, adapter, target)
    check(base, adapter, target)
    shutil.rmtree(target)

    def timed(work: Any) -> float:
        seconds = harness.timed(work)
        shutil.rmtree(target)
        return seconds

    times = harness.measure(
        {
            "cp and sync": lambda: timed(lambda: copy(base, target)),
            "merge": lambda: timed(lambda: merge_folder(base, adapter, target)),
        },
        rounds=rounds,
        warmup=1,
    )
    memory = anonymous_bytes(base, adapter, target) - anonymous_bytes()
    return {
        "times": harness.ratios(times, reference="cp and sync"),
        "anonymous_bytes": memory,
        "largest_tensor_bytes": 2 * HIDDEN * INNER,
        "bytes": sum(Path(path).stat().st_size for path in weight_paths(base)),
    }


def main(arguments: list[str]) -> int:
    """Run in a folder of its own, which is removed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the disk is measured")
    parser.add_argument("--size", type=float, default=4.0, help="GB of weights (default: 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "file_merge.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = run(Path(folder), options.size, options.rounds)
    settings = {
        "size": options.size,
        "rounds": options.rounds,
        "dtype": "bfloat16",
        "r": 8,
        "res_mode": "bs",
    }
    harness.write(options.output, question=__doc__, settings=settings, results=results)
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
