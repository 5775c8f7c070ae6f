"""Two steps under DeepSpeed on two processes (CPU, gloo), started by test_distributed.py.

`deepspeed_program.py <stage> <file> <res_mode>...` writes the mean loss of both processes in the
second step of each shortcut. `deepspeed_program.py compile` ends where DeepSpeed has started, after
compiling what it needs for that.
"""

import json
import os
import sys
from pathlib import Path

import torch
from models import tiny_llama

import reslora

CONFIG = {"train_micro_batch_size_per_gpu": 2, "zero_force_ds_cpu_optimizer": False}


def adapted(res_mode: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = reslora.ResLoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], res_mode=res_mode, pre_num=2
    )
    return reslora.inject(tiny_llama(), config).train()


def batches() -> torch.Tensor:
    return torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(1)).view(2, 4, 8)


def trained_loss(stage: int, res_mode: str) -> float:
    import deepspeed

    rank = torch.distributed.get_rank()
    model = adapted(res_mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # shard small tensors too
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=CONFIG | {"zero_optimization": zero}
    )
    for batch in batches():
        own = batch[2 * rank : 2 * rank + 2]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    engine.destroy()
    return float(mean) / 2


def main(arguments: list[str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")  # compiles
    if arguments != ["compile"]:
        stage, file, *res_modes = arguments
        losses = {res_mode: trained_loss(int(stage), res_mode) for res_mode in res_modes}
        if torch.distributed.get_rank() == 0:
            Path(file).write_text(json.dumps(losses))
    torch.distributed.barrier()  # else one process may end while the other still sends
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
