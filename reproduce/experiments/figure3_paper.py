"""Figure 3 at the paper's scale: public vision transformers, converted layer by layer and fine-tuned on ImageNet-1k.

ViT-G/14, which the figure shows as well, is not among the models here; any vision transformer can be named with --model.
"""

import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tucker_ref import MultiHeadAttention

from ..data.imagenet import CLASSES, TRAIN_IMAGES, Photographs, held_out_batches, load_photographs, training_batches
from ..models.public.agreement import TRUSTED
from ..models.public.checkpoint import identity
from ..models.public.opened import OpenModel
from ..models.rows import Row
from ..models.sizes import count_parameters
from ..models.vit import ViT
from ..train.dry_run import Plan
from ..train.loop import train
from ..train.options import Options
from ..train.public_models import configured, open_model
from ..train.runs import Run, override, selected
from ..train.settings import TrainConfig
from ..train.vision import accuracy, as_input, outcome


@dataclass(frozen=True)
class Pretrained:
    """A public model, its shape for the dry run, and the rows that it is converted to.

    Args:
        name: as transformers or timm call it.
        patch_size: pixels each way.
        d_model, n_heads, n_layers: its shape.
        rows: the conversions.
    """

    name: str
    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    rows: tuple[Row, ...]


def _rows(groups: tuple[int, ...], latents: tuple[int, ...], ranks: tuple[tuple[int, int, int], ...]) -> tuple[Row, ...]:
    return (
        Row("MHA"),
        *(Row("GQA", n_kv_heads=n) for n in groups),
        *(Row("MLA", latent=width, shared_kv=True) for width in latents),
        *(Row("Tucker", ranks=triple) for triple in ranks),
    )


@dataclass(frozen=True)
class Preset:
    """How the public models are fine-tuned.

    Args:
        models: those of the figure.
        train: how each conversion is fine-tuned; its steps are set by `epochs` and the number of images.
        epochs: passes over the training images.
        seeds: one run of each row each.
        micro_batch: images that one GPU takes at once, at most.
    """

    models: tuple[Pretrained, ...]
    train: TrainConfig
    epochs: int
    seeds: tuple[int, ...]
    micro_batch: int


PRESET = Preset(
    models=(
        Pretrained(
            "google/vit-large-patch32-224-in21k",
            *(32, 1024, 16, 24),
            _rows((8, 4, 2, 1), (256, 128, 64, 32), ((16, 256, 256), (12, 128, 128), (8, 64, 64), (8, 32, 32))),
        ),
        Pretrained(
            "google/vit-base-patch16-224-in21k",
            *(16, 768, 12, 12),
            _rows((6, 3, 2, 1), (192, 96, 48, 24), ((12, 192, 192), (8, 96, 96), (8, 48, 48), (6, 24, 24))),
        ),
    ),
    train=TrainConfig(
        steps=0,
        batch_size=512,
        learning_rate=1e-3,
        warmup_steps=1000,
        final_share=0.0,
        weight_decay=0.05,
        beta2=0.999,
        precision="bfloat16",
        log_every=100,
        checkpoint_every=500,
    ),
    epochs=10,
    seeds=(0, 1, 2, 3, 4),
    micro_batch=64,
)
KNOWN = (
    "pretrained ViT-L/32 and ViT-B/16 on ImageNet-1k",
    "10 epochs",
    "AdamW, warm-up and cosine",
    "global batch 512 and peak rate 1e-3 for L/32",
    "5 runs",
    "SVD for GQA and MLA, HOSVD for Tucker",
)
OURS = (
    "the public checkpoints, pretrained on ImageNet-21k, with a fresh classifier that starts at zero, at 224 pixels",
    "batch and rate for B/16, L/32's",
    "no ViT-G/14: which checkpoint the paper took is not known to us",
    "the rows' groups, latents and ranks",
    "random crops of 8 to 100 % of the area and mirroring, the middle at test time",
    "MLA has no biases: only the queries' bias is lost (the keys' has no effect, a constant stands for the others)",
)


def run(options: Options) -> list[Plan]:
    """One record per model, row and seed.

    Args:
        options: `rows` by label, `seeds`, `images`; `model` names another checkpoint, whose rows are the first model's.

    Returns:
        The plans of a dry run, one per model; otherwise nothing.

    Raises:
        ValueError: for --sharding fsdp, a label that no row has, or a dry run of another checkpoint.
    """
    if options.workers.sharding == "fsdp":
        raise ValueError("figure3: its models fit on one GPU; --sharding fsdp is for table2 and table3")
    workers = dataclasses.replace(options.workers, sharding="ddp")
    options = dataclasses.replace(options, workers=workers)
    models = PRESET.models
    if options.model:
        models = (dataclasses.replace(models[0], name=options.model),)
    chosen = [(pretrained, selected(pretrained.rows, options.rows)) for pretrained in models]
    if options.dry_run:
        if options.model:
            raise ValueError(
                f"--dry-run knows the shapes of {' and '.join(m.name for m in PRESET.models)} alone, not --model's"
            )
        return [plan_of(pretrained, rows, options) for pretrained, rows in chosen]
    photographs_of = functools.cache(lambda side: load_photographs(options.images, options.out / "cache", side))
    for pretrained, rows in chosen:
        subject = Subject(pretrained.name, photographs_of, options.trust_layers)
        for at_rate, seed, row in itertools.product(options.at_each_rate(), options.seeds or PRESET.seeds, rows):
            fine_tune(subject, row, seed, at_rate)
    return []


@dataclass
class Subject:
    """A model by its name for --model, and the photographs of each side: all are read when they are first needed, and once.

    What is on record needs the model's name and image size and the photographs' labels alone.

    Args:
        model: its name or folder.
        photographs_of: gives the photographs at a side in pixels.
    """

    model: str
    photographs_of: Callable[[int], Photographs]
    trust_layers: bool = False

    @functools.cached_property
    def opened(self) -> OpenModel:
        """The model with its weights."""
        return open_model(self.model, trust_layers=self.trust_layers, head=False)

    @functools.cached_property
    def config(self) -> dict:
        """What a record says of it.

        Raises:
            ValueError: for a model of text.
        """
        known = configured(self.model)
        name, side = known or (self.opened.name, self.opened.image_size)
        if side is None:
            raise ValueError(f"--model {self.model} takes no images")
        weights = identity(self.model) if known else self.opened.weights
        trusted = TRUSTED if self.trust_layers else {}
        return {"model": name.split("/")[-1], "image_size": side, "weights": weights, **trusted}

    @property
    def photographs(self) -> Photographs:
        """Those of the side that the model takes."""
        return self.photographs_of(self.config["image_size"])


def settings_for(n_images: int, options: Options) -> TrainConfig:
    """The preset's, with the steps of its epochs over so many images, and with what the command line changes.

    Args:
        n_images: how many train.
        options: of which learning rate, steps and warm-up count.
    """
    steps = PRESET.epochs * n_images // PRESET.train.batch_size
    return override(dataclasses.replace(PRESET.train, steps=steps), options)


def fine_tune(subject: Subject, row: Row, seed: int, options: Options) -> None:
    """Convert every layer of a fresh copy of the model, measure, fine-tune, measure again, record. What is on record is skipped.

    Args:
        subject: the model and its photographs.
        row: what its attention becomes.
        seed: of the order of images and of their crops.
        options: device, workers, folders, and what changes the settings.
    """
    photographs = subject.photographs
    settings = settings_for(len(photographs.train), options)
    config = {**subject.config, "row": row.config(), "epochs": PRESET.epochs, "train": settings.config()}
    this = Run("figure3", options, f"{row.label}, {config['model']}", config, seed, photographs.describe())
    if this.is_done():
        return
    opened = copy.deepcopy(subject.opened)
    torch.manual_seed(seed)
    opened.put({place: converted(layer, row) for place, layer in opened.layers.items()})
    with_classes(opened, photographs.n_classes)
    model = opened.model.to(options.device)
    workers = options.workers.settled(settings.batch_size, count_parameters([model]), PRESET.micro_batch)
    processes = decoders(workers.count)

    def loss_of(model, images, labels):
        return F.cross_entropy(opened.logits(model, as_input(images, 255)).float(), labels)

    def judged() -> dict:
        images = held_out_batches(photographs, PRESET.micro_batch, slice(workers.rank, None, workers.count), processes)
        opened.model.eval()
        return accuracy(lambda x: opened.logits(opened.model, as_input(x, 255)), images, options.device, workers)

    at_once = judged()
    batch_at = training_batches(photographs, settings.batch_size, seed, workers.rows(settings.batch_size), processes)
    before = {
        "converted": at_once,
        "attention_parameters": count_parameters(model.get_submodule(place) for place in opened.layers),
        "workers": workers.describe(settings.batch_size),
    }
    result, after = outcome(
        lambda: train(model, batch_at, loss_of, settings, this.checkpoint, this.title, workers=workers), judged, settings
    )
    if workers.is_first:
        this.finish({**after, **before, "curve": result.curve}, result.seconds)
    workers.wait()


def converted(layer: nn.Module, row: Row) -> nn.Module:
    """The layer as this row's attention; MLA knows no biases, and gets what remains of them as a constant behind it.

    Args:
        layer: multi-head attention.
        row: whose mechanism and sizes count.

    Returns:
        Attention of the same signature.
    """
    if row.mechanism != "MLA" or not layer.bias:
        return row.converted(layer)
    plain = MultiHeadAttention(layer.d_model, layer.n_heads, head_dim=layer.head_dim).to(layer.o_proj.weight)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name.endswith("weight")})
    plain.scale = layer.scale
    with torch.no_grad():
        constant = layer.o_proj(layer.v_proj.bias)  # attention weights sum to one
    return Shifted(row.converted(plain), constant)


class Shifted(nn.Module):
    """An attention layer, and a constant added to its output.

    Args:
        attention: any layer that gives (b, n, d).
        constant: (d,), a parameter from then on.
    """

    def __init__(self, attention: nn.Module, constant: torch.Tensor):
        super().__init__()
        self.attention, self.constant = attention, nn.Parameter(constant.clone())

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        """x: (b, n, d); the other arguments are the layer's.  Returns: (b, n, d)."""
        return self.attention(x, **options) + self.constant


def with_classes(opened: OpenModel, n_classes: int) -> None:
    """A classifier of so many classes that starts at zero, unless the model has one of that size.

    Args:
        opened: changed in place.
        n_classes: outputs of the classifier.
    """
    place = "classifier" if hasattr(opened.model, "classifier") else "head"  # in transformers, in timm
    if getattr(opened.model.get_submodule(place), "out_features", None) != n_classes:
        head = nn.Linear(next(iter(opened.layers.values())).d_model, n_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        opened.model.set_submodule(place, head)


def decoders(count: int) -> int:
    """How many processes decode photographs for each of the workers of one machine.

    Args:
        count: workers, where torchrun does not say how many are on this machine.

    Returns:
        At least 1.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return max(1, (os.cpu_count() or 1) // here - 1)


def plan_of(pretrained: Pretrained, rows: list[Row], options: Options) -> Plan:
    """What `run` would take for one model.

    Sizes are those of this repository's own ViT: public ones add biases, 0.1 %.

    Args:
        pretrained: the model.
        rows: its conversions.
        options: seeds, workers and settings.
    """
    settings, by_label = settings_for(TRAIN_IMAGES, options), {row.label: row for row in rows}
    shape = {name: getattr(pretrained, name) for name in ("patch_size", "d_model", "n_heads")}

    def build(label: str, n_layers: int = pretrained.n_layers) -> ViT:
        return ViT(224, channels=3, n_classes=CLASSES, n_layers=n_layers, attention=by_label[label].build, **shape)

    return Plan(
        experiment="figure3",
        title=f"figure3, preset paper, {pretrained.name},",
        data="ImageNet-1k",
        labels=tuple(by_label),
        build=build,
        block=lambda label: build(label, 1).blocks[0],
        settings=settings,
        samples="images",
        tokens=(224 // pretrained.patch_size) ** 2 + 1,
        outputs=CLASSES,
        seeds=options.seeds or PRESET.seeds,
        largest_micro_batch=PRESET.micro_batch,
        shape={"model": pretrained.name.split("/")[-1]},
        known=KNOWN,
        ours=OURS,
    )
