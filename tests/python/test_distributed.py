"""Two processes on gloo: DDP, FSDP2, statistics; each against one process on the whole batch."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import deepspeed_program
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cpp_programs import BUILDS
from models import Net, adapted, fit, gradients, randomize, tiny_llama, tokens, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import reslora
from reslora.injection.adapted import find_layers

WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")


def _start(rank, port, work, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def on_two_ranks(work, *arguments):
    """Run `work(rank, ...)` in two processes; an error of either fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_start, args=(port, work, arguments), nprocs=WORLD)


def net(res_mode, pre_num, **options):
    torch.manual_seed(0)
    return adapted(Net(depth=4).double(), res_mode=res_mode, pre_num=pre_num, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, 6, generator=generator, dtype=torch.float64)


SHORTCUTS = [("none", 1), ("is", 1), ("bs", 2), ("bs", -1), ("ms", 2), ("ms", -1)]


def _ddp(rank, checkpointing):
    for res_mode, pre_num in SHORTCUTS:
        wanted = gradients(net(res_mode, pre_num), batch())
        model = net(res_mode, pre_num)
        model.checkpointing = checkpointing
        wrapped = DistributedDataParallel(model)
        loss = wrapped(batch()[rank::WORLD]).square().sum() * WORLD  # DDP takes the mean over ranks
        loss.backward()
        for parameter, grad in zip(trained(wrapped), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
def test_ddp_equals_one_process(checkpointing):
    on_two_ranks(_ddp, checkpointing)


def _statistics(rank):
    for res_mode in ("is", "ms"):
        _check_statistics(rank, res_mode)


def _check_statistics(rank, res_mode):
    model = net(res_mode, 2).train()
    for step in range(3):
        model(batch()[rank::WORLD] * (1 + step))
    whole = net(res_mode, 2).train()
    for step in range(3):
        whole(batch() * (1 + step))
    if rank == 0:
        assert not torch.allclose(find_layers(model)[1].norms, find_layers(whole)[1].norms)
    reslora.sync_statistics(model)
    once = [layer.norms.clone() for layer in find_layers(model)]
    reslora.sync_statistics(model)  # again: nothing more
    for own, first, other in zip(find_layers(model), once, find_layers(whole), strict=True):
        torch.testing.assert_close(own.norms, first)
        torch.testing.assert_close(own.norms * WORLD**0.5, other.norms, rtol=1e-5, atol=1e-6)
    reports = [reslora.merge(m, "input") for m in (model, whole)]
    for own, other in zip(reports[0].layers, reports[1].layers, strict=True):
        assert own.alpha_star == pytest.approx(other.alpha_star, rel=1e-5)


def test_alpha_is_that_of_the_whole_batch():
    on_two_ranks(_statistics)


def _calibration(rank):
    parts = [batch()[k::4].contiguous() for k in range(4)]
    model = net("ms", 2)
    with warnings.catch_warnings(action="ignore"):  # few rows
        reslora.calibrate(model, parts[rank::WORLD], keep_covariances=True, move_taps=False)
        reslora.sync_statistics(model)
        whole = net("ms", 2)
        reslora.calibrate(whole, parts, move_taps=False)
    for name, wanted in whole.layers[0].lin.chain.injection.calibrated.fits.items():
        own = model.layers[0].lin.chain.injection.calibrated.fits[name]
        assert own.rows == wanted.rows
        torch.testing.assert_close(own.A, wanted.A, rtol=1e-6, atol=1e-8)
    exact = net("bs", 2)
    reslora.calibrate(exact, parts[rank::WORLD], keep_covariances=True)
    reslora.sync_statistics(exact)  # nothing to fit
    moved = net("ms", 2)
    with warnings.catch_warnings(action="ignore"):
        reslora.calibrate(moved, parts[rank::WORLD], keep_covariances=True)
        reslora.sync_statistics(moved)
        reslora.merge(moved)
    mine = torch.stack([layer.base_layer.weight for layer in find_layers(moved)])
    theirs = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(theirs, mine.contiguous())
    torch.testing.assert_close(theirs[0], theirs[1], rtol=1e-9, atol=1e-12)
    other = net("ms", 2)
    reslora.calibrate(other, parts[rank::WORLD], move_taps=False)
    with pytest.raises(ValueError, match="keep_covariances=True"):
        reslora.sync_statistics(other)


def test_fits_are_those_of_all_data():
    on_two_ranks(_calibration)


def _uneven(rank):
    model = net("is", 1).train()
    for _ in range(1 + rank):
        model(batch())
    with pytest.raises(ValueError, match="same training forwards; got 1 to 2"):
        reslora.sync_statistics(model)


def test_uneven_ranks_are_refused():
    on_two_ranks(_uneven)


def test_one_process_needs_no_group():
    model = net("is", 1)
    reslora.sync_statistics(model)
    with pytest.raises(ValueError, match="model must be adapted"):
        reslora.sync_statistics(nn.Linear(2, 2))


# ---- FSDP2 ------------------------------------------------------------------------------------


def _llama(res_mode):
    torch.manual_seed(0)
    config = reslora.ResLoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], res_mode=res_mode, pre_num=2
    )
    return randomize(reslora.inject(tiny_llama(), config), 0.1).train()


def _sharded(model, **options):
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _train(model, ids, reduces=False):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        if reduces:
            reslora.reduce_gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def _fsdp(rank, folder, keeps_whole):
    for res_mode in ("none", "is", "bs", "ms") if keeps_whole else ("none", "ms"):
        _check_fsdp(rank, res_mode, keeps_whole, folder / res_mode)


def _check_fsdp(rank, res_mode, keeps_whole, folder):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (4, 6), generator=generator)
    model, whole = _llama(res_mode), _llama(res_mode)
    kept = reslora.adapter_parameters(model) if keeps_whole else set()
    _train(_sharded(model, ignored_params=kept), ids[rank::WORLD], reduces=keeps_whole)
    _train(whole, ids)
    with pytest.raises(ValueError, match="got a sharded weight"):
        reslora.merge(model)
    if rank == 0 or not keeps_whole:  # of sharded adapters every rank collects the parts
        reslora.save_pretrained(model, folder / "sharded")
    if rank == 0:
        reslora.save_pretrained(whole, folder / "whole")
        found = [_read_and_merged(folder / name) for name in ("sharded", "whole")]
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    dist.barrier()


def _read_and_merged(folder):
    torch.manual_seed(0)
    model = reslora.load(tiny_llama(), folder)
    adapters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    exact = all(layer.chain.merges_exactly for layer in find_layers(model))
    merged = reslora.merge_and_unload(model, None if exact else "weight")
    return [*adapters, *(p.detach() for p in merged.parameters())]


@pytest.mark.parametrize("keeps_whole", [False, True], ids=["sharded", "kept whole"])
def test_fsdp2_trains_saves_and_merges_as_one_process(tmp_path, keeps_whole):
    on_two_ranks(_fsdp, tmp_path, keeps_whole)


def _fsdp_refused(rank):
    ids = tokens()
    for res_mode in ("is", "bs"):
        model = _sharded(_llama(res_mode))
        with pytest.raises(ValueError, match=r"reads adapters of other layers.*ignored_params"):
            model(input_ids=ids, labels=ids)


def test_fsdp2_of_shortcuts_that_read_other_layers_says_what_to_do():
    on_two_ranks(_fsdp_refused)


# ---- DeepSpeed ----------------------------------------------------------------------------------

DEEPSPEED = Path(deepspeed_program.__file__)
RES_MODES = ["none", "is", "bs", "ms"]


def launch(*arguments, compiled, processes=WORLD, timeout=200):
    """Run deepspeed_program.py. `compiled`: the folder for what DeepSpeed compiles at its start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), DEEPSPEED, *map(str, arguments)]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(compiled)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def keep(folder, place):
    """Copy a folder to a place where it is seen whole or not at all, as runs end at any point."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as unfinished:
        copy = shutil.copytree(folder, Path(unfinished) / "copy")
        with contextlib.suppress(OSError):  # another run was faster
            copy.rename(place)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return what DeepSpeed compiles at its start, compiled or copied from an earlier run.

    torch waits in such a folder for whoever left a lock there, so each run has one of its own.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    own = tmp_path_factory.mktemp("deepspeed") / "compiled"
    names = [f"{name}-{version(name)}" for name in ("torch", "deepspeed")]
    kept = BUILDS / "deepspeed" / "-".join([sys.implementation.cache_tag, *names])
    if kept.exists():
        shutil.copytree(kept, own)
    else:
        launch("compile", compiled=own, processes=1, timeout=900)
        keep(own, kept)
    return own


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stage: f"stage {stage}")
def losses(request, compiled, tmp_path_factory):
    """Return the loss of every shortcut's second step in a stage of ZeRO."""
    file = tmp_path_factory.mktemp("losses") / "losses.json"
    launch(request.param, file, *RES_MODES, compiled=compiled)
    return json.loads(file.read_text())


@pytest.mark.timeout(func_only=True)  # launch has limits of its own
@pytest.mark.parametrize("res_mode", RES_MODES)
def test_zero_stages_equal_one_process(losses, res_mode):
    ids = iter(deepspeed_program.batches())

    def loss_of(model):
        own = next(ids)
        return model(input_ids=own, labels=own).loss

    loss = fit(deepspeed_program.adapted(res_mode), loss_of, steps=2)[-1]
    assert losses[res_mode] == pytest.approx(loss, rel=1e-6)


def _save_wrapped(rank, folder):
    model = net("is", 1)
    for name, wrapped in (
        ("plain", model),
        ("compiled", torch.compile(model)),
        ("ddp", DistributedDataParallel(model)),
    ):
        if rank == 0:
            reslora.save_pretrained(wrapped, f"{folder}/{name}")


def test_wrapped_models_are_saved_as_what_they_wrap(tmp_path):
    on_two_ranks(_save_wrapped, str(tmp_path))
    for name in ("compiled", "ddp"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
