"""Augmentation: every operation against Pillow or the obvious loop, image by image; what is random is fair, and a function of its seed."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from reproduce.data import augment
from reproduce.data.augment import COLOURS, OPERATIONS, WARPS, Augmentation, View

SIDE, STRENGTH = 20, 0.3


def some_images(count: int = 6, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8: noise, soft noise, one of few colours, one dark, one of a single colour."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    images[1] = np.asarray(Image.fromarray(images[1][:5, :5]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    images[2] = images[2] // 64 * 64
    images[3] = images[3] // 5 + 30
    images[4] = images[4][0, 0]
    return images


def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def by_pillow(name: str, image: Image.Image, s: float) -> Image.Image:
    """What the operation is, for one image."""
    return {
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
        "colour": lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(s))),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - abs(s))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "unchanged": lambda: image,
    }[name]()


@pytest.mark.parametrize("s", [STRENGTH, -STRENGTH, 0.9, -0.9])
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_pillow_s(name, s):
    images = some_images()
    ours = pixels(COLOURS[name](batch(images), torch.full((len(images),), s)))
    theirs = np.stack([np.asarray(by_pillow(name, Image.fromarray(image), s)) for image in images]).astype(float)
    assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01  # one grey level where a product is nearly whole
    assert (ours == ours.round()).all() and ours.min() >= 0 and ours.max() <= 255
    if name != "unchanged":  # control: the operation does something
        assert (ours != images).mean() > 0.1


@pytest.mark.parametrize("name", ["brightness", "colour", "contrast", "sharpness"])
def test_each_image_has_its_own_direction(name):
    images = batch(some_images())
    signs = torch.tensor([1.0, -1.0] * 3) * STRENGTH
    apart = [COLOURS[name](images[i : i + 1], signs[i : i + 1]) for i in range(6)]
    assert torch.equal(COLOURS[name](images, signs), torch.cat(apart))
    assert not torch.equal(COLOURS[name](images, -signs), torch.cat(apart))


def test_the_smoothing_of_sharpness_is_pillow_s():
    image = some_images()[0]
    smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)).astype(float)
    all_the_way = pixels(COLOURS["sharpness"](batch(image[None]), torch.tensor([-1 / 0.9])))[0]  # the degenerate image itself
    assert np.abs(all_the_way - smooth).max() <= 1 and np.array_equal(all_the_way[0], image[0])


@pytest.mark.parametrize("s", [STRENGTH, -STRENGTH, 1.0])
@pytest.mark.parametrize("name", WARPS)
def test_warps_are_pillow_s_affine_maps_about_the_centre(name, s):
    images, (a, b) = some_images(), WARPS[name](s, SIDE)
    half = SIDE / 2
    data = [x for row in (a, b) for x in (row[0], row[1], row[2] + half - half * (row[0] + row[1]))]
    theirs = np.stack([np.asarray(Image.fromarray(i).transform((SIDE, SIDE), Image.Transform.AFFINE, data)) for i in images])
    ours = pixels(
        augment.warped(batch(images), torch.tensor(np.stack([a, b])[None].repeat(len(images), 0), dtype=torch.float32))
    )
    assert (ours != theirs).mean() < 0.01  # a point on the edge of two pixels
    assert (ours != images).mean() > 0.2 and (ours == 0).all(
        axis=3
    ).mean() > 0.02  # control: something moves, and black comes in


def test_warps_are_as_far_as_torchvision_s():
    s = 9 / 30
    assert WARPS["shear x"](s, 64)[0, 1] == pytest.approx(0.3 * s) == WARPS["shear y"](s, 64)[1, 0]
    assert WARPS["shift x"](s, 64)[0, 2] == int(150 / 331 * 64 * s) == 8 == -WARPS["shift y"](-s, 64)[1, 2]
    assert WARPS["rotate"](s, 64)[0, 0] == pytest.approx(np.cos(np.deg2rad(9)))
    assert len(OPERATIONS) == 14 == len(set(OPERATIONS))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_is_pillow_s_resized_box(mirrored):
    images, rng = some_images(), np.random.default_rng(1)
    view = View.drawn(len(images), SIDE, 0.1, rng)
    view = View(view.left, view.top, view.width, view.height, np.full(len(images), mirrored))
    theirs = []
    for n, image in enumerate(images):
        box = (view.left[n], view.top[n], view.left[n] + view.width[n], view.top[n] + view.height[n])
        seen = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
        theirs.append(seen[:, ::-1] if mirrored else seen)
    ours = pixels(augment.viewed(batch(images), view))
    assert np.abs(ours - np.stack(theirs)).max() <= 1
    assert np.abs(ours - np.stack(theirs)[:, :, ::-1]).max() > 20  # control: the mirror image


def test_little_is_made_on_the_cpu_and_carried_to_the_device(monkeypatch):
    """A number for each line of pixels at most, or a GPU would wait; the digits are those of NumPy's own weights."""
    images = torch.from_numpy(some_images(40)).permute(0, 3, 1, 2)
    carried, from_numpy = [], torch.from_numpy

    def whole():
        carried.clear()
        return augment.augmented(images, torch.arange(40) % 5, 5, Augmentation(), np.random.default_rng(0))[0]

    def by_numpy(centres, images):  # control: all weights come from there
        weights = (1 - np.abs(centres[:, :, None] - (np.arange(SIDE) + 0.5))).clip(0)
        return torch.from_numpy(weights).to(images.dtype)

    monkeypatch.setattr(torch, "from_numpy", lambda array: carried.append(array.size) or from_numpy(array))
    ours = whole()
    assert max(carried) == 40 * SIDE
    parts = 2 + 4 * Augmentation().operations  # of a view two; of an operation two lists of images, matrices and strengths
    assert len(carried) == parts < 2 + len(OPERATIONS)
    monkeypatch.setattr(augment, "_shares", by_numpy)
    assert torch.equal(whole(), ours) and max(carried) == 40 * SIDE**2


def test_views_are_as_large_as_they_should_be():
    view = View.drawn(4000, 64, 0.35, np.random.default_rng(0))
    area, shape = view.width * view.height / 64**2, view.width / view.height
    assert area.max() <= 1 and 0.35 - 1e-9 <= area.min() < 0.36 and 0.55 < area.mean() < 0.7
    assert 0.74 < shape.min() < 0.76 and 1.32 < shape.max() < 1.34 and 1900 < view.mirrored.sum() < 2100
    assert (
        (view.left >= 0).all() and (view.left + view.width <= 64 + 1e-9).all() and (view.top + view.height <= 64 + 1e-9).all()
    )


def test_every_image_gets_its_own_operations(monkeypatch):
    """The batch against the loop: each image alone, by the numbers and signs that the same generator draws."""
    images, how = some_images(60), Augmentation(operations=2)
    ours = augment.rand_augmented(batch(images), how, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    drawn = [(rng.integers(14, size=60), np.where(rng.random(60) < 0.5, -0.3, 0.3)) for _ in range(2)]
    assert {int(n) for numbers, _ in drawn for n in numbers} == set(range(14))
    for n in range(60):
        one = batch(images[n : n + 1])
        for numbers, signed in drawn:
            name, s = OPERATIONS[numbers[n]], signed[n]
            if name in WARPS:
                one = augment.warped(one, torch.tensor(WARPS[name](s, SIDE)[None], dtype=torch.float32))
            else:
                one = COLOURS[name](one, torch.tensor([s], dtype=torch.float32))
        assert torch.equal(ours[n], one[0]), n
    other = augment.rand_augmented(batch(images), how, np.random.default_rng(4))  # control
    assert not torch.equal(ours, other)


def test_a_batch_of_one_meets_every_operation_in_time():
    image, how = batch(some_images()[:1]), Augmentation(operations=1)
    found = [augment.rand_augmented(image.clone(), how, np.random.default_rng(n)) for n in range(60)]
    assert len({tuple(x.flatten().tolist()) for x in found}) > 10 and any(torch.equal(x, image) for x in found)


def test_labels_are_smoothed_as_timm_does():
    targets = augment.smoothed(torch.tensor([2, 0]), 5, 0.1)
    assert targets[0].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02]) and targets.sum(1).tolist() == pytest.approx(
        [1, 1]
    )


def test_images_and_labels_are_mixed_in_the_same_proportion():
    """Image n is all n: what is mixed in shows in the mean of each image, and must be what the targets say."""
    count, kinds = 5, set()
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 8, 8) * 50
    targets = augment.smoothed(torch.arange(count), count, 0.0)
    for seed in range(40):
        x, y = augment.mixed(images, targets, Augmentation(), np.random.default_rng(seed))
        own = y[0, 0].item()
        expected = own * images.mean((1, 2, 3)) + (1 - own) * images.flip(0).mean((1, 2, 3))
        assert torch.allclose(x.mean((1, 2, 3)), expected, atol=1e-3) and y[0, -1].item() == pytest.approx(1 - own)
        values = {round(v, 3) for v in x[0].unique().tolist()}
        kinds.add("cut" if values <= {0.0, 200.0} else "mixed")
    assert kinds == {"cut", "mixed"} and images[0].max() == 0  # both happen; what was given is left alone


def test_a_part_is_cut_within_the_image():
    shares = []
    for seed in range(300):
        (x, width), (y, height) = augment._part(16, 0.75, np.random.default_rng(seed))
        assert 0 <= x <= x + width <= 16 and 0 <= y <= y + height <= 16
        shares.append(width * height / 256)
    assert max(shares) == 0.25 and 0.15 < np.mean(shares) < 0.25  # at an edge a part of it is outside


def test_a_batch_is_a_function_of_its_generator():
    images = torch.from_numpy(some_images()).permute(0, 3, 1, 2)
    labels = torch.arange(6)
    first, again, other = (augment.augmented(images, labels, 10, Augmentation(), np.random.default_rng(n)) for n in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    assert first[0].shape == images.shape and first[1].shape == (6, 10) and torch.equal(images, images.clamp(0, 255))
    assert first[0].min() >= 0 and first[0].max() <= 255 and first[1].sum(1).tolist() == pytest.approx([1.0] * 6)
    assert Augmentation().config()["smallest_crop"] == 0.35
