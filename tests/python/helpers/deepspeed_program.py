"""Two steps under DeepSpeed on two processes (CPU, gloo), started by test_distributed.py.

It prints the mean loss of both processes in the second step, and writes it to a file.
"""

import os
import sys
from pathlib import Path

import torch
from models import tiny_llama

import reslora

os.environ["DS_ACCELERATOR"] = "cpu"
CONFIG = {"train_micro_batch_size_per_gpu": 2, "zero_force_ds_cpu_optimizer": False}


def adapted(res_mode: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = reslora.ResLoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], res_mode=res_mode, pre_num=2
    )
    return reslora.inject(tiny_llama(), config).train()


def batches() -> torch.Tensor:
    return torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(1)).view(2, 4, 8)


def main(stage: int, res_mode: str, file: Path) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
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
    if rank == 0:
        file.write_text(str(float(mean) / 2))
    torch.distributed.barrier()  # else one process may end while the other still sends
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
