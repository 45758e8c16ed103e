"""Figure 3, ViT: accuracy against attention parameters. A vision transformer is pretrained with multi-head attention; its layers
are converted to GQA, MLA and Tucker at several budgets, and each conversion is fine-tuned for the same few epochs.

--steps, --warmup-steps and --learning-rate are those of the fine-tuning."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .data.images import ImageData, load_images
from .distributed import ALONE, Workers
from .language import model_path
from .models.vit import ViT
from .options import Options
from .records import done
from .rows import Row
from .runs import Run, override, selected
from .saved import described, fill, kept, make_room, read_model, write_model
from .sizes import count_parameters
from .training import Diverged, TrainConfig, TrainResult, train


@dataclass(frozen=True)
class Preset:
    """pretrain: multi-head attention from scratch; finetune: every conversion, whose steps are set by `epochs`.

    augmented: every image of a batch is moved by up to SHIFT pixels each way, and half of them mirrored.
    """

    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    rows: tuple[Row, ...]
    pretrain: TrainConfig
    finetune: TrainConfig
    epochs: int
    seeds: tuple[int, ...] = (0,)
    augmented: bool = False


SHIFT = 4

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
            Row("MLA", latent=32, shared_kv=True),
            Row("MLA", latent=16, shared_kv=True),
            Row("MLA", latent=8, shared_kv=True),
            Row("MLA", latent=4, shared_kv=True),
            Row("Tucker", ranks=(6, 24, 24)),
            Row("Tucker", ranks=(4, 16, 16)),
            Row("Tucker", ranks=(4, 8, 8)),
            Row("Tucker", ranks=(4, 4, 4)),
        ),
        pretrain=TrainConfig(steps=500, batch_size=64, learning_rate=2e-3, warmup_steps=25, weight_decay=0.05, beta2=0.99),
        finetune=TrainConfig(steps=0, batch_size=64, learning_rate=1e-3, warmup_steps=10, weight_decay=0.05, beta2=0.99),
        epochs=3,
        seeds=(0, 1),
    ),
    # For images of 32 x 32 (CIFAR-10) or 64 x 64: as wide as DeiT-S, half as deep.
    "gpu": Preset(
        patch_size=4,
        d_model=384,
        n_heads=12,
        n_layers=6,
        rows=(
            Row("MHA"),
            *(Row("GQA", n_kv_heads=groups) for groups in (6, 3, 2, 1)),
            *(Row("MLA", latent=latent, shared_kv=True) for latent in (128, 64, 32, 16)),
            *(Row("Tucker", ranks=ranks) for ranks in ((12, 128, 128), (8, 64, 64), (8, 32, 32), (8, 24, 24), (6, 16, 16))),
            *(Row("Tucker", ranks=ranks) for ranks in ((12, 64, 64), (12, 32, 32), (12, 20, 20))),  # no head given up
        ),
        pretrain=TrainConfig(
            steps=6000,
            batch_size=512,
            learning_rate=1e-3,
            warmup_steps=300,
            weight_decay=0.05,
            beta2=0.99,
            precision="bfloat16",
            log_every=50,
            checkpoint_every=500,
        ),
        finetune=TrainConfig(
            steps=0,
            batch_size=512,
            learning_rate=3e-4,
            warmup_steps=30,
            weight_decay=0.05,
            beta2=0.99,
            precision="bfloat16",
            log_every=50,
            checkpoint_every=500,
        ),
        epochs=3,
        seeds=(0, 1, 2, 3, 4),
        augmented=True,
    ),
    "paper": None,  # other models and other data: figure3_paper.py
}


def run(options: Options) -> None:
    """Per seed and learning rate one record per row, per seed one of the pretrained model."""
    if options.learning_rates:
        for at_rate in options.at_each_rate():
            run(at_rate)
        return
    if options.preset == "paper":
        from . import figure3_paper  # it opens models, and what opens models knows this module

        return figure3_paper.run(options)
    if options.workers.count > 1 or options.dry_run:
        raise ValueError("figure3 knows torchrun and --dry-run in its preset paper alone")
    if options.model or options.workers.micro_batch or options.workers.sharding:
        raise ValueError("figure3 knows --model, --micro-batch and --sharding in its preset paper alone")
    preset = PRESETS[options.preset]
    rows = selected(preset.rows, options.rows)
    data = load_images(options.images)
    batch = preset.finetune.batch_size
    steps = preset.epochs * len(data.x_train) // batch
    if steps == 0:
        raise ValueError(
            f"{data.name} holds {len(data.x_train)} training images; {preset.epochs} epochs need one batch of {batch}"
        )
    settings = override(dataclasses.replace(preset.finetune, steps=steps), options)
    shape = {"image_size": data.x_train.shape[1], "channels": data.x_train.shape[3], "n_classes": data.n_classes}
    shape |= {name: getattr(preset, name) for name in ("patch_size", "d_model", "n_heads", "n_layers")}
    for seed in options.seeds or preset.seeds:
        config = {**shape, "pretrain": preset.pretrain.config()}
        if preset.augmented:
            config["augmented"] = True
        start = Run("figure3", options, "MHA pretrained", config, seed, data.describe())
        config = {**config, "train": settings.config(), "epochs": preset.epochs}
        runs = {row: Run("figure3", options, row.label, {**config, "row": row.config()}, seed, data.describe()) for row in rows}
        left = {row: this for row, this in runs.items() if not this.is_done()}
        if left:
            model = pretrained(start, shape, preset, data)
            for row, this in left.items():
                fine_tune(copy.deepcopy(model), row, this, settings, preset, data)


def pretrained(this: Run, shape: dict, preset: Preset, data: ImageData) -> ViT:
    """The multi-head model of this seed: from the output folder, or trained, recorded and kept there.

    Raises Diverged if its training does.
    """
    settings = preset.pretrain
    path = model_path(this.options.out, f"figure3 {this.method} seed {this.seed}")
    if done(this.options.records, this.identity) and (place := kept(path, this.identity)):
        return load_vit(place)[0].to(this.options.device)
    torch.manual_seed(this.seed)
    model = build_vit(shape).to(this.options.device)
    batch_at = batches(data, settings, this.seed, augmented=preset.augmented)
    result = train(model, batch_at, loss_on(data), settings, this.checkpoint, this.title)
    make_room(path, this.identity)
    write_model(path, model, {"vit": json.dumps(shape), "run": this.identity})
    this.finish(
        {
            **judged(model, data, this.options.device),
            "images_seen": settings.steps * settings.batch_size,
            "attention_parameters": count_parameters(block.attention for block in model.blocks),
            "curve": result.curve,
        },
        result.seconds,
    )
    return model


def fine_tune(model: ViT, row: Row, this: Run, settings: TrainConfig, preset: Preset, data: ImageData) -> None:
    """Convert every layer, measure, fine-tune, measure again, record; a run that diverges is on record as such."""
    for block in model.blocks:
        block.attention = row.converted(block.attention)
    before = {
        "converted": judged(model, data, this.options.device),
        "attention_parameters": count_parameters(block.attention for block in model.blocks),
    }
    batch_at = batches(data, settings, this.seed, preset.pretrain.steps, preset.augmented)
    result, after = outcome(
        lambda: train(model, batch_at, loss_on(data), settings, this.checkpoint, this.title),
        lambda: judged(model, data, this.options.device),
        settings,
    )
    this.finish({**after, **before, "curve": result.curve}, result.seconds)


def outcome(training: Callable[[], TrainResult], judge: Callable[[], dict], settings: TrainConfig) -> tuple[TrainResult, dict]:
    """What a fine-tuning left behind, and the metrics of what came out: the judgement, or at which step it diverged."""
    try:
        return training(), {**judge(), "images_seen": settings.steps * settings.batch_size}
    except Diverged as error:
        tqdm.write(f"{error}; recorded")
        return error.result, {"diverged_at": error.step}


def build_vit(shape: dict) -> ViT:
    """Multi-head attention, freshly initialised.  shape: the arguments of ViT but `attention`."""
    return ViT(**shape, attention=Row("MHA").build)


def load_vit(path: Path) -> tuple[ViT, dict]:
    """A model that `pretrained` kept, and its file's metadata.  Raises ValueError if the file holds something else."""
    metadata, tensors = read_model(path)
    if "vit" not in metadata:
        raise ValueError(f"{path} holds no vision transformer of this program")
    with described(path):
        model = build_vit(json.loads(metadata["vit"]))
    return fill(model, metadata, tensors, path), metadata


def batches(data: ImageData, settings: TrainConfig, seed: int, first_step: int = 0, augmented: bool = False) -> Callable:
    """step -> random images and their labels, a function of seed and step alone; first_step: where this phase begins."""

    def batch_at(step):
        rng = np.random.default_rng((seed, first_step + step))
        chosen = rng.integers(0, len(data.x_train), size=settings.batch_size)
        images = data.x_train[chosen]  # (b, side, side, channels)
        if augmented:
            images = moved(images, rng)
        return torch.from_numpy(images), torch.from_numpy(data.y_train[chosen])

    return batch_at


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """images (b, side, side, channels), each moved by up to SHIFT pixels in both directions over black, half of them mirrored."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    first = rng.integers(0, 2 * SHIFT + 1, size=(2, len(images), 1))
    rows, columns = first + np.arange(side)  # (b, side) each: which pixels of the padded image are seen
    columns = np.where(rng.random((len(images), 1)) < 0.5, columns, columns[:, ::-1])
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def loss_on(data: ImageData) -> Callable:
    def loss_of(model, images, labels):
        return F.cross_entropy(model(as_input(images, data.pixel_range)).float(), labels)

    return loss_of


def as_input(images: torch.Tensor, pixel_range: int) -> torch.Tensor:
    """(b, side, side, channels) uint8 -> (b, channels, side, side) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / pixel_range * 2 - 1


def judged(model: nn.Module, data: ImageData, device: str) -> dict:
    """The model's accuracy on the test images."""
    model.eval()
    pairs = (torch.from_numpy(data.x_test).split(500), torch.from_numpy(data.y_test).split(500))
    return accuracy(lambda images: model(as_input(images, data.pixel_range)), zip(*pairs), device)


@torch.no_grad()
def accuracy(
    logits_of: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, device: str, workers: Workers = ALONE
) -> dict:
    """Share of images whose class is the first guess (top1), or among the first five (top5), over all workers.

    batches: images as logits_of takes them, and labels (b,); of several workers this one's.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # first guesses, first five, images
    for images, labels in batches:
        logits = logits_of(images.to(device))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]  # (b, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    top1, top5, images = workers.mean(counts).tolist()
    return {"top1": top1 / images, "top5": top5 / images}
