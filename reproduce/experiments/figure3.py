"""Figure 3, ViT: accuracy against attention parameters. A vision transformer is pretrained with multi-head attention; its layers
are converted to GQA, MLA and Tucker at several budgets, and each conversion is fine-tuned for the same few epochs.

--steps, --warmup-steps and --learning-rate are those of the fine-tuning."""

import copy
import dataclasses
import itertools
import json
from dataclasses import dataclass

import torch

from ..data.images import ImageData, load_images
from ..models.rows import Row
from ..models.sizes import count_parameters
from ..models.vit import ViT
from ..store.records import done
from ..store.saved import kept, make_room, write_model
from ..train.dry_run import Plan
from ..train.language import model_path
from ..train.loop import train
from ..train.options import Options
from ..train.runs import Run, override, selected
from ..train.settings import TrainConfig
from ..train.vision import batches, build_vit, judged, load_vit, loss_on, outcome
from . import figure3_paper, figure3_tiny


@dataclass(frozen=True)
class Preset:
    """One pretraining, and the fine-tuning of every conversion.

    Args:
        patch_size: pixels each way.
        d_model, n_heads, n_layers: of the vision transformer.
        rows: what its attention is converted to.
        pretrain: multi-head attention from scratch.
        finetune: of every conversion; its steps are set by `epochs`.
        epochs: passes over the training images.
        seeds: one run of everything each.
        augmented: every image of a batch is moved by up to `vision.SHIFT` pixels each way, and half of them mirrored.
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


TAKES = ("device", "rows", "seeds", "training", "images", "pretrained", "conversion", "workers")
ON_GPU = dict(batch_size=512, weight_decay=0.05, beta2=0.99, precision="bfloat16", log_every=50, checkpoint_every=500)
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
        pretrain=TrainConfig(steps=6000, learning_rate=1e-3, warmup_steps=300, **ON_GPU),
        finetune=TrainConfig(steps=0, learning_rate=3e-4, warmup_steps=30, **ON_GPU),
        epochs=3,
        seeds=(0, 1, 2, 3, 4),
        augmented=True,
    ),
    "gpu-tiny-imagenet": None,  # rates that are chosen: figure3_tiny.py
    "paper": None,  # other models and other data: figure3_paper.py
}


def run(options: Options) -> list[Plan]:
    """Per seed and learning rate one record per row, per seed one of the pretrained model.

    Args:
        options: `rows` by label, `seeds`, `images`, and what changes the fine-tuning.

    Returns:
        The plans of a dry run, which the presets paper and gpu-tiny-imagenet know; otherwise nothing.

    Raises:
        ValueError: for options of another preset, a label that no row has, or too few images for one batch.
        Diverged: if the pretraining does.
    """
    check_options(options)
    if options.preset in figure3_tiny.PRESETS:
        return figure3_tiny.run(options)
    if options.preset == "paper":
        return figure3_paper.run(options)
    preset = PRESETS[options.preset]
    rows = selected(preset.rows, options.rows)
    data = load_images(options.images)
    batch = preset.finetune.batch_size
    steps = preset.epochs * len(data.x_train) // batch
    if steps == 0:
        raise ValueError(
            f"{data.name} holds {len(data.x_train)} training images; {preset.epochs} epochs need one batch of {batch}"
        )
    shape = {"image_size": data.x_train.shape[1], "channels": data.x_train.shape[3], "n_classes": data.n_classes}
    shape |= {name: getattr(preset, name) for name in ("patch_size", "d_model", "n_heads", "n_layers")}
    for at_rate, seed in itertools.product(options.at_each_rate(), options.seeds or preset.seeds):
        settings = override(dataclasses.replace(preset.finetune, steps=steps), at_rate)
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
    return []


def check_options(options: Options) -> None:
    """Raise ValueError for an option that the preset does not know."""
    paper, tiny = options.preset == "paper", options.preset in figure3_tiny.PRESETS
    if not paper and options.workers.count > 1:
        raise ValueError("figure3 knows torchrun in its preset paper alone")
    if not paper and (options.model or options.trust_layers or options.workers.micro_batch or options.workers.sharding):
        raise ValueError("figure3 knows --model, --trust-layers, --micro-batch and --sharding in its preset paper alone")
    if not (paper or tiny) and options.dry_run:
        raise ValueError(f"figure3 knows --dry-run in its presets paper and {', '.join(figure3_tiny.PRESETS)} alone")
    if not tiny and (options.start != "hosvd" or options.pretrain_rates):
        raise ValueError(f"figure3 knows --start and --pretrain-rate in its preset {', '.join(figure3_tiny.PRESETS)} alone")


def pretrained(this: Run, shape: dict, preset: Preset, data: ImageData) -> ViT:
    """The multi-head model of this seed: from the output folder, or trained, recorded and kept there.

    Args:
        this: the run of the pretraining.
        shape: arguments of `build_vit`.
        preset: how it is trained.
        data: what it is trained on.

    Raises:
        Diverged: if its training does.
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
    """Convert every layer, measure, fine-tune, measure again, record; a run that diverges is on record as such.

    Args:
        model: the pretrained one, changed in place.
        row: what its attention becomes.
        this: the run to record.
        settings: of the fine-tuning.
        preset: whether images are augmented, and after how many steps of pretraining their order goes on.
        data: images and labels.
    """
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
