"""Classify sentences with any encoder: SST-2 and MRPC, by the paper's settings for GLUE.

    python glue.py --task sst2                              # a small BERT, made here in minutes
    python glue.py --task mrpc --model FacebookAI/roberta-large --steps 2000 --lr 3e-4

Plain LoRA, plain LoRA of doubled lora_alpha and the shortcuts are trained from the same start on
the same batches; a table shows accuracy unmerged and merged. The fresh head is trained and saved
with the adapter (modules_to_save). One seed of a small model: it shows that the parts work, not
which method is better.

--data is the folder with `sst2/stsa.binary.{train,dev}` (a label and a sentence a line) and
`mrpc/msr-para-{train,val}.tsv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from console import Parser, UserError, at_least, exit_code_of, folder, positive, progress_bar

import reslora

FILES = {
    "sst2": ("sst2/stsa.binary.train", "sst2/stsa.binary.dev"),
    "mrpc": ("mrpc/msr-para-train.tsv", "mrpc/msr-para-val.tsv"),
}
METHODS = (  # name, res_mode, factor of lora_alpha
    ("LoRA", "none", 1), ("LoRA, doubled alpha", "none", 2), ("is", "is", 1), ("bs", "bs", 1),
    ("ms", "ms", 1),
)  # fmt: skip
Rows = list[tuple[int, list[str]]]


def read(folder: Path, task: str) -> tuple[Rows, Rows]:
    """Return (label, sentences) of the training and the development part."""
    parts = []
    for name in FILES[task]:
        path = folder / name
        if not path.is_file():
            raise UserError(f"--data must hold {name}; got {folder} (see --help for the formats)")
        text = path.read_text(encoding="utf-8-sig")
        if task == "sst2":
            lines = [line.split(" ", 1) for line in text.splitlines() if line]
            parts.append([(int(label), [sentence]) for label, sentence in lines])
        else:
            rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
            parts.append([(int(r["Quality"]), [r["#1 String"], r["#2 String"]]) for r in rows])
    return parts[0], parts[1]


def encode(tokenizer: Any, rows: Rows, length: int) -> dict[str, torch.Tensor]:
    """Return padded ids, mask and labels."""
    columns = list(zip(*(sentences for _, sentences in rows), strict=True))
    found = tokenizer(
        *(list(column) for column in columns), padding=True, truncation=True, max_length=length,
        return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    return dict(found) | {"labels": torch.tensor([label for label, _ in rows])}


def pick(data: dict[str, torch.Tensor], chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return rows without the columns that only pad them."""
    length = int(data["attention_mask"][chosen].sum(1).max())
    return {k: v[chosen] if k == "labels" else v[chosen, :length] for k, v in data.items()}


def small_bert(rows: Rows, options: argparse.Namespace) -> tuple[Any, Any]:
    """Make an encoder: a tokenizer and a BERT that was trained to tell a sentence's words.

    All words are told from the first token's vector, which is what a classifier reads; to fill in
    masked words takes far longer to learn.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sentences = [sentence for _, own in rows for sentence in own]
    made = BertWordPieceTokenizer()
    made.train_from_iterator(sentences, vocab_size=4000, show_progress=False)
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **special)
    torch.manual_seed(options.seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=options.length, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id, num_labels=2,
    )  # fmt: skip
    model = BertModel(config).train()
    words = torch.nn.Linear(config.hidden_size, len(tokenizer))
    data = encode(tokenizer, [(0, [sentence]) for sentence in sentences], options.length)
    optimizer = torch.optim.AdamW([*model.parameters(), *words.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.pretrain_steps)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in progress_bar(range(options.pretrain_steps), "pretraining"):
        batch = pick(data, torch.randint(len(sentences), (64,), generator=generator))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        first = model(input_ids=ids, attention_mask=mask).pooler_output
        told = words(first).log_softmax(-1).gather(1, ids)
        (-(told * mask).sum() / mask.sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tokenizer, model


def load(name: str, trained: Any, options: argparse.Namespace) -> Any:
    """Return a classifier with a fresh head, the same each time."""
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

    torch.manual_seed(options.seed)
    if trained is None:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model = BertForSequenceClassification(trained.config)
    model.bert.load_state_dict(trained.state_dict())
    return model


def heads_of(model: Any) -> list[str]:
    """Return the parts that are fresh: all that stands beside the encoder."""
    encoder = model.base_model_prefix
    return [
        n
        for n, m in model.named_children()
        if n != encoder and next(m.parameters(), None) is not None
    ]


def batches(data: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """Return the data in batches."""
    count = len(data["labels"])
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, count, size)]


@torch.no_grad()
def accuracy(model: Any, data: dict[str, torch.Tensor]) -> float:
    """Return the share of right answers."""
    model.eval()
    right = sum(
        (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        for batch in batches(data, 128)
    )
    return right / len(data["labels"])


def train(
    model: Any, data: dict[str, torch.Tensor], options: argparse.Namespace, name: str
) -> None:
    """Train what requires a gradient; every method sees the same batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    model.train()
    for _ in progress_bar(range(options.steps), name):
        chosen = torch.randint(len(data["labels"]), (options.batch_size,), generator=generator)
        model(**pick(data, chosen)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every method and print the table."""
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    rows, held_out = read(options.data, options.task)
    trained = None
    if options.model is None:
        tokenizer, trained = small_bert(rows, options)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
    if trained is not None and options.output is not None:
        trained.save_pretrained(options.output / "base")
        tokenizer.save_pretrained(options.output / "base")
    data, dev = (encode(tokenizer, part, options.length) for part in (rows, held_out))
    calibration = [{k: v for k, v in b.items() if k != "labels"} for b in batches(data, 64)[:16]]
    results = []
    for name, res_mode, factor in METHODS:
        model = load(options.model, trained, options)
        config = reslora.ResLoraConfig.preset(
            "nlu", res_mode=res_mode, modules_to_save=heads_of(model)
        )
        config.lora_alpha *= factor
        torch.manual_seed(options.seed)
        reslora.inject(model, config)
        train(model, data, options, name)
        unmerged = accuracy(model, dev)
        if options.output is not None:
            reslora.save_pretrained(
                model, options.output / name.replace(", ", "-").replace(" ", "-")
            )
        exact = res_mode in ("none", "bs")
        merged = reslora.merge_and_unload(model, data=None if exact else calibration)
        results.append({"method": name, "accuracy": unmerged, "merged": accuracy(merged, dev)})
    labels = dev["labels"].bincount()
    print(
        f"\n{options.task}, {len(held_out)} held-out rows, {options.steps} steps; always the more "
        f"frequent label: {labels.max().item() / len(held_out):.4f}"
    )
    for row in results:
        print(f"{row['method']:22} accuracy {row['accuracy']:.4f}, merged {row['merged']:.4f}")
    if options.output is not None:
        (options.output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=FILES, default="sst2")
    parser.add_argument("--data", type=folder, default=Path("../shared/data"))
    parser.add_argument("--model", help="encoder of the Hub, or folder (default: made here)")
    parser.add_argument("--steps", type=at_least(1), default=300)
    parser.add_argument("--pretrain-steps", type=at_least(1), default=800)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--length", type=at_least(8), default=64, help="tokens of a row at most")
    parser.add_argument("--lr", type=positive, default=3e-3, help="the paper: 3e-4")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--output", type=folder, help="folder for adapters and results.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    return exit_code_of("glue", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
