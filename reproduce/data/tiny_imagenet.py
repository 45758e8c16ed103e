"""`python -m reproduce.data.tiny_imagenet FOLDER images.npz`: Tiny-ImageNet's folder as the file that --images takes.

The folder is that of tiny-imagenet-200.zip, as it unpacks. Every second of its classes in order of their names is taken, a hundred; its
validation images are the test images here, since those of its test set have no labels.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ..console import at_the_terminal
from ..store.faults import as_one_line
from ..store.files import write_atomically

EVERY = 2  # of 200 classes


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Images and labels.

    Args:
        folder: with train/CLASS/images/*.JPEG, and val/images and val/val_annotations.txt.

    Returns:
        `x_train`, `y_train`, `x_test` and `y_test` as `load_images` reads them, class by class, in each in order of the names.

    Raises:
        ValueError: if there are no such images in it.
    """
    classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())[::EVERY]
    annotations = folder / "val" / "val_annotations.txt"
    if not classes or not annotations.is_file():
        raise ValueError(f"{folder} is no folder of Tiny-ImageNet: train/CLASS/images and val/val_annotations.txt are missing")
    lines = [line.split("\t")[:2] for line in annotations.read_text(encoding="utf-8").splitlines()]
    train = [sorted((folder / "train" / name / "images").glob("*.JPEG")) for name in classes]
    test = [sorted(folder / "val" / "images" / file for file, its in lines if its == name) for name in classes]
    return _labelled("train", train) | _labelled("test", test)


def _labelled(part: str, files: list[list[Path]]) -> dict[str, np.ndarray]:
    """files: those of each class.  Raises ValueError for images that cannot be read, or are not all of one size."""
    images = [_pixels(file) for of_class in files for file in of_class]
    if len(sizes := {image.shape for image in images}) != 1:
        raise ValueError(f"the {part} images have {len(sizes)} sizes; they must have one")
    return {f"x_{part}": np.stack(images), f"y_{part}": np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])}


def _pixels(file: Path) -> np.ndarray:
    """(64, 64, 3) uint8."""
    with as_one_line(lambda error: f"{file} cannot be read: {error}"), Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@at_the_terminal
def main() -> int:
    """Read the folder that the command line names first, write the file that it names second."""
    if len(sys.argv) != 3:
        print("usage: python -m reproduce.data.tiny_imagenet FOLDER images.npz", file=sys.stderr)
        return 2
    found = arrays_of(Path(sys.argv[1]))
    write_atomically(Path(sys.argv[2]), lambda file: np.savez(file, **found))
    print(f"{sys.argv[2]}: {len(found['y_train']):,} training and {len(found['y_test']):,} test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
