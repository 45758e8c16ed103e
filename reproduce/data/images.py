"""Images for the vision transformer. Without a path: scikit-learn's handwritten digits, 1,797 real 8 x 8 scans, no download."""

import hashlib
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..store.checked import in_words

NAMES = ("x_train", "y_train", "x_test", "y_test")
MOST_BYTES = 2**34  # of one array, unpacked: a small file can hold any number of zeros
UNREADABLE = (  # what zipfile and NumPy raise of a damaged archive, one with a password, and one packed in a way that they do not know
    OSError, EOFError, ValueError, TypeError, SyntaxError, RuntimeError, MemoryError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
MOST_CLASSES = 65536  # above the largest public sets; a larger label is a mistake, and would be a row of the last layer


class Unfit(Exception):
    """Arrays that are no images and labels; the message says why."""


@dataclass(frozen=True)
class ImageData:
    """A training and a test set in memory.

    Args:
        name, sha256: what a record says of them; the hash is of all four arrays.
        x_train, x_test: (images, side, side, channels) uint8.
        y_train, y_test: (images,) int64 class numbers.
        pixel_range: the largest pixel value.
        x_held_out, y_held_out: training images that are not trained on (`holding_out`); settings are chosen by them.
    """

    name: str
    sha256: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    pixel_range: int = 255
    x_held_out: np.ndarray | None = None
    y_held_out: np.ndarray | None = None

    @property
    def n_classes(self) -> int:
        """One more than the largest label."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    def describe(self) -> dict:
        """What a record says of the data."""
        held_out = {} if self.y_held_out is None else {"held_out_images": len(self.y_held_out)}
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_images": len(self.x_train),
            **held_out,
            "test_images": len(self.x_test),
            "classes": self.n_classes,
        }

    def holding_out(self, count: int) -> "ImageData":
        """The same data with some training images set aside: of each class as many, the same ones for every seed.

        Args:
            count: how many, a multiple of the number of classes.

        Raises:
            ValueError: if the classes cannot share that number, or one of them has no image left then.
        """
        each, over = divmod(count, self.n_classes)
        if over or np.bincount(self.y_train, minlength=self.n_classes).min() <= each:
            raise ValueError(
                f"{self.name}: {count} of its {len(self.y_train)} training images cannot be held out, as many of each of "
                f"{self.n_classes} classes"
            )
        order = np.random.default_rng(0).permutation(len(self.y_train))
        by_class = order[np.argsort(self.y_train[order], kind="stable")]  # numbers of images: class by class, in random order
        begins = np.searchsorted(self.y_train[by_class], np.arange(self.n_classes))
        held_out = np.sort(by_class[(begins[:, None] + np.arange(each)).flatten()])
        trained = np.setdiff1d(order, held_out)
        return replace(
            self,
            x_train=self.x_train[trained],
            y_train=self.y_train[trained],
            x_held_out=self.x_train[held_out],
            y_held_out=self.y_train[held_out],
        )


def load_images(path: str | None) -> ImageData:
    """The digits, or the images of a file.

    Args:
        path: an .npz file with uint8 x_train, x_test (images, side, side[, channels]) and integer y_train, y_test (images,);
            None for the digits.

    Raises:
        ValueError: for a file without these arrays, with arrays of another type or shape, or with test images that are all trained on.
    """
    if path is None:
        return _digits()
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"--images {path}: no such file")
    if not zipfile.is_zipfile(source):
        raise ValueError(f"--images {path} is not a readable .npz file: it is no archive of arrays")
    try:
        loaded = _read_arrays(source)
    except Unfit as error:
        raise ValueError(str(error)) from None
    except UNREADABLE as error:
        raise ValueError(f"--images {path} is not a readable .npz file: {error}") from None
    x_train, y_train, x_test, y_test = loaded
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if len(x) != len(y) or x.size == 0 or x.shape[1] != x.shape[2]:
            raise ValueError(f"--images {path}: x_{part} {x.shape} and y_{part} {y.shape} are not labelled square images")
        if y.min() < 0 or y.max() >= MOST_CLASSES:
            wrong = y.min() if y.min() < 0 else y.max()
            raise ValueError(f"--images {path}: y_{part} holds {wrong}; classes count from 0 to at most {MOST_CLASSES - 1}")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"--images {path}: x_train {x_train.shape} and x_test {x_test.shape} are images of different sizes")
    known = {hash(image.tobytes()) for image in x_train}
    if all(hash(image.tobytes()) in known for image in x_test):
        raise ValueError(
            f"--images {path}: every image of x_test stands in x_train; a model is judged by images that it did not see"
        )
    x_train, x_test = (x[..., None] if x.ndim == 3 else x for x in (x_train, x_test))
    return _hashed(source.name, x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))


def _read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of NAMES, in their order; none is unpacked before its type, its shape and its size are known to be right.

    Raises ValueError for other arrays, and one of UNREADABLE for an archive that cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        packed = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if missing := [name for name in NAMES if name not in packed]:
            raise Unfit(f"--images {path}: {', '.join(missing)} missing; it must hold {', '.join(NAMES)}")
        for name in NAMES:
            with archive.open(packed[name]) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            _check_array(f"--images {path}: {name}", name[0] == "x", shape, dtype, packed[name].file_size)
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return [arrays[name] for name in NAMES]


def _check_array(where: str, is_image: bool, shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    """Raise Unfit unless an array of this type and shape is one of images or labels, and no larger than its archive says.

    size: bytes of the member of the archive, its head too.
    """
    kind = np.uint8 if is_image else np.integer
    if not dtype.hasobject and (not np.issubdtype(dtype, kind) or len(shape) not in ((3, 4) if is_image else (1,))):
        raise Unfit(f"{where} is {dtype} {shape}; images are uint8 (n, side, side[, channels]), labels integers (n,)")
    needed = math.prod(shape) * dtype.itemsize
    if max(needed, size) > MOST_BYTES:
        raise Unfit(
            f"{where} takes {in_words(max(needed, size))}; an array of images in memory may take {in_words(MOST_BYTES)}"
        )
    if needed > size:
        raise Unfit(f"{where} is said to be {shape}, {in_words(needed)}; there are {in_words(size)} of it")


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # a fixed split, the same for every seed
    x, y = digits.images.astype(np.uint8)[order, :, :, None], digits.target.astype(np.int64)[order]
    n_train = 1437  # four fifths
    return _hashed("scikit-learn digits", x[:n_train], y[:n_train], x[n_train:], y[n_train:], pixel_range=16)


def _hashed(name: str, *arrays: np.ndarray, pixel_range: int = 255) -> ImageData:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return ImageData(name, digest.hexdigest(), *arrays, pixel_range=pixel_range)
