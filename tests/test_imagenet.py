"""Figure 3 at the paper's scale, with a small model and few photographs: the same images for any number of workers, every row trained."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import relative_error, tokens
from PIL import Image
from tokenizers import Tokenizer, models

from reproduce.data import imagenet
from reproduce.data.imagenet import centre_view, held_out_batches, load_photographs, training_batches, training_view
from reproduce.experiments import figure3, figure3_paper
from reproduce.models.rows import Row
from reproduce.report import results
from reproduce.store import records
from reproduce.train.distributed import Workers
from reproduce.train.loop import Diverged, TrainResult
from reproduce.train.options import Options
from reproduce.train.public_models import configured, open_model
from tucker_ref import MultiHeadAttention

datasets = pytest.importorskip("datasets", reason="datasets is not installed; it is in the paper extra")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of two classes, darker and lighter, wide and high, in the layout of ImageNet."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, count in (("train", 8), ("validation", 5)):
        for name, level in (("dark", 60), ("light", 180)):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(level - 50, level + 50, (20 + 4 * n, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{n}.jpg")
    return root


@pytest.fixture
def photographs(folder, tmp_path):
    return load_photographs(str(folder), tmp_path / "cache", side=16)


def test_without_a_folder_the_hub_is_asked(photographs, monkeypatch, tmp_path):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return {"train": photographs.train, "validation": photographs.test}

    monkeypatch.setattr(imagenet, "import_datasets", lambda: SimpleNamespace(load_dataset=load_dataset))
    found = load_photographs(None, tmp_path, side=16)
    assert asked == [(imagenet.HUB_NAME, {"cache_dir": str(tmp_path)})]
    assert found.describe() | {"sha256": ""} == photographs.describe() | {"name": imagenet.HUB_NAME, "sha256": ""}


def test_other_photographs_in_the_same_classes_are_other_data(photographs, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    same = load_photographs(str(tmp_path / "other"), tmp_path / "cache", side=16)
    Image.new("RGB", (99, 99)).save(tmp_path / "other" / "train" / "dark" / "0.jpg")
    assert photographs.sha256 == same.sha256  # control: where a folder lies changes nothing
    assert load_photographs(str(tmp_path / "other"), tmp_path / "cache2", side=16).sha256 != same.sha256


def test_photographs_carry_their_classes(photographs):
    assert photographs.n_classes == 2 and photographs.describe()["train_images"] == 16
    for row in photographs.train:
        assert (np.asarray(row["image"]).mean() > 120) == (row["label"] == 1)


def test_files_of_every_kind_are_seen_in_colour(tmp_path):
    """As they lie on a disk: JPEG in grey and CMYK, PNG with a palette and with transparency; high, wide and smaller than a view."""
    kinds = {"grey.jpg": "L", "cmyk.jpg": "CMYK", "palette.png": "P", "clear.png": "RGBA"}
    rng = np.random.default_rng(0)
    for part in ("train", "validation"):
        for n, name in enumerate(("n01", "n02")):
            (tmp_path / "files" / part / name).mkdir(parents=True)
            for side, (file, mode) in enumerate(kinds.items(), 8):
                pixels = rng.integers(100 * n, 100 * n + 60, (side, 40 - 2 * side, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(tmp_path / "files" / part / name / file)
    found = load_photographs(str(tmp_path / "files"), tmp_path / "cache", side=12)
    assert found.n_classes == 2 and found.describe()["train_images"] == found.describe()["test_images"] == 8
    assert {row["image"].mode for row in found.train} == {"L", "CMYK", "P", "RGBA"}
    for images, labels in (*held_out_batches(found, 3, slice(None), 0), training_batches(found, 8, 0, slice(None), 0)(0)):
        assert images.shape[1:] == (12, 12, 3) and images.dtype == torch.uint8
        assert [bool(image.float().mean() > 80) for image in images] == labels.bool().tolist()  # the second class is lighter


def test_views_are_random_in_training_and_the_middle_at_test_time():
    ramp = np.arange(64, dtype=np.uint8)[None, :, None].repeat(48, 0).repeat(3, 2) * 4
    image = Image.fromarray(ramp)
    first, again, other = (training_view(image, 16, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    views = [training_view(image, 16, np.random.default_rng(seed)).astype(int) for seed in range(40)]
    mirrored = [view[0, 0, 0] > view[0, -1, 0] for view in views]
    assert 10 < sum(mirrored) < 30
    widths = [abs(view[0, 0, 0] - view[0, -1, 0]) for view in views]
    assert min(widths) < 100 < 150 < max(widths)
    middle = centre_view(image, 16).astype(int)
    assert middle[0, 0, 0] + middle[0, -1, 0] == pytest.approx(63 * 4, abs=6)  # as much left out on both sides
    assert middle[0, -1, 0] - middle[0, 0, 0] == pytest.approx(48 * 224 / 256 * 4 * 15 / 16, abs=8)


def test_workers_share_the_batch_of_one(photographs):
    whole = training_batches(photographs, 6, 0, slice(None), 0)
    parts = [training_batches(photographs, 6, 0, slice(rank, 6, 2), 0) for rank in (0, 1)]
    for step in (0, 1, 5):  # 5: after a resume
        images, labels = whole(step)
        for rank, part in enumerate(parts):
            mine = part(step)
            assert torch.equal(mine[0], images[rank::2]) and torch.equal(mine[1], labels[rank::2])
            assert not torch.equal(mine[0], images[1 - rank :: 2])  # control
    assert not torch.equal(whole(6)[0], whole(7)[0])
    held_out = [torch.cat([labels for _, labels in held_out_batches(photographs, 3, slice(r, None, 2), 0)]) for r in (0, 1)]
    assert torch.equal(torch.stack(held_out, 1).flatten(), torch.tensor(photographs.test["label"]))


def test_a_folder_without_splits_is_named(tmp_path):
    with pytest.raises(ValueError, match="--images .*: no folder train or validation"):
        load_photographs(str(tmp_path), tmp_path / "cache", 16)


def biased(query_bias: float) -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = MultiHeadAttention(24, 4, bias=True).double()
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            projection.weight.mul_(10)
            projection.bias.normal_(std=query_bias if projection is layer.q_proj else 1.0)
    return layer


def deep(file):
    Image.fromarray(np.full((20, 28), 40_000, np.uint16)).save(file)


SPOILT = {  # what is done to a photograph, and what is said of it
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:300]), "Truncated File Read"),
    "no photograph": (lambda file: file.write_bytes(b"hello"), "cannot identify image file .*0.png"),
    "huge": (lambda file: Image.new("1", (20_000, 20_000)).save(file), "Image size .400000000 pixels. exceeds limit"),
    "16 bits": (deep, r"it is of mode I(;16)?; 8 bits for each colour are needed"),
    "control": (lambda file: None, None),
}


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("name", SPOILT)
def test_a_photograph_that_cannot_be_used_is_one_line(name, processes, folder, tmp_path):
    spoil, message = SPOILT[name]
    shutil.copytree(folder, tmp_path / "spoilt")
    for part in ("train", "validation"):
        file = tmp_path / "spoilt" / part / "dark" / "0.png"
        Image.open(file.with_suffix(".jpg")).save(file, "JPEG")
        file.with_suffix(".jpg").unlink()
        spoil(file)
    found = load_photographs(str(tmp_path / "spoilt"), tmp_path / "cache", side=16)
    ways = {
        "validation": lambda: list(held_out_batches(found, 4, slice(None), processes)),
        "train": lambda: training_batches(found, 200, 0, slice(None), processes)(0),
    }
    for part, read in ways.items():
        if message is None:
            assert read()
            continue
        with pytest.raises(ValueError, match=f"^{part} of spoilt, photograph 0: {message}") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_mistake_of_ours_is_no_fault_of_a_photograph():
    class Rows:
        def __getitem__(self, _number):
            return centre_view(None, 4)

    with pytest.raises(AttributeError):
        imagenet._photograph(Rows(), 0, "train")


def test_folders_of_other_classes_or_of_none_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "validation" / "light").rename(tmp_path / "other" / "validation" / "neither")
    with pytest.raises(ValueError, match="--images .*other: of class neither there are photographs in validation alone"):
        load_photographs(str(tmp_path / "other"), tmp_path / "cache", side=16)
    for part in ("train", "validation"):  # photographs without classes
        for n, file in enumerate((folder / part).rglob("*.jpg")):
            (tmp_path / "flat" / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "flat" / part / f"{n}.jpg")
    with pytest.raises(ValueError, match="--images .*flat: there are photographs of no class"):
        load_photographs(str(tmp_path / "flat"), tmp_path / "cache", side=16)
    for file in (tmp_path / "flat").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(ValueError, match="--images .*flat cannot be read: [A-Za-z]+: "):
        load_photographs(str(tmp_path / "flat"), tmp_path / "cache", side=16)


def test_mla_loses_the_queries_bias_alone():
    x = tokens(2, 7, 24)
    full = Row("MLA", latent=24, shared_kv=False)
    for query_bias, is_exact in ((0.0, True), (1.0, False)):
        layer = biased(query_bias)
        error = relative_error(figure3_paper.converted(layer, full)(x, causal=False), layer(x, causal=False))
        assert (error < 1e-12) if is_exact else (error > 1e-3)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A vision transformer with random weights, saved as transformers saves it, and a preset that is soon done."""
    torch.manual_seed(0)
    shape = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32, image_size=16, patch_size=4)
    transformers.ViTForImageClassification(transformers.ViTConfig(**shape, num_labels=3)).save_pretrained(tmp_path / "vit")
    rows = (Row("MHA"), Row("GQA", n_kv_heads=2), Row("MLA", latent=8, shared_kv=True), Row("Tucker", ranks=(3, 8, 8)))
    model = dataclasses.replace(figure3_paper.PRESET.models[0], name=str(tmp_path / "vit"), rows=rows)
    settings = dataclasses.replace(
        figure3_paper.PRESET.train, batch_size=4, warmup_steps=2, log_every=2, checkpoint_every=2, learning_rate=3e-3
    )
    preset = dataclasses.replace(figure3_paper.PRESET, models=(model,), train=settings, seeds=(0,), micro_batch=2)
    monkeypatch.setattr(figure3_paper, "PRESET", preset)
    monkeypatch.setattr(figure3_paper, "decoders", lambda count: 0)
    return preset


@pytest.mark.filterwarnings("ignore:.*'pin_memory'")
def test_every_row_of_a_public_model_is_converted_and_fine_tuned(tiny, folder, tmp_path):
    options = Options("paper", tmp_path / "out", tmp_path / "records", images=str(folder))
    figure3.run(options)
    found = records.load(tmp_path / "records", "figure3", "paper")
    assert [r.method for r in found] == [f"{row.label}, vit" for row in tiny.models[0].rows]
    for record in found:
        assert record.config["train"]["steps"] == 10 * 16 // 4 and record.metrics["images_seen"] == 160
        assert record.metrics["workers"]["accumulation_steps"] == 2
        assert record.metrics["converted"] == {"top1": 0.5, "top5": 1.0}  # the classifier starts at zero
    assert found[0].metrics["top1"] > 0.8  # dark or light is soon learned
    sizes = [record.metrics["attention_parameters"] for record in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    drawn = results.render(found)
    assert "Figure 3 as a table: vit, pretrained by others" in drawn and all(f"| {r.method} " in drawn for r in found)
    figure3.run(options)
    assert len(records.load(tmp_path / "records")) == 4
    second = dataclasses.replace(options, records=tmp_path / "second", workers=Workers(rank=1), rows=("MHA",), steps=2)
    figure3.run(second)
    assert not records.load(tmp_path / "second")  # of several workers the first alone records


@pytest.mark.filterwarnings("ignore:.*'pin_memory'")
def test_a_run_that_diverges_is_on_record_and_stops_no_other(tiny, folder, tmp_path, monkeypatch):
    train = figure3_paper.train

    def breaks(model, batch_at, loss_of, settings, checkpoint, title, **more):
        if "MHA" in title:
            raise Diverged("the loss is nan", 2, TrainResult([[2, 1.5, 0.1]], 1.0))
        return train(model, batch_at, loss_of, settings, checkpoint, title, **more)

    monkeypatch.setattr(figure3_paper, "train", breaks)
    figure3.run(
        Options("paper", tmp_path / "out", tmp_path / "records", images=str(folder), rows=("MHA", "GQA n_KV=2"), steps=2)
    )
    broken, other = (r.metrics for r in records.load(tmp_path / "records"))
    assert broken["diverged_at"] == 2 and broken["curve"] == [[2, 1.5, 0.1]] and "top1" not in broken and broken["converted"]
    assert "top1" in other and "diverged at step 2" in results.render(records.load(tmp_path / "records"))


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:.*'pin_memory'")
def test_model_and_photographs_are_opened_once_and_what_is_on_record_opens_no_model(tiny, folder, tmp_path, monkeypatch):
    calls = []
    for name in ("open_model", "load_photographs"):
        real = getattr(figure3_paper, name)
        monkeypatch.setattr(figure3_paper, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    options = Options("paper", tmp_path / "out", tmp_path / "records", images=str(folder), steps=2)
    options = dataclasses.replace(options, seeds=(0, 1), rows=("MHA", "GQA n_KV=2"))
    figure3.run(options)
    assert sorted(calls) == ["load_photographs", "open_model"]  # for two rows and two seeds
    calls.clear()
    figure3.run(options)
    assert calls == ["load_photographs"]  # its labels are part of what a run is
    monkeypatch.setattr(figure3_paper, "PRESET", dataclasses.replace(tiny, models=2 * tiny.models))
    figure3.run(options)
    assert calls == 2 * ["load_photographs"]  # once for two models of one image size
    calls.clear()
    monkeypatch.setattr(figure3_paper, "PRESET", tiny)
    more = dataclasses.replace(options, records=tmp_path / "more", seeds=(0,), rows=("MHA",), learning_rates=(1e-3, 2e-3))
    figure3.run(more)
    assert sorted(calls) == ["load_photographs", "open_model"]  # for two rates
    assert [r.config["train"]["learning_rate"] for r in records.load(tmp_path / "more")] == [1e-3, 2e-3]
    found = records.load(tmp_path / "records")
    alone = dataclasses.replace(options, records=tmp_path / "alone", seeds=(1,), rows=("GQA n_KV=2",))
    figure3.run(alone)
    (single,) = records.load(tmp_path / "alone")
    same = [r.metrics == single.metrics | {"curve": r.metrics["curve"]} for r in found]  # a curve holds seconds
    assert same == [False, False, False, True]  # a run starts from the model as it was, whatever ran before


def test_a_configuration_says_what_the_opened_model_does(tiny, tmp_path):
    opened = open_model(tiny.models[0].name)
    assert configured(tiny.models[0].name) == (opened.name, opened.image_size) == ("vit", 16)
    opened.save(tmp_path / "saved.safetensors")
    assert configured(str(tmp_path / "saved.safetensors")) is None and configured(str(tmp_path / "missing")) is None
    subject = figure3_paper.Subject(str(tmp_path / "saved.safetensors"), lambda side: side)
    weights = open_model(str(tmp_path / "saved.safetensors")).weights
    assert subject.config == {"model": "vit", "image_size": 16, "weights": weights} and subject.photographs == 16
    trusted = figure3_paper.Subject(tiny.models[0].name, lambda side: side, trust_layers=True)
    assert trusted.config == {"model": "vit", "image_size": 16, "weights": opened.weights, "layers": "trusted, not compared"}


def test_a_named_checkpoint_takes_the_place_of_the_preset_s(tiny, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        figure3_paper, "fine_tune", lambda subject, row, seed, options: asked.append((subject.model, row.label))
    )
    figure3.run(Options("paper", tmp_path / "out", tmp_path / "records", model="another", rows=("MHA",)))
    assert asked == [("another", "MHA")]


def test_a_language_model_is_refused(tmp_path):
    shape = dict(n_embd=24, n_head=4, n_layer=1, vocab_size=30, n_positions=16)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="--model .*gpt2 takes no images"):
        figure3.run(Options("paper", tmp_path / "out", tmp_path / "records", model=str(tmp_path / "gpt2")))


@pytest.mark.parametrize(("cores", "workers", "decoders"), [(16, 4, 3), (2, 8, 1), (None, 1, 1)])
def test_the_cores_of_a_machine_are_shared_by_its_workers(monkeypatch, cores, workers, decoders):
    monkeypatch.setattr(figure3_paper.os, "cpu_count", lambda: cores)
    assert figure3_paper.decoders(workers) == decoders
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of the workers, those on this machine
    assert figure3_paper.decoders(8) == max(1, (cores or 1) // 2 - 1)


def test_the_classifier_is_kept_where_it_fits(tiny):
    opened = open_model(tiny.models[0].name)
    kept = opened.model.classifier
    figure3_paper.with_classes(opened, 3)
    assert opened.model.classifier is kept
    figure3_paper.with_classes(opened, 2)
    assert opened.model.classifier.out_features == 2 and not opened.model.classifier.weight.any()


@pytest.mark.parametrize("changes, message", [(dict(count=2), "paper alone"), (dict(sharding="fsdp"), "fit on one GPU")])
def test_what_figure_3_cannot_share_is_refused(tmp_path, changes, message):
    options = Options("smoke", tmp_path, tmp_path)
    workers = dataclasses.replace(options.workers, **changes)
    preset = "paper" if "fit" in message else "smoke"
    with pytest.raises(ValueError, match=message):
        figure3.run(dataclasses.replace(options, workers=workers, preset=preset))
