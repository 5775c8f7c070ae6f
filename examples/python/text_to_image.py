"""Teach a small text-to-image model a style with diffusers: LoRA and every shortcut, then merged.

    python text_to_image.py                     # minutes on two cores
    python text_to_image.py --data FOLDER       # your own tiles_rgba32.npz and captions.csv

A diffusion transformer that reads captions is pretrained on the pictures of items, then adapted to
those of monsters by plain LoRA, plain LoRA of doubled lora_alpha and the shortcuts. Written are a
table of held-out losses, unmerged and merged, `grid.png` (a row of samples for the model before,
and for each method after training and after merging), and for each method a LoRA that
`load_lora_weights` reads.

--data holds `tiles_rgba32.npz` (array `rgba`, uint8 [count, 32, 32, 4]) and `captions.csv` with the
columns category (item or mon) and caption.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from console import Parser, UserError, at_least, exit_code_of, folder, positive, progress_bar
from torch import Tensor, nn

import reslora

METHODS = (  # name, res_mode, pre_num, factor of lora_alpha
    ("LoRA", "none", 1, 1), ("LoRA, doubled alpha", "none", 1, 2), ("is", "is", 1, 1),
    ("bs", "bs", 2, 1), ("ms", "ms", 2, 1),
)  # fmt: skip
WORDS, WIDTH = 8, 64  # words of a caption that are read, and the width of their vectors
BACKGROUND = 96


def read(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pictures [count, 3, 32, 32] in -1..1 and caption vectors, by category."""
    import numpy

    for name in ("tiles_rgba32.npz", "captions.csv"):
        if not (folder / name).is_file():
            raise UserError(f"--data must hold {name}; got {folder} (see --help for the formats)")
    rgba = torch.from_numpy(numpy.load(folder / "tiles_rgba32.npz")["rgba"]).float()
    alpha = rgba[..., 3:] / 255
    pictures = (rgba[..., :3] * alpha + BACKGROUND * (1 - alpha)).permute(0, 3, 1, 2) / 127.5 - 1
    with open(folder / "captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    vectors = torch.stack([caption_vectors(row["caption"]) for row in rows])
    found = {}
    for category in ("item", "mon"):
        own = [n for n, row in enumerate(rows) if row["category"] == category]
        found[category] = pictures[own], vectors[own]
    return found


def caption_vectors(caption: str) -> Tensor:
    """Return a fixed random vector for each of the first words; zeros where there are fewer."""
    vectors = torch.zeros(WORDS, WIDTH)
    for n, word in enumerate(caption.replace(",", " ").split()[:WORDS]):
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        vectors[n] = torch.randn(WIDTH, generator=generator)
    return vectors


def make_model() -> nn.Module:
    """Return a diffusion transformer of 8 blocks that attends to the caption."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=8, cross_attention_dim=128,
        caption_channels=WIDTH, in_channels=3, out_channels=3, sample_size=32, patch_size=4,
        use_additional_conditions=False,
    )  # fmt: skip


def make_scheduler() -> Any:
    """Return the noise schedule; the model finds the picture: it is learned sooner."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=200, beta_schedule="squaredcos_cap_v2", prediction_type="sample"
    )


def noisy(
    data: tuple[Tensor, Tensor], chosen: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """Return what the model is called with, and the pictures that it should find."""
    scheduler, pictures = make_scheduler(), data[0][chosen]
    noise = torch.randn(pictures.shape, generator=generator)
    steps = torch.randint(200, (len(chosen),), generator=generator)
    sample = scheduler.add_noise(pictures, noise, steps)
    call = {"hidden_states": sample, "timestep": steps, "encoder_hidden_states": data[1][chosen]}
    return {"call": call, "pictures": pictures}


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, lr: float, name: str, batch: int
) -> None:
    """Train what requires a gradient; the same noise for every method."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in progress_bar(range(steps), name):
        chosen = torch.randint(len(data[0]), (batch,), generator=generator)
        case = noisy(data, chosen, generator)
        nn.functional.mse_loss(model(**case["call"]).sample, case["pictures"]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the loss on all pictures, with the same noise each time."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for chosen in torch.arange(len(data[0])).split(64):
        case = noisy(data, chosen, generator)
        error = model(**case["call"]).sample - case["pictures"]
        total += error.square().mean().item() * len(chosen)
    return total / len(data[0])


@torch.no_grad()
def sample(model: nn.Module, vectors: Tensor) -> Tensor:
    """Draw pictures for captions, from the same noise each time."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(20)
    x = torch.randn(len(vectors), 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for step in scheduler.timesteps:
        case = {"timestep": step.expand(len(x)), "encoder_hidden_states": vectors}
        x = scheduler.step(model(x, **case).sample, step, x).prev_sample
    return x.clamp(-1, 1)


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Write a picture with a row of samples for each entry."""
    from matplotlib.figure import Figure

    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.9 * count + 1.5, 0.95 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(((picture + 1) / 2).permute(1, 2, 0))
            one.set_xticks([])
            one.set_yticks([])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=150)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pretrain, adapt by every method, merge, export, draw."""
    options.output.mkdir(parents=True, exist_ok=True)
    data = read(options.data)
    style = data["mon"]
    held_out = tuple(part[::10] for part in style)
    kept = torch.arange(len(style[0])) % 10 != 0
    own = tuple(part[kept] for part in style)
    torch.manual_seed(0)
    base = make_model()
    train(base, data["item"], options.pretrain_steps, 2e-3, "pretraining", options.batch_size)
    captions = held_out[1][: options.samples]
    rows = {"before": sample(base, captions)}
    results = [{"method": "before", "loss": loss_of(base, held_out)}]
    generator = torch.Generator().manual_seed(3)
    calibration = [noisy(own, c, generator)["call"] for c in torch.arange(128).split(32)]
    for name, res_mode, pre_num, factor in METHODS:
        model = copy.deepcopy(base)
        torch.manual_seed(0)
        config = reslora.ResLoraConfig.preset("image", res_mode=res_mode, pre_num=pre_num)
        config.lora_alpha *= factor
        reslora.inject(model, config)
        train(model, own, options.steps, options.lr, name, options.batch_size)
        entry = {"method": name, "loss": loss_of(model, held_out)}
        rows[name] = sample(model, captions)
        batches = None if res_mode in ("none", "bs") else calibration
        folder = options.output / f"lora-{name.replace(', ', '-').replace(' ', '-')}"
        reslora.export_diffusers(model, folder, "transformer", data=batches)
        merged = reslora.merge_and_unload(model)
        entry["merged"] = loss_of(merged, held_out)
        rows[f"{name}, merged"] = sample(merged, captions)
        results.append(entry)
    draw(rows, options.output / "grid.png")
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nloss on {len(held_out[0])} held-out pictures of the new style, one seed")
    for entry in results:
        merged_loss = f", merged {entry['merged']:.4f}" if "merged" in entry else ""
        print(f"{entry['method']:20} {entry['loss']:.4f}{merged_loss}")
    print(f"In {options.output}: grid.png, results.json, and a LoRA for each method.")
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=folder, default=Path("../shared/data/dungeon_tiles"))
    parser.add_argument("--output", type=folder, default=Path("text-to-image-results"))
    parser.add_argument("--pretrain-steps", type=at_least(1), default=1500)
    parser.add_argument("--steps", type=at_least(1), default=300)
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--lr", type=positive, default=2e-3)
    parser.add_argument("--samples", type=at_least(1), default=8)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    return exit_code_of("text_to_image", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
