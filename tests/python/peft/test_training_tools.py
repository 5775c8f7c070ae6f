"""ResLoRA under TRL's trainers and accelerate, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tokenizer, tokens

import reslora
from reslora.injection.adapted import find_layers

pytest.importorskip("peft", reason="peft is not installed")
from reslora.peft import ResLoraConfig
from reslora.trainer import ResLoraCallback

TARGETS = ["q_proj", "v_proj"]


@pytest.mark.parametrize("res_mode", ["is", "bs"])
def test_sft_trainer(tmp_path, res_mode):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = ["a b c d e f g h", "h g f e d c b a", "a c e g", "b d f h"] * 4
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, use_cpu=True,
            learning_rate=1e-2, logging_steps=1, save_steps=5, report_to=[], disable_tqdm=True,
            bf16=False, max_length=16, eos_token="<eos>", loss_type="nll",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=ResLoraConfig(r=4, target_modules=TARGETS, res_mode=res_mode),
    )  # fmt: skip
    ResLoraCallback().add_to(trainer)
    trainer.train()
    layers = find_layers(trainer.model)
    assert len(layers) == 6
    assert all(layer.reslora_B.any() for layer in layers)
    entry = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert entry["reslora/grad_norm_B"] > 0
    torch.manual_seed(0)
    read = reslora.load(tiny_llama(), tmp_path / "checkpoint-5")
    ids = tokens()
    trainer.model.eval()
    torch.testing.assert_close(read(ids).logits, trainer.model(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_plain_loop_with_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    config = reslora.ResLoraConfig(r=4, target_modules=TARGETS, res_mode="ms")
    model = reslora.inject(tiny_llama(), config).train()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(tokens(16, 8), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    assert all(layer.reslora_B.any() for layer in find_layers(plain))
    reslora.merge(plain)


PROGRAM = Path(__file__).parents[1] / "helpers/accelerate_program.py"


def test_accelerate_launch_on_two_processes(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    # The launcher calls it multi_gpu; the environment says that the processes use the CPU (gloo).
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(PROGRAM), str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    read = reslora.load(tiny_llama(), tmp_path / "adapter")
    assert all(layer.reslora_B.any() for layer in find_layers(read))
    assert reslora.merge(read).rule == "projected"  # sums of both processes were saved
