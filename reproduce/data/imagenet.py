"""ImageNet-1k through `datasets`: photographs that are decoded, cropped and flipped while the model trains.

From the hub (ILSVRC/imagenet-1k, after accepting its terms there), or from a folder with train/CLASS/*.jpg and validation/CLASS/*.jpg.
Which images a step sees, and how each is cropped, is a function of seed, step and row alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..store.faults import as_one_line, first_line, is_of_a_file
from ..store.files import called
from .prepared import import_datasets

HUB_NAME = "ILSVRC/imagenet-1k"
TRAIN_IMAGES, CLASSES = 1_281_167, 1000
SMALLEST_CROP = 0.08  # of a photograph's area, as Inception was trained
TEST_MARGIN = 256 / 224  # the shorter side at test time, over the side that is kept


@dataclass(frozen=True)
class Photographs:
    """A training and a test set that stay on disk.

    Args:
        name: what a record calls them.
        sha256: of the labels in order, and of a folder's file names and sizes: a million photographs are not read twice.
        train, test: rows {"image": PIL image, "label": int} by number.
        n_classes: labels count from 0 to one less.
        side: of the square that the model sees, in pixels.
    """

    name: str
    sha256: str
    train: Dataset
    test: Dataset
    n_classes: int
    side: int

    def describe(self) -> dict:
        """What a record says of the data."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "classes": self.n_classes,
        }


def load_photographs(path: str | None, cache: Path, side: int) -> Photographs:
    """ImageNet-1k from the hub, or a folder of photographs.

    Args:
        path: a folder as described above; None for the hub.
        cache: where `datasets` keeps what it has read.
        side: as in `Photographs`.

    Raises:
        ValueError: if the folder has no train and validation in it, if `datasets` is not installed or cannot read them, or if a class
            has no photographs to train on.
    """
    datasets = import_datasets()
    if path is not None and (missing := [part for part in ("train", "validation") if not (Path(path) / part).is_dir()]):
        raise ValueError(f"--images {path}: no folder {' or '.join(missing)} in it")
    where, source, more = (HUB_NAME, HUB_NAME, {}) if path is None else (f"--images {path}", "imagefolder", {"data_dir": path})
    with as_one_line(lambda error: f"{where} cannot be read: {type(error).__name__}: {first_line(error)}"):
        splits = datasets.load_dataset(source, **more, cache_dir=str(cache))
        train, test = splits["train"], splits["validation"]
        of_train, of_test = (np.asarray(part.with_format("numpy")["label"][:]) for part in (train, test))
    if any(of.dtype.kind != "i" or of.min() < 0 for of in (of_train, of_test)):
        raise ValueError(f"{where}: there are photographs of no class; each must be train/CLASS/NAME or validation/CLASS/NAME")
    if len(unseen := np.setdiff1d(of_test, of_train)):
        raise ValueError(
            f"{where}: of class {train.features['label'].int2str(int(unseen[0]))} there are photographs in validation alone"
        )
    labels = np.concatenate([of_train, of_test]).astype(np.int64)
    digest = hashlib.sha256(labels.tobytes())
    if path is not None:  # labels alone would not tell one folder from another
        for file in sorted(p for part in ("train", "validation") for p in (Path(path) / part).rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    name = HUB_NAME if path is None else called(path)
    return Photographs(name, digest.hexdigest(), train, test, int(labels.max()) + 1, side)


# Not torchvision's RandomResizedCrop: it draws from the one generator of the process, to be set and put back for every image,
# which is no shorter; at 500 x 375 pixels, both bicubic, it takes 5.0 ms to this one's 3.9; and it cuts at whole pixels.
def training_view(image, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of a photograph, stretched to a square, and mirrored half of the time.

    Between 8 % and all of its area, as Inception was trained (Szegedy et al. 2015).

    Args:
        image: of PIL, any size and mode.
        side: of the square, in pixels.
        rng: decides all of it.

    Returns:
        (side, side, 3) uint8.
    """
    width, height = image.size
    area = width * height * rng.uniform(SMALLEST_CROP, 1.0)
    shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, (area * shape) ** 0.5), min(height, (area / shape) ** 0.5)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    view = np.asarray(image.convert("RGB").resize((side, side), box=(left, top, left + w, top + h)))
    return view[:, ::-1].copy() if rng.random() < 0.5 else view


def centre_view(image, side: int) -> np.ndarray:
    """The middle of a photograph.

    Args:
        image: of PIL, any size and mode.
        side: of the square, in pixels.

    Returns:
        (side, side, 3) uint8.
    """
    width, height = image.size
    kept = min(width, height) / TEST_MARGIN
    box = ((width - kept) / 2, (height - kept) / 2, (width + kept) / 2, (height + kept) / 2)
    return np.asarray(image.convert("RGB").resize((side, side), box=box))


class Unreadable(ValueError):
    """A photograph that cannot be used.

    Args:
        message: why; where another process decodes, torch puts that process's traceback before it.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].rpartition("Unreadable: ")[2])


def _photograph(rows: Dataset, number: int, where: str) -> tuple[Any, int]:
    """Image, of PIL, and label of a row.  Raises Unreadable for a damaged file, and for numbers that are not those of bytes."""
    try:
        row = rows[number]
        image, label = row["image"], row["label"]
        image.load()
    except Exception as error:
        if not is_of_a_file(error):
            raise
        raise Unreadable(f"{where}, photograph {number}: {first_line(error)}") from error
    if image.mode.startswith(("I", "F")):  # PIL would cut them off at 255
        raise Unreadable(f"{where}, photograph {number}: it is of mode {image.mode}; 8 bits for each colour are needed")
    return image, label


class _Views(Dataset):
    """Decoded rows by key: (step, row, number) of a training image, or the number of a test image."""

    def __init__(self, photographs: Photographs, seed: int | None):
        self.photographs, self.seed = photographs, seed

    def __getitem__(self, key) -> tuple[torch.Tensor, int]:
        side, name = self.photographs.side, self.photographs.name
        if self.seed is None:
            image, label = _photograph(self.photographs.test, int(key), f"validation of {name}")
            return torch.from_numpy(centre_view(image, side).copy()), label
        step, place, number = key
        image, label = _photograph(self.photographs.train, int(number), f"train of {name}")
        view = training_view(image, side, np.random.default_rng((self.seed, step, place)))
        return torch.from_numpy(view.copy()), label


def training_batches(
    photographs: Photographs, batch_size: int, seed: int, rows: slice, processes: int
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Random photographs for every step, a function of seed and step alone.

    Args:
        photographs: where they come from.
        batch_size: of the whole batch.
        seed: of the choice and the crops.
        rows: which of the batch are wanted, of several workers this one's.
        processes: how many decode the steps that follow; with 0 this one decodes.

    Returns:
        step -> (b, side, side, 3) uint8 and (b,) int64. A step out of order starts those processes anew.
    """

    def keys_from(step: int) -> Iterator[list[tuple[int, int, int]]]:
        while True:
            numbers = np.random.default_rng((seed, step)).integers(0, len(photographs.train), size=batch_size)
            yield [(step, place, int(numbers[place])) for place in range(batch_size)[rows]]
            step += 1

    coming, following = None, None

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal coming, following
        if step != following:
            loader = DataLoader(_Views(photographs, seed), batch_sampler=keys_from(step), num_workers=processes)
            coming = iter(loader)
        following = step + 1
        return tuple(next(coming))

    return batch_at


def held_out_batches(photographs: Photographs, batch_size: int, rows: slice, processes: int) -> Iterator:
    """The test images in order.

    Args:
        photographs, processes: as in `training_batches`.
        batch_size: images at a time.
        rows: which of all test images, of several workers this one's.

    Returns:
        Pairs of (b, side, side, 3) uint8 and (b,) int64.
    """
    numbers = range(len(photographs.test))[rows]
    return iter(DataLoader(_Views(photographs, None), batch_size, sampler=numbers, num_workers=processes))
