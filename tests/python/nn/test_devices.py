"""Layers of one model on several devices: device_map, offloading, nn.DataParallel."""

import copy
import sys

import pytest
import torch
from models import SHORTCUTS, Block, Net, adapted, randomize, tiny_llama, tokens
from torch import nn
from torch._subclasses import FakeTensorMode

import reslora
from reslora.injection.adapted import adapter_sum, find_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_taps_and_adapters_of_other_layers_come_to_the_layers_device(res_mode, pre_num):
    devices = ["cuda:0", "cuda:1"]  # of tensors without values: the op demands one device of all
    with FakeTensorMode():
        net = Net()
        for i in range(len(net.layers)):
            with torch.device(devices[i % 2]):
                net.layers[i] = Block(6)
        adapted(net, res_mode=res_mode, pre_num=pre_num)
        for i, block in enumerate(net.layers):
            block.register_forward_pre_hook(lambda _, args, i=i: (args[0].to(devices[i % 2]),))
            assert str(block.lin.reslora_A.device) == devices[i % 2]
        y = net(torch.randn(3, 6, device=devices[0]))
        assert (str(y.device), y.requires_grad) == (devices[1], True)
        assert reslora.print_links(net).count("not linked in") == 0


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("is_plug_in", [False, True])
def test_a_base_that_is_offloaded_is_adapted_where_it_runs(res_mode, pre_num, is_plug_in):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    base, ids = tiny_llama(), tokens()
    config = reslora.ResLoraConfig(r=4, target_modules=TARGETS, res_mode=res_mode, pre_num=pre_num)
    wanted = randomize(reslora.inject(copy.deepcopy(base), config), 0.2).train()
    offloaded = accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    if is_plug_in:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        from reslora.peft import ResLoraConfig

        config = ResLoraConfig(r=4, target_modules=TARGETS, res_mode=res_mode, pre_num=pre_num)
        model = peft.get_peft_model(offloaded, config).train()
    else:
        model = reslora.inject(offloaded, config).train()
    layers = list(zip(find_layers(model), find_layers(wanted), strict=True))
    assert all(own.base_layer.weight.is_meta for own, _ in layers)
    with torch.no_grad():
        for own, other in layers:
            own.reslora_A.copy_(other.reslora_A)
            own.reslora_B.copy_(other.reslora_B)
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, wanted)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for own, other in layers:
        torch.testing.assert_close(own.reslora_A.grad, other.reslora_A.grad)
        torch.testing.assert_close(own.reslora_B.grad, other.reslora_B.grad)
        torch.testing.assert_close(own.norms, other.norms)


@pytest.mark.parametrize("res_mode", ["is", "bs"])
def test_adapters_that_were_offloaded_name_the_way_out(res_mode):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted(tiny_llama(), 0.2, target_modules=TARGETS, res_mode=res_mode)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"got one on the meta device \(offload the base first"):
        model(tokens())


def test_replicas_of_data_parallel_are_refused_before_they_run(monkeypatch):
    def copies(tensors, devices, detach=False):
        return [list(tensors) for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]  # the package has a function of that name
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)  # it needs GPUs
    model = adapted(res_mode="is")
    before = adapter_sum(model.layers[0].lin.chain.injection)
    with pytest.raises(RuntimeError, match=r"layers\.0\.lin needs its chain: use a process for"):
        nn.parallel.replicate(model, [0, 1])
    assert adapter_sum(model.layers[0].lin.chain.injection) == before
    plain = reslora.merge_and_unload(model, "weight")
    assert len(nn.parallel.replicate(plain, [0, 1])) == 2
