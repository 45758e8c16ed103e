"""What training and judging vision transformers needs: the model and its file, batches, loss and accuracy."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..data.images import ImageData
from ..models.rows import Row
from ..models.vit import ViT
from ..store.checked import Part, Size, check, read_json
from ..store.saved import built, described, fill, read_model
from .distributed import ALONE, Workers
from .loop import Diverged, TrainResult
from .settings import TrainConfig

SHIFT = 4  # pixels


class VitShape(Part):
    """The arguments of ViT but `attention`."""

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
        The metrics are the judgement, or at which step it diverged.
    """
    try:
        return training(), {**judge(), "images_seen": settings.steps * settings.batch_size}
    except Diverged as error:
        tqdm.write(f"{error}; recorded")
        return error.result, {"diverged_at": error.step}


def as_input(images: torch.Tensor, pixel_range: int) -> torch.Tensor:
    """Images as a vision transformer takes them.

    Args:
        images: (b, side, side, channels) uint8.
        pixel_range: the largest pixel value.

    Returns:
        (b, channels, side, side) in [-1, 1].
    """
    return images.permute(0, 3, 1, 2).float() / pixel_range * 2 - 1


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
        `top1` and `top5`, from 0 to 1.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # first guesses, first five, images
    for images, labels in batches:
        logits = logits_of(images.to(device))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]  # (b, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    top1, top5, images = workers.mean(counts).tolist()
    return {"top1": top1 / images, "top5": top5 / images}
