"""Figure 3 on Tiny-ImageNet: a hundred classes, so that top-5, the paper's measure, can tell rows apart.

A ViT-S for small images is pretrained with multi-head attention, converted row by row, and fine-tuned for ten epochs. All rates are
chosen by top-5 on training images that are held out: with seed CHOOSES the pretraining and every row run at several, and the other seeds
take the best of them. Seed CHOOSES then judges nothing, and the test images are read for the result alone.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..data.augment import Augmentation
from ..data.images import ImageData, load_images
from ..models.public.opened import OpenModel
from ..models.rows import Row
from ..models.sizes import count_parameters
from ..models.vit import ViT
from ..store.records import done, load
from ..store.saved import kept, make_room, write_model
from ..train.dry_run import Plan
from ..train.language import model_path
from ..train.loop import TrainResult, train
from ..train.options import STARTS, Options
from ..train.runs import Run, check_labels, override
from ..train.settings import TrainConfig
from ..train.vision import ImageSets, build_vit, load_vit, outcome, scaled
from .moments import moments

PRETRAINED = "MHA pretrained"
CHOOSES = 0  # the seed whose runs choose every rate
CALIBRATION = 1000  # training images, as they are, that the second moments are taken from; 100 at a time


def unequal(row: Row) -> Row:
    """As many parameters to the last one, but half of the query rank is given to the output."""
    r, s, t = row.ranks
    return dataclasses.replace(row, ranks=(r, s // 2, t), post_ranks=(r, s + s // 2, t))


def _tucker(heads: int, ranks: Iterable[int]) -> tuple[Row, ...]:
    return tuple(Row("Tucker", ranks=(heads, rank, rank)) for rank in ranks)


WHOLE, TWO_THIRDS = _tucker(12, (64, 32, 24, 20, 16)), _tucker(8, (64, 32, 24, 20, 16))
# As many parameters, 0.5 to 1.5 % fewer, as the row with 8 of 12 heads that stands beside it, but all heads.
ALL_HEADS = dict(
    zip(("Tucker [8,64,64]", "Tucker [8,32,32]", "Tucker [8,24,24]", "Tucker [8,16,16]"), _tucker(12, (56, 29, 22, 15)))
)


# Rows that are converted in another way too, of two sizes and with fewer heads or all; all rows would triple the study. HOOI refits Tucker
# factors alone, second moments weigh whatever is cut.
REFITTED = ("Tucker [8,32,32]", "Tucker [8,20,20]", "Tucker [12,20,20]")
STARTED_ANEW = {"hooi": REFITTED, "moment": ("GQA n_KV=3", "MLA shared d_c=64", *REFITTED)}


@dataclass(frozen=True)
class Preset:
    """One scale.

    Args:
        image_size, channels, n_classes, images: of the data, as the dry run takes them: a run reads them from the images.
        patch_size, d_model, n_heads, n_layers: of the vision transformer.
        rows: what its attention is converted to.
        started_anew: by start other than the HOSVD the labels of the rows that are converted so too.
        held_out: training images to choose by.
        pretrain, finetune: how; steps follow from epochs, and rates are those below.
        pretrain_epochs, epochs: of both, over the images that are trained on.
        pretrain_rates, rates: each is tried with seed CHOOSES.
        seeds: CHOOSES, and those that judge.
        augmentation: of both.
    """

    rows: tuple[Row, ...]
    pretrain: TrainConfig
    finetune: TrainConfig
    image_size: int = 64
    channels: int = 3
    n_classes: int = 100
    images: int = 50_000
    patch_size: int = 8
    d_model: int = 384
    n_heads: int = 12
    n_layers: int = 12
    held_out: int = 5_000
    pretrain_epochs: int = 100
    epochs: int = 10
    pretrain_rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (CHOOSES, 1, 2, 3, 4, 5)
    augmentation: Augmentation = field(default_factory=Augmentation)
    started_anew: dict[str, tuple[str, ...]] = field(default_factory=STARTED_ANEW.copy)

    def started(self, how: str) -> list[Row]:
        """The rows that are converted by a start, a key of `STARTS`."""
        return [row for row in self.rows if how == "hosvd" or row.label in self.started_anew[how]]

    def of_equal_ranks(self) -> dict[str, str]:
        """By row with unequal ranks the row of its size that has equal ones."""
        equal = {unequal(row).label: row.label for row in self.rows if row.ranks and not row.post_ranks}
        return {row.label: equal[row.label] for row in self.rows if row.label in equal}


SETTINGS = TrainConfig(
    steps=0, batch_size=512, learning_rate=0.0, warmup_steps=440, final_share=0.0, weight_decay=0.05, beta2=0.99,
    precision="bfloat16", compiled=True, log_every=100, checkpoint_every=1000,
)  # fmt: skip
PRESETS = {
    "gpu-tiny-imagenet": Preset(
        rows=(
            Row("MHA"),
            *(Row("GQA", n_kv_heads=groups) for groups in (6, 3, 1)),
            *(Row("MLA", latent=latent, shared_kv=True) for latent in (128, 64, 32)),
            *WHOLE,
            *TWO_THIRDS,
            *map(unequal, WHOLE + TWO_THIRDS),
            *ALL_HEADS.values(),
        ),
        pretrain=SETTINGS,
        # Not compiled: that takes as long as half a run, and several runs at a time fill a GPU as well.
        finetune=dataclasses.replace(SETTINGS, warmup_steps=44, compiled=False),
    ),
}
OURS = (
    "5,000 training images held out; all rates chosen by top-5 on them with seed 0, which then judges nothing",
    "five rates from 1.25e-4 to 2e-3 for the pretraining, four from 3e-5 to 1e-3 for every row",
    "DeiT's augmentation but for colour jitter, erasing, repeats and stochastic depth",
)


def run(options: Options) -> list[Plan]:
    """Per seed one record of the pretrained model, with seed CHOOSES one for each rate; per row and seed likewise.

    Args:
        options: `rows` by label, PRETRAINED among them, or none for all; `seeds`; `images`; `start`; `learning_rates` and
            `pretrain_rates` in place of those that are tried and chosen.

    Returns:
        The plans of a dry run, otherwise nothing.

    Raises:
        ValueError: for a label that no row has, no images or grey ones, and rates that are not chosen yet.
        Diverged: if a pretraining does.
    """
    preset = PRESETS[options.preset]
    rows, alone = rows_of(preset, options)
    if options.dry_run:
        return plans_of(preset, rows, options)
    if options.images is None:
        raise ValueError(f"--preset {options.preset} is trained on images that you bring: name an .npz file with --images")
    data = load_images(options.images).holding_out(preset.held_out)
    if data.x_train.shape[3] != 3 or data.pixel_range != 255:
        raise ValueError(
            f"--images {options.images}: its images are {data.x_train.shape[1:]}; augmentation takes three colours"
        )
    study = Study(preset, options, data)
    for seed in options.seeds or preset.seeds:
        for rate in study.pretrain_rates(seed):
            this = study.pretraining(seed, rate)
            if not this.is_done() or (alone and not study.kept(this)):
                study.pretrained(this)
        for rate in study.start_rates(seed) if not alone else ():
            start = Start(study, seed, rate)
            for row in rows:
                fine_tune(start, row)
    return []


def rows_of(preset: Preset, options: Options) -> tuple[list[Row], bool]:
    """The rows to run: those that are converted by a start, and of them those that are named.

    Args:
        preset: all rows.
        options: `rows` by label, and `start`.

    Returns:
        The rows, and whether the pretraining alone is asked for.

    Raises:
        ValueError: for a label that none of them has.
    """
    rows = preset.started(options.start)
    check_labels("row", options.rows, [PRETRAINED, *(row.label for row in rows)])
    named = [row for row in rows if row.label in options.rows]
    return (named if options.rows else rows), set(options.rows) == {PRETRAINED}


@dataclass
class Study:
    """A preset on its images: which runs there are, and how each is done.

    Args:
        preset, options: what is run.
        data: the images, some of them held out.
    """

    preset: Preset
    options: Options
    data: ImageData

    @functools.cached_property
    def images(self) -> ImageSets:
        """On the device; not before a run is left to do."""
        return ImageSets.of(self.data, self.options.device)

    # Which runs there are.

    @property
    def shape(self) -> dict:
        """The arguments of `build_vit`."""
        given = {"image_size": self.data.x_train.shape[1], "channels": 3, "n_classes": self.data.n_classes}
        return given | {name: getattr(self.preset, name) for name in ("patch_size", "d_model", "n_heads", "n_layers")}

    def pretrain_settings(self, rate: float) -> TrainConfig:
        """Those of the pretraining at a rate."""
        return _settings(self.preset.pretrain, self.preset.pretrain_epochs, len(self.data.x_train), rate)

    def settings(self, rate: float) -> TrainConfig:
        """Those of a fine-tuning at a rate, with what the command line changes."""
        plain = _settings(self.preset.finetune, self.preset.epochs, len(self.data.x_train), rate)
        return dataclasses.replace(override(plain, self.options), learning_rate=rate)

    def pretraining(self, seed: int, rate: float) -> Run:
        """The run of a pretraining."""
        config = {**self.shape, "held_out": self.preset.held_out, "augmentation": self.preset.augmentation.config()}
        config["pretrain"] = self.pretrain_settings(rate).config()
        return Run("figure3", self.options, PRETRAINED, config, seed, self.data.describe())

    def fine_tuning(self, row: Row, seed: int, start: float, rate: float) -> Run:
        """The run of one row.

        Args:
            row, seed: which.
            start: rate of the pretraining.
            rate: of the fine-tuning.
        """
        config = {**self.pretraining(seed, start).config, "train": self.settings(rate).config(), "epochs": self.preset.epochs}
        config |= {"row": row.config()} | ({} if self.options.start == "hosvd" else {"start": self.options.start})
        return Run("figure3", self.options, row.label + STARTS[self.options.start], config, seed, self.data.describe())

    # Rates: tried with one seed, and chosen by it for all.

    def pretrain_rates(self, seed: int) -> tuple[float, ...]:
        """At which rates a seed is pretrained."""
        return self.options.pretrain_rates or (self.preset.pretrain_rates if seed == CHOOSES else self.start_rates(seed))

    def start_rates(self, seed: int) -> tuple[float, ...]:
        """Of the models that a seed's rows start from: those that are given, or the best.

        Raises:
            ValueError: if those of seed CHOOSES are not all on record.
        """
        tried = {rate: self.pretraining(CHOOSES, rate) for rate in self.preset.pretrain_rates}
        return self.options.pretrain_rates or (self.best(tried, "--pretrain-rate"),)

    def rates(self, row: Row, seed: int, start: float) -> tuple[float, ...]:
        """At which rates a row is fine-tuned: those that are given; all with seed CHOOSES; else the best.

        Args:
            row, seed: which.
            start: rate of the pretraining.

        Raises:
            ValueError: if those of seed CHOOSES are not all on record.
        """
        if self.options.learning_rates:
            return self.options.learning_rates
        if seed == CHOOSES:
            return self.preset.rates
        tried = {rate: self.fine_tuning(row, CHOOSES, start, rate) for rate in self.preset.rates}
        return (self.best(tried, "--learning-rate"),)

    def best(self, tried: dict[float, Run], option: str) -> float:
        """The rate that is best on held-out images, as `Record.on_held_out` has it.

        Args:
            tried: the run at each rate.
            option: which says the rate, where nothing is to be chosen.

        Raises:
            ValueError: naming the rates that are not on record.
        """
        known = {record.id: record for record in load(self.options.records, "figure3", self.options.preset)}
        missing = [f"{rate:g}" for rate, this in tried.items() if this.identity not in known]
        if missing:
            title = next(iter(tried.values())).title
            raise ValueError(
                f"{title}: its rate is not chosen yet, {', '.join(missing)} are not on record in {self.options.records}; run "
                f"--seeds {CHOOSES} first, or name a rate with {option}"
            )
        return min(tried, key=lambda rate: known[tried[rate].identity].on_held_out)

    # How they are done.

    def pretrained(self, this: Run) -> tuple[ViT, str]:
        """The model of a pretraining, on the device: from the output folder, or trained, recorded and kept there.

        Args:
            this: which.

        Returns:
            The model, and what tells it from another one: a model that is not there any more is trained again, and no GPU gives
            the same digits twice.

        Raises:
            Diverged: if its training does.
        """
        model = load_vit(self.kept(this) or self.pretrain(this))[0]
        return model.to(self.options.device), weights_hash(model)

    def path(self, this: Run) -> Path:
        """Where the model of a pretraining is kept."""
        return model_path(self.options.out, f"{this.title} rate {this.config['pretrain']['learning_rate']:g}")

    def kept(self, this: Run) -> Path | None:
        """Where the model of a pretraining that is on record lies, if it does."""
        return kept(self.path(this), this.identity) if done(self.options.records, this.identity) else None

    def pretrain(self, this: Run) -> Path:
        """Train, keep and record a multi-head model.

        Args:
            this: which.

        Returns:
            Where it is kept.
        """
        settings, path = self.pretrain_settings(this.config["pretrain"]["learning_rate"]), self.path(this)
        torch.manual_seed(this.seed)
        model = build_vit(self.shape).to(self.options.device)
        batch_at = self.images.batches(settings, this.seed, self.preset.augmentation)
        result = train(model, batch_at, self.images.loss, settings, this.checkpoint, this.title)
        make_room(path, this.identity)
        write_model(path, model, {"vit": json.dumps(self.shape), "run": this.identity})
        layers = count_parameters(block.attention for block in model.blocks)
        seen = {"images_seen": settings.steps * settings.batch_size, "attention_parameters": layers}
        this.finish({**self.images.judged(model), **seen, **self.about(settings, result)}, result.seconds)
        return path

    def about(self, settings: TrainConfig, result: TrainResult) -> dict:
        """What the metrics say of a training itself.

        Args:
            settings: how long it was.
            result: what it left behind.
        """
        finished = result.curve and result.curve[-1][0] == settings.steps
        tokens = (self.data.x_train.shape[1] // self.preset.patch_size) ** 2 + 1
        seen = settings.steps * settings.batch_size * tokens
        speed = round(seen / result.seconds) if finished and result.seconds and len(result.machines) == 1 else None
        return {"tokens_per_second": speed, "curve": result.curve}


@dataclass
class Start:
    """The pretrained model that all rows of a seed start from: read when it is first needed, and once.

    Args:
        study: whose images and folders.
        seed, rate: of the pretraining.
    """

    study: Study
    seed: int
    rate: float

    @functools.cached_property
    def kept(self) -> tuple[ViT, str]:
        """As `Study.pretrained`."""
        return self.study.pretrained(self.study.pretraining(self.seed, self.rate))

    @functools.cached_property
    def moments(self) -> list[torch.Tensor]:
        """Second moments of what each block's attention receives, (d, d), on training images as they are."""
        model, images = self.kept[0], self.study.images
        layers: dict[str, nn.Module] = {f"blocks.{n}.attention": block.attention for n, block in enumerate(model.blocks)}
        forward = lambda model, x: model(scaled(x, images.pixel_range))  # noqa: E731
        opened = OpenModel("ViT", model, layers, forward, lambda _, layer: layer, {}, image_size=self.study.shape["image_size"])
        x, _ = images.train
        chosen = torch.linspace(0, len(x) - 1, min(CALIBRATION, len(x))).long()  # from all over, so that no class is missing
        return list(moments(opened, layers, list(x[chosen.to(x.device)].split(100))).values())

    def converted(self, row: Row, how: str) -> ViT:
        """A copy with other attention in every block.

        Args:
            row: what its attention becomes.
            how: a key of `STARTS`.
        """
        model = copy.deepcopy(self.kept[0])
        known = self.moments if how == "moment" else [None] * len(model.blocks)
        for block, moment in zip(model.blocks, known):
            block.attention = row.converted(block.attention, moment=moment, method="hooi" if how == "hooi" else "hosvd")
        return model


def fine_tune(start: Start, row: Row) -> None:
    """Convert, measure, and from there for each rate: fine-tune, measure again, record. What is on record is skipped.

    Args:
        start: the pretrained model.
        row: what its attention becomes.
    """
    study, seed = start.study, start.seed
    runs = {rate: study.fine_tuning(row, seed, start.rate, rate) for rate in study.rates(row, seed, start.rate)}
    left = {rate: this for rate, this in runs.items() if not this.is_done()}
    if not left:
        return
    converted = start.converted(row, study.options.start)
    before = {
        "converted": study.images.judged(converted),
        "attention_parameters": count_parameters(block.attention for block in converted.blocks),
        "start": start.kept[1],
    }
    for rate, this in left.items():
        tune(copy.deepcopy(converted), this, study.settings(rate), start, before)


def tune(model: ViT, this: Run, settings: TrainConfig, start: Start, before: dict) -> None:
    """One fine-tuning; one that diverges is on record as such.

    Args:
        model: the converted one, changed in place.
        this: the run to record.
        settings: how.
        start: after whose pretraining the order of the images goes on.
        before: metrics of the converted model.
    """
    study, images = start.study, start.study.images
    first_step = study.pretrain_settings(start.rate).steps
    batch_at = images.batches(settings, this.seed, study.preset.augmentation, first_step)
    result, after = outcome(
        lambda: train(model, batch_at, images.loss, settings, this.checkpoint, this.title),
        lambda: images.judged(model),
        settings,
    )
    this.finish({**after, **before, **study.about(settings, result)}, result.seconds)


def weights_hash(model: nn.Module) -> str:
    """What tells these weights from others, as 16 hex digits; a file of them may be written in more than one way.  model: on any device."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _settings(plain: TrainConfig, epochs: int, images: int, rate: float) -> TrainConfig:
    """Those of a preset with the steps of so many epochs over so many images, and with a rate."""
    return dataclasses.replace(plain, steps=epochs * images // plain.batch_size, learning_rate=rate)


def plans_of(preset: Preset, rows: list[Row], options: Options) -> list[Plan]:
    """What the pretraining and one fine-tuning of each row would take.

    Args:
        preset: whose expected images count.
        rows: to be fine-tuned.
        options: seeds, and what changes the settings.
    """
    images = preset.images - preset.held_out
    rates = {"pretrain": options.pretrain_rates or preset.pretrain_rates, "rows": options.learning_rates or preset.rates}
    pretrain = _settings(preset.pretrain, preset.pretrain_epochs, images, rates["pretrain"][0])
    finetune = override(_settings(preset.finetune, preset.epochs, images, rates["rows"][0]), options)
    by_label = {PRETRAINED: Row("MHA")} | {row.label: row for row in rows}
    names = ("image_size", "channels", "n_classes", "patch_size", "d_model", "n_heads", "n_layers")
    shape = {name: getattr(preset, name) for name in names}

    def build(label: str, **changes) -> ViT:
        return ViT(**shape | changes, attention=by_label[label].build)

    def plan(title: str, labels: tuple[str, ...], settings: TrainConfig) -> Plan:
        return Plan(
            experiment="figure3",
            title=f"figure3, preset {options.preset}, {title},",
            data=options.images or "Tiny-ImageNet, 100 of its classes",
            labels=labels,
            build=build,
            block=lambda label: build(label, n_layers=1).blocks[0],
            settings=settings,
            samples="images",
            tokens=(preset.image_size // preset.patch_size) ** 2 + 1,
            outputs=preset.n_classes,
            seeds=options.seeds or preset.seeds,
            largest_micro_batch=None,
            shape=shape,
            known=(),
            ours=OURS,
        )

    plans = [plan("pretraining", (PRETRAINED,), pretrain)]
    return plans + ([plan("fine-tuning", tuple(row.label for row in rows), finetune)] if rows else [])
