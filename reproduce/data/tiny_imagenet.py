"""`python -m reproduce.data.tiny_imagenet FOLDER images.npz`: Tiny-ImageNet's folder as the file that --images takes.

The folder is that of tiny-imagenet-200.zip, as it unpacks. Every second of its classes in order of their names is taken, a hundred; its
validation images are the test images here, since those of its test set have no labels.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

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
    """files: those of each class."""
    images = np.stack(
        [np.asarray(Image.open(file).convert("RGB")) for of_class in files for file in of_class]
    )  # (n, 64, 64, 3)
    return {f"x_{part}": images, f"y_{part}": np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])}


def main() -> int:
    """Read the folder that the command line names first, write the file that it names second."""
    if len(sys.argv) != 3:
        print("usage: python -m reproduce.data.tiny_imagenet FOLDER images.npz", file=sys.stderr)
        return 2
    try:
        found = arrays_of(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    np.savez(sys.argv[2], **found)
    print(f"{sys.argv[2]}: {len(found['y_train']):,} training and {len(found['y_test']):,} test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
