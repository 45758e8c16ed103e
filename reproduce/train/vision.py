"""What training and judging vision transformers needs: the model and its file, batches, loss and accuracy."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import nn
from tqdm import tqdm

from ..data.augment import Augmentation, augmented, sent
from ..data.images import ImageData
from ..models.rows import Row
from ..models.vit import ViT
from ..store.bits import packed
from ..store.checked import Part, Size, check, read_json
from ..store.saved import built, described, fill, read_model
from .distributed import ALONE, Workers
from .loop import Diverged, TrainResult
from .settings import TrainConfig

SHIFT = 4  # pixels


class VitShape(Part):
    """The arguments of ViT but `attention`, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid")

    image_size: Size
    patch_size: Size
    channels: Size
    n_classes: Size
    d_model: Size
    n_heads: Size
    n_layers: Size


def build_vit(shape: dict) -> ViT:
    """A vision transformer with multi-head attention, freshly initialised.

    Args:
        shape: the arguments of ViT but `attention`.
    """
    return ViT(**shape, attention=Row("MHA").build)


def load_vit(path: Path) -> tuple[ViT, dict]:
    """A model that `pretrained` kept.

    Args:
        path: the file.

    Returns:
        The model in evaluation mode, and its file's metadata.

    Raises:
        ValueError: if the file holds something else.
    """
    metadata, tensors = read_model(path)
    if "vit" not in metadata:
        raise ValueError(f"{path} holds no vision transformer of this program")
    with described(path):
        shape = read_json(metadata["vit"], "its vit")
        check(VitShape, shape, "its vit")
    model = built(path, lambda: build_vit(shape), shape["n_layers"])
    return fill(model, metadata, tensors, path), metadata


def batches(data: ImageData, settings: TrainConfig, seed: int, first_step: int = 0, augmented: bool = False) -> Callable:
    """Random images for every step, a function of seed and step alone.

    Args:
        data: where they come from.
        settings: how many a step takes.
        seed: of the run.
        first_step: where this phase begins.
        augmented: whether they are `moved`.

    Returns:
        step -> (b, side, side, channels) uint8 and (b,) int64.
    """

    def batch_at(step):
        rng = np.random.default_rng((seed, first_step + step))
        chosen = rng.integers(0, len(data.x_train), size=settings.batch_size)
        images = data.x_train[chosen]  # (b, side, side, channels)
        if augmented:
            images = moved(images, rng)
        return torch.from_numpy(images), torch.from_numpy(data.y_train[chosen])

    return batch_at


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by up to SHIFT pixels in both directions over black, half of them mirrored.

    Args:
        images: (b, side, side, channels).
        rng: decides all of it.

    Returns:
        The same shape.
    """
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    first = rng.integers(0, 2 * SHIFT + 1, size=(2, len(images), 1))
    rows, columns = first + np.arange(side)  # (b, side) each: which pixels of the padded image are seen
    columns = np.where(rng.random((len(images), 1)) < 0.5, columns, columns[:, ::-1])
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def loss_on(data: ImageData) -> Callable:
    """(model, images, labels) -> mean cross-entropy, as `train` takes it, of images with this data's pixel range."""

    def loss_of(model, images, labels):
        return F.cross_entropy(model(as_input(images, data.pixel_range)).float(), labels)

    return loss_of


def outcome(training: Callable[[], TrainResult], judge: Callable[[], dict], settings: TrainConfig) -> tuple[TrainResult, dict]:
    """What a fine-tuning left behind, and the metrics of what came out.

    Args:
        training: trains.
        judge: measures what was trained.
        settings: how many images it saw.

    Returns:
        The metrics are the judgement, or at which step it diverged; the last one, where logits are no numbers after it.
    """
    try:
        result = training()
    except Diverged as error:
        tqdm.write(f"{error}; recorded")
        return error.result, {"diverged_at": error.step}
    judged = judge()
    if math.isnan(judged["top1"]):
        tqdm.write(f"after step {settings.steps}, the last one, logits are no numbers; recorded as diverged")
        return result, {"diverged_at": settings.steps}
    return result, {**judged, "images_seen": settings.steps * settings.batch_size}


def as_input(images: torch.Tensor, pixel_range: int) -> torch.Tensor:
    """Images as a vision transformer takes them.

    Args:
        images: (b, side, side, channels) uint8.
        pixel_range: the largest pixel value.

    Returns:
        (b, channels, side, side) in [-1, 1].
    """
    return scaled(images.permute(0, 3, 1, 2), pixel_range)


def scaled(images: torch.Tensor, pixel_range: int) -> torch.Tensor:
    """Pixels from 0 to pixel_range, in any order of the axes, as float32 in [-1, 1]."""
    return images.float() / pixel_range * 2 - 1


def judged(model: nn.Module, data: ImageData, device: str) -> dict:
    """The model's accuracy on the test images.

    Args:
        model: it is left in evaluation mode.
        data: whose test images.
        device: where the model is.

    Returns:
        As `accuracy`.
    """
    model.eval()
    pairs = (torch.from_numpy(data.x_test).split(500), torch.from_numpy(data.y_test).split(500))
    return accuracy(lambda images: model(as_input(images, data.pixel_range)), zip(*pairs), device)


@torch.no_grad()
def accuracy(
    logits_of: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, device: str, workers: Workers = ALONE
) -> dict:
    """Share of images whose class is the first guess, or among the first five, over all workers.

    Args:
        logits_of: images -> logits (b, classes).
        batches: images as logits_of takes them, and labels (b,); of several workers this one's.
        device: where logits_of computes.
        workers: those that share the images.

    Returns:
        `top1` and `top5`, from 0 to 1; NaN where logits are: of them any class would be the first guess.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # first guesses, first five, images
    for images, labels in batches:
        logits = logits_of(images.to(device))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]  # (b, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
        counts += torch.where(logits.isfinite().all(), 0.0, torch.nan)
    top1, top5, images = workers.mean(counts).tolist()
    return {"top1": top1 / images, "top5": top5 / images}


# With images on the device, augmentation as DeiT has it, and images held out to choose by.


@dataclass(frozen=True)
class ImageSets:
    """Images and labels where the model is, each (n, channels, side, side) uint8 and (n,) int64.

    Args:
        train, held_out, test: to learn from, to choose settings by, and for the result.
        n_classes: as in `ImageData`.
        pixel_range: as in `ImageData`.
    """

    train: tuple[torch.Tensor, torch.Tensor]
    held_out: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    n_classes: int
    pixel_range: int

    @classmethod
    def of(cls, data: ImageData, device: str) -> "ImageSets":
        """All images of a set that holds some out.

        Args:
            data: as `holding_out` gives it.
            device: where they go.
        """

        def moved_there(x, y):
            return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device), torch.from_numpy(y).to(device)

        pairs = ((data.x_train, data.y_train), (data.x_held_out, data.y_held_out), (data.x_test, data.y_test))
        return cls(*(moved_there(*pair) for pair in pairs), data.n_classes, data.pixel_range)

    def batches(self, settings: TrainConfig, seed: int, how: Augmentation, first_step: int = 0) -> Callable:
        """Augmented images for every step, a function of seed and step alone; each image once in an epoch.

        Args:
            settings: how many a step takes.
            seed: of the run.
            how: the augmentation.
            first_step: where this phase begins.

        Returns:
            step -> (b, channels, side, side) float32 and targets (b, classes).
        """
        images, labels = self.train

        def batch_at(step):
            numbers = sent(in_epochs(len(labels), settings.batch_size, seed, first_step + step), labels.device)
            rng = np.random.default_rng((seed, first_step + step))
            return augmented(images[numbers], labels[numbers], self.n_classes, how, rng)

        return batch_at

    def loss(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy with targets that are shares of classes, as `train` takes it.

        Args:
            model: gives logits.
            images: (b, channels, side, side).
            targets: (b, classes).
        """
        return F.cross_entropy(model(scaled(images, self.pixel_range)).float(), targets)

    def judged(self, model: nn.Module) -> dict:
        """What a model reaches: on the test images `top1`, `top5` and in `hits` which images these are; on those held out
        `validation_loss`, `validation_top1` and `validation_top5`, by which settings are chosen.

        Args:
            model: it is left in evaluation mode.
        """
        loss, *held_out = self.guesses(model, *self.held_out)
        _, *test = self.guesses(model, *self.test)
        names = ("top1", "top5")
        return {
            **{name: float(hits.mean()) if math.isfinite(loss) else math.nan for name, hits in zip(names, test)},
            "hits": {name: packed(hits) for name, hits in zip(names, test)},
            "validation_loss": loss,
            **{f"validation_{name}": float(hits.mean()) for name, hits in zip(names, held_out)},
        }

    @torch.no_grad()
    def guesses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
        """In float32, and not compiled: other batches than those of the training would be compiled anew.

        Args:
            model: it is left in evaluation mode.
            images: (n, channels, side, side) uint8.
            labels: (n,).

        Returns:
            The mean cross-entropy in nats, and (n,) bool each: whether the class is the first guess, or among the first five.
        """
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            logits = torch.cat([model(scaled(part, self.pixel_range)).float() for part in images.split(500)])  # (n, classes)
        hits = (logits.topk(min(5, self.n_classes)).indices == labels[:, None]).cpu().numpy()  # (n, 5)
        return F.cross_entropy(logits, labels).item(), hits[:, 0], hits.any(axis=1)


def in_epochs(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which images a step takes: each once in an epoch, whose order the seed decides; a batch may end one and begin the next.

    Args:
        count: images in all.
        batch_size: of a step.
        seed: of the run.
        step: from 0.

    Returns:
        (batch_size,) numbers below count.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    return np.concatenate([_order(count, seed, int(e))[places[epochs == e] % count] for e in np.unique(epochs)])


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch + 1)).permutation(count)
