"""Figure 3, ViT: accuracy against attention parameters. So far every layer is trained from scratch; the paper converts
pretrained layers and fine-tunes them."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data.images import ImageData, load_images
from .models.vit import ViT
from .options import Options
from .rows import Row
from .runs import Run, override, selected
from .training import TrainConfig, train


@dataclass(frozen=True)
class Preset:
    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    rows: tuple[Row, ...]
    train: TrainConfig
    seeds: tuple[int, ...] = (0,)


PRESETS = {
    "smoke": Preset(
        patch_size=2,
        d_model=64,
        n_heads=8,
        n_layers=3,
        rows=(
            Row("MHA"),
            Row("GQA", n_kv_heads=4),
            Row("GQA", n_kv_heads=2),
            Row("GQA", n_kv_heads=1),
            Row("MLA", latent=16, shared_kv=True),
            Row("MLA", latent=8, shared_kv=True),
            Row("MLA", latent=4, shared_kv=True),
            Row("Tucker", ranks=(4, 16, 16)),
            Row("Tucker", ranks=(4, 8, 8)),
            Row("Tucker", ranks=(4, 4, 4)),
        ),
        train=TrainConfig(steps=250, batch_size=64, learning_rate=2e-3, warmup_steps=25, weight_decay=0.05, beta2=0.99),
        seeds=(0, 1),
    ),
}


def run(options: Options) -> None:
    """One record per row and seed."""
    preset = PRESETS[options.preset]
    rows = selected(preset.rows, options.rows)
    data = load_images(options.images)
    for row in rows:
        for seed in options.seeds or preset.seeds:
            train_row(row, seed, preset, data, options)


def train_row(row: Row, seed: int, preset: Preset, data: ImageData, options: Options) -> None:
    """Train a ViT with this row's attention and record its top-1 and top-5 accuracy on the test images."""
    settings = override(preset.train, options)
    shape = {name: getattr(preset, name) for name in ("patch_size", "d_model", "n_heads", "n_layers")}
    config = {"row": row.config(), **shape, "train": dataclasses.asdict(settings)}
    this = Run("figure3", options, row.label, config, seed, data.describe())
    if this.is_done():
        return
    torch.manual_seed(seed)
    side, channels = data.x_train.shape[1], data.x_train.shape[3]
    model = ViT(side, preset.patch_size, channels, data.n_classes, preset.d_model, preset.n_heads, preset.n_layers, row.build)
    model = model.to(options.device)

    def batch_at(step):
        chosen = np.random.default_rng((seed, step)).integers(0, len(data.x_train), size=settings.batch_size)
        return torch.from_numpy(data.x_train[chosen]), torch.from_numpy(data.y_train[chosen])

    def loss_of(model, images, labels):
        return F.cross_entropy(model(as_input(images, data.pixel_range)).float(), labels)

    result = train(model, batch_at, loss_of, settings, this.checkpoint, this.title)
    this.finish(
        {
            **accuracy(model, data, options.device),
            "images_seen": settings.steps * settings.batch_size,
            "attention_parameters": sum(p.numel() for block in model.blocks for p in block.attention.parameters()),
            "curve": result.curve,
        },
        result.seconds,
    )


def as_input(images: torch.Tensor, pixel_range: int) -> torch.Tensor:
    """(b, side, side, channels) uint8 -> (b, channels, side, side) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / pixel_range * 2 - 1


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData, device: str, batch_size: int = 500) -> dict:
    """Share of test images whose class is the model's first guess (top1), or among its first five (top5)."""
    model.eval()
    hits = []
    for start in range(0, len(data.x_test), batch_size):
        images = torch.from_numpy(data.x_test[start : start + batch_size]).to(device)
        logits = model(as_input(images, data.pixel_range))
        labels = torch.from_numpy(data.y_test[start : start + batch_size]).to(device)
        hits.append(logits.topk(min(5, data.n_classes)).indices == labels[:, None])  # (b, 5)
    hits = torch.cat(hits)
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(dim=1).float().mean().item()}
