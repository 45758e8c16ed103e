"""DeiT's changes to training images (Touvron et al. 2021), for a whole batch at once, on the device where the images lie.

Of every image a random part is stretched to the full square and mirrored half of the time (`View`); two random operations of
RandAugment follow (Cubuk et al. 2020; their ranges are torchvision's, their arithmetic is Pillow's); then each image is mixed with
another one, labels too (mixup, Zhang et al. 2018, and CutMix, Yun et al. 2019, in turns), and labels are smoothed.

Not torchvision's transforms: given a batch they do the same to all of its images, so that RandAugment would need a call per image;
and torchvision cannot be imported beside every build of torch. All chance is drawn by NumPy on the CPU: a batch is a function of the
generator alone, and the same on every device. Images are (b, channels, side, side) float32, whole numbers from 0 to 255 until they
are mixed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

WHITE = 255.0


@dataclass(frozen=True)
class Augmentation:
    """How strongly training images are changed.

    Args:
        smallest_crop: of the image's area; the largest is all of it.
        operations: of RandAugment, one after the other.
        strength: of each, as a share of its range; torchvision's magnitude 9 of 30 is 0.3.
        mixup: alpha; the share of an image's own is drawn from Beta(alpha, alpha).
        cutmix: alpha of the share of an image's own area.
        smoothing: of the labels: so much goes to all classes alike.
    """

    smallest_crop: float = 0.35
    operations: int = 2
    strength: float = 0.3
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def config(self) -> dict:
        """All fields, for records."""
        return asdict(self)


def augmented(
    images: torch.Tensor, labels: torch.Tensor, n_classes: int, how: Augmentation, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as it is trained on.

    Args:
        images: (b, 3, side, side) uint8.
        labels: (b,) integers.
        n_classes: columns of the targets.
        how: strengths.
        rng: decides all of it.

    Returns:
        (b, 3, side, side) float32 from 0 to 255, and targets (b, n_classes) that sum to one.
    """
    views = viewed(images.float(), View.drawn(len(images), images.shape[2], how.smallest_crop, rng))
    return mixed(rand_augmented(views, how, rng), smoothed(labels, n_classes, how.smoothing), how, rng)


# A random part of each image.


@dataclass(frozen=True)
class View:
    """Which part of each image is seen.

    Args:
        left, top, width, height: (b,) in pixels, fractions too.
        mirrored: (b,) whether left and right change places.
    """

    left: np.ndarray
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray
    mirrored: np.ndarray

    @classmethod
    def drawn(cls, count: int, side: int, smallest: float, rng: np.random.Generator) -> "View":
        """Parts of random area, shape (3:4 to 4:3) and place.

        Args:
            count: b.
            side: of the images in pixels.
            smallest: share of the area.
            rng: decides.
        """
        area = side * side * rng.uniform(smallest, 1.0, count)
        shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), count))
        width, height = (np.minimum(side, (area * x) ** 0.5) for x in (shape, 1 / shape))
        left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
        return cls(left, top, width, height, rng.random(count) < 0.5)


def viewed(images: torch.Tensor, view: View) -> torch.Tensor:
    """Each part stretched to the full square, bilinear: two matrix products, one for rows and one for columns.

    Args:
        images: (b, c, side, side).
        view: as large as the image at most, so that nothing is shrunk.

    Returns:
        The same shape, rounded to whole numbers.
    """
    side = images.shape[2]
    rows = _seen(view.top, view.height, side)  # (b, out)
    columns = _seen(view.left, view.width, side)  # (b, out)
    columns = np.where(view.mirrored[:, None], columns[:, ::-1], columns)
    rows, columns = (_shares(centres, images)[:, None] for centres in (rows, columns))  # (b, 1, out, in)
    return (rows @ images @ columns.mT).round()  # (b, c, out, out)


def _seen(start: np.ndarray, length: np.ndarray, side: int) -> np.ndarray:
    """(b, out): where along one axis the centre of each pixel is taken from; that of pixel i is i + 0.5.  start, length: (b,)."""
    centres = start[:, None] + length[:, None] * (np.arange(side) + 0.5) / side
    return centres.clip(0.5, side - 0.5)  # the image's edge goes on outside


def _shares(centres: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(b, out, in): what each pixel takes of the pixels there were; made on the device, since a core would take longer than a GPU trains.

    In float64, and by sums alone, which are the same everywhere.  centres: (b, out).  images: for device and dtype.
    """
    there = sent(centres, images.device)
    pixels = torch.arange(images.shape[2], device=images.device, dtype=torch.float64) + 0.5
    return (1 - (there[:, :, None] - pixels).abs()).clamp(min=0).to(images.dtype)


# RandAugment.


def rand_augmented(images: torch.Tensor, how: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """`how.operations` times one random operation of OPERATIONS for each image, its direction random too.

    Args:
        images: (b, 3, side, side), whole numbers from 0 to 255.
        how: how many operations and how strong.
        rng: decides which.

    Returns:
        The same shape; the tensor that was given is changed.
    """
    for _ in range(how.operations):
        numbers = rng.integers(len(OPERATIONS), size=len(images))  # (b,)
        backwards = rng.random(len(images)) < 0.5  # (b,)
        _turned(images, numbers, backwards, how.strength)
        _coloured(images, numbers, how.strength * np.where(backwards, -1.0, 1.0))
    return images


def _turned(images: torch.Tensor, numbers: np.ndarray, backwards: np.ndarray, strength: float) -> None:
    """Shears, shifts and rotations of the images that these fall to, all at once.  numbers, backwards: (b,)."""
    chosen = np.flatnonzero(numbers < len(WARPS))  # (k,)
    if len(chosen):
        both = np.stack(
            [[warp(s, images.shape[2]) for s in (strength, -strength)] for warp in WARPS.values()]
        )  # (warps, 2, 2, 3)
        places, matrices = sent(chosen, images.device), both[numbers[chosen], backwards[chosen].astype(int)]  # (k, 2, 3)
        images[places] = warped(images[places], _like(matrices, images))


def _coloured(images: torch.Tensor, numbers: np.ndarray, signed: np.ndarray) -> None:
    """Each other operation, of all images that it falls to; sent once for all of them, since that costs more than an operation.

    numbers, signed: (b,).
    """
    order = np.argsort(numbers, kind="stable")  # the images of one operation stand together
    counts = np.bincount(numbers, minlength=len(OPERATIONS)).tolist()
    places, strengths = sent(order, images.device).split(counts), _like(signed[order], images).split(counts)
    for operation, there, s in zip(OPERATIONS, places, strengths):
        if operation in COLOURS and len(there):
            images[there] = COLOURS[operation](images[there], s)


def warped(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Affine maps about the images' centres; each pixel takes the nearest one, outside it is black.

    Args:
        images: (k, c, side, side).
        matrices: (k, 2, 3); [x, y, 1] of a pixel's centre, counted from the image's, -> where in the image it is taken from.

    Returns:
        The same shape.
    """
    k, c, side, _ = images.shape
    along = torch.arange(side, device=images.device) + 0.5 - side / 2
    y, x = torch.meshgrid(along, along, indexing="ij")  # (side, side) each
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, side * side)
    column, row = ((matrices @ points) + side / 2).floor().long().unbind(1)  # (k, side * side) each
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    source = (row * side + column).where(inside, 0)[:, None].expand(-1, c, -1)  # (k, c, side * side)
    return (images.flatten(2).gather(2, source) * inside[:, None]).view(k, c, side, side)


def _shear_x(s: float, side: int) -> np.ndarray:
    return np.array([[1, 0.3 * s, 0], [0, 1, 0]])


def _shear_y(s: float, side: int) -> np.ndarray:
    return np.array([[1, 0, 0], [0.3 * s, 1, 0]])


def _shift_x(s: float, side: int) -> np.ndarray:
    return np.array([[1, 0, np.trunc(150 / 331 * side * s)], [0, 1, 0]])


def _shift_y(s: float, side: int) -> np.ndarray:
    return np.array([[1, 0, 0], [0, 1, np.trunc(150 / 331 * side * s)]])


def _rotate(s: float, side: int) -> np.ndarray:
    angle = np.deg2rad(30 * s)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])


def blended(images: torch.Tensor, others: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    """From another image towards this one by 1 + 0.9 s of the way, which may lie beyond it.

    Args:
        images, others: (k, c, side, side), or what broadcasts to it.
        signed: (k,), s.

    Returns:
        Cut off to whole numbers from 0 to 255, as Pillow does.
    """
    share = (1 + 0.9 * signed)[:, None, None, None]
    return (others + share * (images - others)).clamp(0, WHITE).floor()


def grey(images: torch.Tensor) -> torch.Tensor:
    """Brightness as Pillow has it.  images: (k, 3, side, side).  Returns: (k, 1, side, side), whole numbers."""
    red, green, blue = images.split(1, dim=1)  # (k, 1, side, side) each
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()


def _brightness(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return blended(x, torch.zeros_like(x), s)


def _colour(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return blended(x, grey(x), s)


def _contrast(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return blended(x, (grey(x).mean((1, 2, 3), keepdim=True) + 0.5).floor(), s)


def _sharpness(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(x.shape[1], 1, 3, 3)
    smooth = x.clone()  # the edge stays as it is
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(x, kernel, groups=x.shape[1]) + 0.5).floor()
    return blended(x, smooth, s)


def _posterize(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    step = 2 ** (4 * s.abs()).round()[:, None, None, None]  # up to four bits are lost
    return (x / step).floor() * step


def _solarize(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.where(x < WHITE * (1 - s.abs())[:, None, None, None], x, WHITE - x)


def _autocontrast(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)  # of each channel
    stretched = (
        (x - low) * (WHITE / (high - low).clamp(min=1)) + 1e-4
    ).floor()  # Pillow's doubles do not fall short of a whole number
    return torch.where(high > low, stretched, x)


def _equalize(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Each channel's brightness spread evenly, as Pillow does it."""
    values = x.flatten(2).long()  # (k, c, pixels)
    counts = torch.zeros(*x.shape[:2], 256, device=x.device).scatter_add_(2, values, torch.ones_like(values, dtype=x.dtype))
    last = counts.gather(2, values.amax(2, keepdim=True))  # (k, c, 1): how many pixels have the largest value
    step = ((values.shape[2] - last) / WHITE).floor()
    before = counts.cumsum(2) - counts  # of each value, how many pixels are darker
    table = ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, WHITE)  # (k, c, 256)
    return torch.where(step[..., None] > 0, table.gather(2, values).view_as(x), x)


def _unchanged(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return x


# (s, side) -> (2, 3) as `warped` takes it; s: the strength with its sign.
WARPS: dict[str, Callable[[float, int], np.ndarray]] = {
    "shear x": _shear_x, "shear y": _shear_y, "shift x": _shift_x, "shift y": _shift_y, "rotate": _rotate,
}  # fmt: skip
# (images (k, 3, side, side), s (k,)) -> images
COLOURS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": _brightness, "colour": _colour, "contrast": _contrast, "sharpness": _sharpness, "posterize": _posterize,
    "solarize": _solarize, "autocontrast": _autocontrast, "equalize": _equalize, "unchanged": _unchanged,
}  # fmt: skip
OPERATIONS = (*WARPS, *COLOURS)


# Labels, and two images in one.


def smoothed(labels: torch.Tensor, n_classes: int, smoothing: float) -> torch.Tensor:
    """Targets (b, n_classes): 1 - smoothing for the label, and `smoothing` shared out to all classes.

    Args:
        labels: (b,) integers.
        n_classes: how many.
        smoothing: from 0 to 1.
    """
    return F.one_hot(labels, n_classes).float() * (1 - smoothing) + smoothing / n_classes


def mixed(
    images: torch.Tensor, targets: torch.Tensor, how: Augmentation, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image with its partner, the one as far from the batch's other end: all of it faintly (mixup), or a part of it (CutMix).

    Args:
        images: (b, c, side, side).
        targets: (b, classes).
        how: from what the share of the image's own is drawn, for the whole batch.
        rng: decides which of both, the share, and where the part lies.

    Returns:
        Both mixed in the same proportion.
    """
    partners, side = images.flip(0), images.shape[2]
    if rng.random() < 0.5:
        own = float(rng.beta(how.mixup, how.mixup))
        images = own * images + (1 - own) * partners
    else:
        (x, width), (y, height) = _part(side, float(rng.beta(how.cutmix, how.cutmix)), rng)
        images = images.clone()
        images[:, :, y : y + height, x : x + width] = partners[:, :, y : y + height, x : x + width]
        own = 1 - width * height / side**2
    return images, own * targets + (1 - own) * targets.flip(0)


def _part(side: int, own: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Where a square of area 1 - own about a random centre begins along each axis, and how many of its pixels lie in the image."""
    length = int(side * (1 - own) ** 0.5)
    begins = rng.integers(side, size=2) - length // 2
    ends = np.minimum(begins + length, side)
    begins = np.maximum(begins, 0)
    return [(int(begin), int(end - begin)) for begin, end in zip(begins, ends)]


def _like(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """On the images' device, in their precision."""
    return sent(values, images.device).to(images.dtype)


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is at work on: a plain copy to a GPU would stand at the end of its queue.

    Args:
        values: on the CPU.
        device: where they go.
    """
    there = torch.from_numpy(values)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)
