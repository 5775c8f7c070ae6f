"""A training on several processes, started by `accelerate launch` in test_training_tools.py."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from models import tiny_llama

import reslora
from reslora.injection.adapted import find_layers


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    config = reslora.ResLoraConfig(r=4, target_modules=["q_proj", "v_proj"], res_mode="is")
    model = reslora.inject(tiny_llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(ids, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    layers = find_layers(model)
    mine = torch.stack([layer.reslora_B.sum() for layer in layers])
    both = accelerator.gather(mine.detach()).view(2, -1)
    assert torch.equal(both[0], both[1])  # the processes hold one adapter
    reslora.sync_statistics(model)
    if accelerator.is_main_process:
        reslora.save_pretrained(model, folder / "adapter", statistics=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


main(Path(sys.argv[1]))
