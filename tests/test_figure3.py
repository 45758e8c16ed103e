"""Figure 3: pretrained once per seed, converted, fine-tuned, resumed; and its model opens for compress and spectra."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from reproduce.experiments import figure3, spectra
from reproduce.models.rows import Row
from reproduce.store import records
from reproduce.train import vision
from reproduce.train.distributed import Workers
from reproduce.train.options import Options

FULL = Row("Tucker", ranks=(4, 16, 16))


@pytest.fixture
def tiny(monkeypatch):
    preset = figure3.PRESETS["smoke"]
    short = dict(log_every=1, checkpoint_every=1)
    preset = dataclasses.replace(
        preset,
        patch_size=4,
        d_model=16,
        n_heads=4,
        n_layers=2,
        rows=(Row("MHA"), Row("GQA", n_kv_heads=2), Row("MLA", latent=4, shared_kv=True), Row("Tucker", ranks=(3, 4, 4)), FULL),
        pretrain=dataclasses.replace(preset.pretrain, steps=6, **short),
        finetune=dataclasses.replace(preset.finetune, **short),
        epochs=1,
        seeds=(0, 1),
    )
    monkeypatch.setitem(figure3.PRESETS, "smoke", preset)
    return preset


def run(folder, **more) -> list[dict]:
    figure3.run(Options("smoke", folder, folder / "records", steps=2, **more))
    return records.load(folder / "records", "figure3")


def test_every_conversion_starts_from_the_pretrained_model_of_its_seed(tiny, tmp_path):
    found = run(tmp_path)
    assert len(found) == 2 * (1 + len(tiny.rows))
    for seed in (0, 1):
        by_method = {r.method: r.metrics for r in found if r.seed == seed}
        start = by_method["MHA pretrained"]
        for exact in ("MHA", FULL.label):  # nothing is lost without compression
            assert by_method[exact]["converted"]["top1"] == start["top1"]
        assert by_method["Tucker [3,4,4]"]["attention_parameters"] < start["attention_parameters"]
        assert all(len(by_method[row.label]["curve"]) == 2 for row in tiny.rows)
    config = found[-1].config
    assert config["pretrain"]["steps"] == 6 and config["train"]["steps"] == 2  # --steps are those of the fine-tuning


def test_without_steps_given_fine_tuning_lasts_the_epochs_of_the_preset(tiny, tmp_path):
    figure3.run(Options("smoke", tmp_path, tmp_path / "records", rows=("MHA",), seeds=(0,)))
    assert records.load(tmp_path / "records")[-1].config["train"]["steps"] == 1437 // 64


def test_the_pretrained_model_is_trained_once(tiny, tmp_path, monkeypatch):
    run(tmp_path, rows=("MHA",), seeds=(0,))
    titles, train = [], figure3.train
    monkeypatch.setattr(figure3, "train", lambda *a: titles.append(a[-1]) or train(*a))
    run(tmp_path, rows=("MHA", "GQA n_KV=2"), seeds=(0,))
    assert titles == ["figure3 GQA n_KV=2 seed 0"]  # the finished row is skipped, the pretrained model read
    run(tmp_path, rows=("MHA",), seeds=(0,))
    assert len(titles) == 1  # nothing is left to do
    monkeypatch.setitem(
        figure3.PRESETS, "smoke", dataclasses.replace(tiny, pretrain=dataclasses.replace(tiny.pretrain, steps=7))
    )
    run(tmp_path, rows=("MHA",), seeds=(0,))
    assert titles[1:] == ["figure3 MHA pretrained seed 0", "figure3 MHA seed 0"]  # control: another model is another start
    monkeypatch.setitem(figure3.PRESETS, "smoke", tiny)
    run(tmp_path, rows=("MLA shared d_c=4",), seeds=(0,))
    assert titles[3:] == ["figure3 MLA shared d_c=4 seed 0"]  # the first start was moved aside, and is found there
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    run(tmp_path, rows=("Tucker [3,4,4]",), seeds=(0,))
    assert titles[4:] == ["figure3 MHA pretrained seed 0", "figure3 Tucker [3,4,4] seed 0"]  # control: none is there


def test_a_fine_tuning_that_diverges_in_its_last_step_has_no_accuracy(tiny, tmp_path, capsys):
    """Of logits that are NaN, any class would be the first guess."""
    options = Options("smoke", tmp_path, tmp_path / "records", steps=1, rows=("MHA",), seeds=(0,))
    for rate in (1e30, 1e-3):
        figure3.run(dataclasses.replace(options, learning_rate=rate))
    _, spoiled, tame = records.load(tmp_path / "records", to_show=True)
    assert spoiled.diverged_at == 1 and len(spoiled.metrics["curve"]) == 1 and not {"top1", "top5"} & set(spoiled.metrics)
    assert tame.diverged_at is None and tame.metrics["top1"] >= 0  # control
    assert "after step 1, the last one, logits are no numbers; recorded as diverged" in capsys.readouterr().out


def test_a_fine_tuning_that_diverges_is_on_record_and_stops_no_other(tiny, tmp_path, monkeypatch, capsys):
    loss_on = figure3.loss_on

    def broken(data):
        loss = loss_on(data)
        return lambda model, *batch: (
            loss(model, *batch) * (float("nan") if type(model.blocks[0].attention).__name__.startswith("Grouped") else 1.0)
        )

    monkeypatch.setattr(figure3, "loss_on", broken)
    rows = ("GQA n_KV=2", "MHA")
    start, first, second = run(tmp_path, rows=rows, seeds=(0,))
    assert first.method == "MHA" and "top1" in first.metrics  # rows keep their order
    assert second.metrics["diverged_at"] == 1 and "top1" not in second.metrics and "converted" in second.metrics
    assert "at step 1; recorded" in capsys.readouterr().out
    assert len(run(tmp_path, rows=rows, seeds=(0,))) == 3  # and is not tried again


def test_fine_tuning_sees_other_batches_than_pretraining(tiny):
    data = figure3.load_images(None)
    settings = dataclasses.replace(tiny.finetune, steps=3)
    first, second = (vision.batches(data, settings, 0, start) for start in (0, 6))
    assert torch.equal(first(6)[0], second(0)[0]) and not torch.equal(first(0)[0], second(0)[0])


def test_a_moved_image_is_a_window_of_the_padded_one_or_its_mirror_image():
    images = np.arange(1, 1 + 64 * 5 * 5 * 2, dtype=np.uint16).reshape(64, 5, 5, 2)  # no value twice, none black
    padded = np.pad(images, ((0, 0), (vision.SHIFT,) * 2, (vision.SHIFT,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2)).transpose(0, 1, 2, 4, 5, 3)  # (b, y, x, 5, 5, 2)
    moved = vision.moved(images, np.random.default_rng(0))[:, None, None]
    straight, mirrored = ((windows == seen).all(axis=(3, 4, 5)) for seen in (moved, moved[:, :, :, :, ::-1]))  # (b, y, x)
    assert ((straight | mirrored).sum(axis=(1, 2)) == 1).all()
    assert 16 < straight.sum() < 48 and all(found.any() for found in (straight | mirrored).any(axis=0))  # both kinds, every row
    assert np.array_equal(vision.moved(images, np.random.default_rng(0)), moved[:, 0, 0])
    assert not np.array_equal(vision.moved(images, np.random.default_rng(1)), moved[:, 0, 0])


def test_only_an_augmented_preset_moves_what_it_trains_on(tiny):
    data, settings = figure3.load_images(None), tiny.finetune
    plain, moved = (vision.batches(data, settings, 0, augmented=a)(0) for a in (False, True))
    assert torch.equal(plain[1], moved[1]) and not torch.equal(plain[0], moved[0])


def test_an_augmented_run_says_so_and_is_another_run(tiny, monkeypatch, tmp_path):
    plain = run(tmp_path / "plain", rows=("MHA",), seeds=(0,))
    monkeypatch.setitem(figure3.PRESETS, "smoke", dataclasses.replace(tiny, augmented=True))
    moved = run(tmp_path / "moved", rows=("MHA",), seeds=(0,))
    assert all(r.config.get("augmented") is None for r in plain) and all(r.config["augmented"] for r in moved)
    for one, other in zip(plain, moved):
        assert one.id != other.id and one.metrics["curve"] != other.metrics["curve"]


def test_the_pretrained_model_opens_for_spectra(tiny, tmp_path):
    run(tmp_path, rows=("MHA",), seeds=(0,))
    (path,) = (tmp_path / "models").glob("*.safetensors")
    spectra.run(Options("smoke", tmp_path, tmp_path / "records", model=str(path)))
    (record,) = records.load(tmp_path / "records", "spectra")
    assert len(record.metrics["trained"]) == 2


@pytest.mark.parametrize(
    "given",
    [{"model": "vit"}, {"trust_layers": True}, {"workers": Workers(micro_batch=2)}, {"workers": Workers(sharding="ddp")}],
)
def test_what_the_paper_s_preset_alone_knows_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="--model, --trust-layers, --micro-batch and --sharding in its preset paper alone"):
        figure3.run(Options("smoke", tmp_path, tmp_path, **given))


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors", {"attention": json.dumps({})})
    with pytest.raises(ValueError, match="m.safetensors holds no vision transformer"):
        vision.load_vit(tmp_path / "m.safetensors")


def test_each_rate_is_a_run_of_its_own(tmp_path, monkeypatch):
    """The images are read once for all of them."""
    asked, read, load = [], [], figure3.load_images
    monkeypatch.setattr(figure3, "load_images", lambda path: read.append(path) or load(path))
    monkeypatch.setattr(figure3, "pretrained", lambda *_: None)
    monkeypatch.setattr(figure3, "fine_tune", lambda model, row, this, settings, *_: asked.append(settings.learning_rate))
    monkeypatch.setattr(figure3.figure3_paper, "fine_tune", lambda *a: asked.append(a[-1].learning_rate))
    for preset, models in (("smoke", 1), ("paper", 2)):
        asked.clear()
        figure3.run(Options(preset, tmp_path, tmp_path, rows=("MHA",), seeds=(0,), learning_rates=(1e-3, 2e-3)))
        assert asked == models * [1e-3, 2e-3]
    assert len(read) == 1
