"""Tiny-ImageNet's folder becomes the file that --images takes."""

import resource
import runpy
import warnings

import numpy as np
import pytest
from PIL import Image

from reproduce.data import tiny_imagenet
from reproduce.data.images import load_images


@pytest.fixture
def folder(tmp_path):
    """Four classes in the layout of tiny-imagenet-200, each of one grey; one image of each class is stored in grey alone."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    (root / "val" / "images").mkdir(parents=True)
    for number, name in enumerate(("n03", "n01", "n04", "n02")):
        (root / "train" / name / "images").mkdir(parents=True)
        level = 40 * int(name[1:])
        for n in range(3):
            mode, colour = ("L", level) if n == 0 else ("RGB", (level,) * 3)
            Image.new(mode, (64, 64), colour).save(root / "train" / name / "images" / f"{name}_{n}.JPEG")
        unseen = Image.new("RGB", (64, 64), (level,) * 3)
        unseen.putpixel((9, 9), (255, 0, 0))
        unseen.save(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    return root


def test_every_second_class_is_taken_in_order(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny_imagenet", str(folder), str(tmp_path / "images.npz")])
    assert tiny_imagenet.main() == 0 and "6 training and 2 test images" in capsys.readouterr().out
    data = load_images(str(tmp_path / "images.npz"))
    assert (
        data.x_train.shape == (6, 64, 64, 3) and data.y_train.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [0, 1]
    )
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert np.array_equal(x.mean((1, 2, 3)).round(), np.array([40, 120])[y])  # n01 and n03


def test_another_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny_imagenet", str(tmp_path), "images.npz"])
    assert tiny_imagenet.main() == 1 and "is no folder of Tiny-ImageNet" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    (b"no image", "cannot identify image file"),
    (None, "image file is truncated"),
    (Image.new("RGB", (9, 9)), "the train images have 2 sizes; they must have one"),
])  # fmt: skip
def test_an_image_that_cannot_be_used_is_named_and_what_was_there_stays(
    content, message, folder, tmp_path, monkeypatch, capsys
):
    file = folder / "train" / "n01" / "images" / "n01_1.JPEG"
    if isinstance(content, Image.Image):
        content.save(file)
    else:
        file.write_bytes(content or file.read_bytes()[:-20])
    (tmp_path / "images.npz").write_bytes(b"older")
    monkeypatch.setattr("sys.argv", ["tiny_imagenet", str(folder), str(tmp_path / "images.npz")])
    assert tiny_imagenet.main() == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and (str(file) in said or "sizes" in said)
    assert (tmp_path / "images.npz").read_bytes() == b"older"


def test_what_does_not_fit_on_the_disk_leaves_the_old_file(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "images.npz").write_bytes(b"older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("sys.argv", ["tiny_imagenet", str(folder), str(tmp_path / "images.npz")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status = tiny_imagenet.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1 and "images.npz" in capsys.readouterr().err
    assert (tmp_path / "images.npz").read_bytes() == b"older"
    assert tiny_imagenet.main() == 0  # control: there is room
    assert len((tmp_path / "images.npz").read_bytes()) > 1000


def test_the_command_says_how_it_is_used(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny_imagenet"])
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        runpy.run_module("reproduce.data.tiny_imagenet", run_name="__main__")
    assert (
        stopped.value.code == 2 and "usage: python -m reproduce.data.tiny_imagenet FOLDER images.npz" in capsys.readouterr().err
    )
