"""Fine-tune a causal language model with transformers' Trainer and PEFT, by the paper's settings.

    python train_lm.py                                       # small model, made here; no download
    python train_lm.py --model NAME_OR_FOLDER --data FILE    # any causal model, any UTF-8 text
    python train_lm.py --res-mode ms --pre-num -1 --finish-at 0.7

What changes from a LoRA script is the import and the name of the config, and the callback, which
watches the training. The adapter is saved as PEFT saves it, then merged into a whole model.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from console import Parser, at_least, exit_code_of, folder, model_name, positive, text_file


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        type=model_name,
        help="name on the Hub, or folder (default: small Llama made here)",
    )
    parser.add_argument("--data", type=text_file, help="UTF-8 text (default: C++ comments)")
    parser.add_argument("--preset", default="nlg", choices=("nlg", "nlu"))
    parser.add_argument("--res-mode", default="is", choices=("none", "is", "bs", "ms"))
    parser.add_argument("--pre-num", type=at_least(-1), default=1)
    parser.add_argument("--finish-at", type=float, help="share of the steps; see reslora.finish")
    parser.add_argument("--steps", type=at_least(1), default=100)
    parser.add_argument("--batch-size", type=at_least(1), default=8)
    parser.add_argument("--seq-len", type=at_least(8), default=128)
    parser.add_argument("--lr", type=positive, default=1e-3, help="the paper: 1e-4 for 7B")
    parser.add_argument("--output", type=folder, default=Path("train-lm-results"))
    parser.add_argument("--pretrain-steps", type=at_least(1), default=700, help="small model's")
    parser.add_argument("--cache", type=folder, default=Path.home() / ".cache" / "reslora")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train, save, merge."""
    if options.model is None or Path(options.model).expanduser().is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import corpus
    import models
    import pretrain
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    import reslora
    from reslora.peft import ResLoraConfig
    from reslora.trainer import ResLoraCallback

    name = options.model or str(
        pretrain.small_llama(options.cache, pretrain.PretrainSettings(steps=options.pretrain_steps))
    )
    tokenizer = models.load_tokenizer(name)
    documents = corpus.text_file(options.data) if options.data else corpus.header_comments()
    train, held_out = (corpus.blocks(part, tokenizer, options.seq_len) for part in documents)
    train_set, eval_set = (
        [{"input_ids": row, "labels": row} for row in rows] for rows in (train, held_out[:64])
    )
    config = ResLoraConfig.preset(
        options.preset, res_mode=options.res_mode, pre_num=options.pre_num,
        finish_at=options.finish_at, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(models.load_model(name, "cpu"), config)
    model.print_trainable_parameters()
    reslora.print_links(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output), max_steps=options.steps, logging_steps=10,
            per_device_train_batch_size=options.batch_size, learning_rate=options.lr,
            eval_strategy="steps", eval_steps=max(1, options.steps // 2), report_to=[],
            save_steps=options.steps, use_cpu=True,
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
    )  # fmt: skip
    batches = [{"input_ids": rows} for rows in train[:128].split(16)]
    ResLoraCallback(calibration=batches).add_to(trainer)
    trainer.train()
    model.save_pretrained(options.output / "adapter")
    print(reslora.merge_report(model, [{"input_ids": rows} for rows in held_out[:32].split(16)]))
    reslora.calibrate(model, batches)
    model.merge_and_unload().save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    print(f"In {options.output}: adapter/ (PEFT reads it after `import reslora.peft`) and merged/.")


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    return exit_code_of("train_lm", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
