"""Figure 3 where rates are chosen: on images that are held out, by one seed that then judges nothing; and every start of a row."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import relative_error, run_here

from reproduce.data.augment import Augmentation
from reproduce.data.images import load_images
from reproduce.experiments import figure3, figure3_tiny
from reproduce.experiments.figure3_tiny import ALL_HEADS, PRESETS, PRETRAINED
from reproduce.models.rows import Row
from reproduce.store import records
from reproduce.store.bits import packed, unpacked
from reproduce.train import dry_run, vision
from reproduce.train.options import STARTS, Options
from reproduce.train.vision import ImageSets
from tucker_ref import TuckerAttention, relative_errors

NAME = "gpu-tiny-imagenet"
FULL, SMALL = Row("Tucker", ranks=(4, 16, 16)), Row("Tucker", ranks=(3, 6, 4), post_ranks=(3, 2, 4))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Six classes of coloured noise, 20 training and 5 test images each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 200, (6, 3))

    def part(each):
        y = np.repeat(np.arange(6), each)
        x = rng.integers(-40, 40, (len(y), 8, 8, 3)) + colours[y][:, None, None]
        return x.clip(0, 255).astype(np.uint8), y

    (x_train, y_train), (x_test, y_test) = part(20), part(5)
    path = tmp_path_factory.mktemp("images") / "six.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture
def tiny(monkeypatch):
    short = dict(batch_size=16, warmup_steps=2, log_every=1, checkpoint_every=10, precision="float32", compiled=False)
    preset = PRESETS[NAME]
    preset = dataclasses.replace(
        preset,
        rows=(Row("MHA"), Row("GQA", n_kv_heads=2), Row("MLA", latent=8, shared_kv=True), FULL, SMALL),
        started_anew={"hooi": (SMALL.label,), "moment": ("GQA n_KV=2", SMALL.label)},
        pretrain=dataclasses.replace(preset.pretrain, **short),
        finetune=dataclasses.replace(preset.finetune, **short),
        **dict(image_size=8, n_classes=6, images=120, patch_size=4, d_model=16, n_heads=4, n_layers=2, held_out=12),
        **dict(pretrain_epochs=2, epochs=1, pretrain_rates=(1e-3, 3e-3), rates=(1e-3, 2e-3), seeds=(0, 1, 2)),
    )
    monkeypatch.setitem(PRESETS, NAME, preset)
    return preset


def options_of(path, folder, **more) -> Options:
    return Options(NAME, folder, folder / "records", images=str(path), **more)


def run(path, folder, **more) -> list[records.Record]:
    figure3.run(options_of(path, folder, **more))
    return records.load(folder / "records", "figure3")


def rates_of(found, method: str, seed: int) -> list[float]:
    part = "pretrain" if method == PRETRAINED else "train"
    return [r.config[part]["learning_rate"] for r in found if (r.method, r.seed) == (method, seed)]


@pytest.mark.no_cover
def test_one_seed_tries_every_rate_and_the_others_take_the_best(tiny, path, tmp_path):
    found = run(path, tmp_path)
    by_top5 = lambda runs: min(runs, key=lambda r: (-r.metrics["validation_top5"], r.metrics["validation_loss"]))  # noqa: E731
    starts = [r for r in found if r.method == PRETRAINED and r.seed == 0]
    assert rates_of(found, PRETRAINED, 0) == [1e-3, 3e-3]
    best = by_top5(starts).config["pretrain"]
    assert rates_of(found, PRETRAINED, 1) == rates_of(found, PRETRAINED, 2) == [best["learning_rate"]]
    for row in tiny.rows:
        tried = [r for r in found if r.method == row.label and r.seed == 0]
        assert rates_of(found, row.label, 0) == [1e-3, 2e-3] and {r.metrics["start"] for r in tried} == {
            tried[0].metrics["start"]
        }
        assert rates_of(found, row.label, 1) == rates_of(found, row.label, 2) == [by_top5(tried).rate]
    assert len(found) == (2 + 1 + 1) + 5 * (2 + 1 + 1)
    assert all(r.config["pretrain"] == best for r in found if r.is_trained)  # every row starts from the best pretraining
    assert best["steps"] == 2 * 108 // 16 and found[-1].config["train"]["steps"] == 108 // 16
    assert found[-1].data["train_images"] == 108 and found[-1].data["held_out_images"] == 12
    assert json.loads(json.dumps(found[-1].config["augmentation"])) == Augmentation().config()


@pytest.mark.no_cover
def test_a_repeated_command_and_slices_of_it_train_nothing_twice(tiny, path, tmp_path, monkeypatch):
    whole = run(path, tmp_path / "whole", seeds=(0, 1))
    titles, train = [], figure3_tiny.train
    monkeypatch.setattr(figure3_tiny, "train", lambda *a: titles.append(a[-1]) or train(*a))
    sliced = tmp_path / "slices"
    for rates in ((1e-3,), (3e-3,)):
        run(path, sliced, rows=(PRETRAINED,), seeds=(0,), pretrain_rates=rates)
    assert titles == 2 * ["figure3 MHA pretrained seed 0"]
    run(path, sliced, rows=(PRETRAINED,), seeds=(1,))
    for row in tiny.rows:
        found = run(path, sliced, rows=(row.label,), seeds=(0, 1))
    assert len(titles) == len(set(zip(titles, map(str, range(len(titles)))))) == len(whole)
    same = lambda r: (r.id, {k: v for k, v in r.metrics.items() if k != "tokens_per_second"})  # noqa: E731
    assert sorted(map(same, found), key=lambda x: x[0]) == sorted(
        map(same, whole), key=lambda x: x[0]
    )  # in any order, the same digits
    run(path, sliced, seeds=(0, 1))
    assert len(titles) == len(whole)


def test_a_run_that_was_stopped_goes_on_to_the_same_digits(tiny, path, tmp_path, monkeypatch):
    (expected,) = (
        r
        for r in run(path, tmp_path / "whole", rows=(PRETRAINED,), seeds=(0,))
        if r.config["pretrain"]["learning_rate"] == 1e-3
    )
    batches = ImageSets.batches

    def stops(self, *arguments):
        batch_at = batches(self, *arguments)

        def at(step):
            if step == 12:
                raise KeyboardInterrupt
            return batch_at(step)

        return at

    given = dict(rows=(PRETRAINED,), seeds=(0,), pretrain_rates=(1e-3,))
    monkeypatch.setattr(ImageSets, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped", **given)
    monkeypatch.setattr(ImageSets, "batches", batches)
    (found,) = run(path, tmp_path / "stopped", **given)
    assert found.id == expected.id and found.metrics["curve"] == expected.metrics["curve"]
    assert (
        found.metrics["hits"] == expected.metrics["hits"]
        and found.metrics["validation_loss"] == expected.metrics["validation_loss"]
    )


def test_a_rate_that_is_not_chosen_yet_is_named(tiny, path, tmp_path):
    with pytest.raises(
        ValueError, match=r"MHA pretrained seed 0: its rate is not chosen yet, 0.001, 0.003 are not on record in"
    ):
        run(path, tmp_path, seeds=(1,))
    run(path, tmp_path, rows=(PRETRAINED,), seeds=(0,))
    run(path, tmp_path, rows=("MHA",), seeds=(0,), learning_rates=(1e-3,))
    with pytest.raises(
        ValueError, match=r"figure3 MHA seed 0: .* 0.002 are not on record .* or name a rate with --learning-rate"
    ):
        run(path, tmp_path, rows=("MHA",), seeds=(1,))
    found = run(path, tmp_path, rows=("MHA",), seeds=(1,), learning_rates=(5e-4,))  # a given one is taken as it is
    assert rates_of(found, "MHA", 1) == [5e-4] and found[-1].config["train"]["warmup_steps"] == 2
    found = run(path, tmp_path, rows=("MHA",), seeds=(1,), learning_rates=(5e-4,), pretrain_rates=(1e-3, 3e-3), steps=2)
    assert len(rates_of(found, "MHA", 1)) == 3 and found[-1].steps == 2  # from both


def test_held_out_top_5_chooses_the_rates_whatever_the_loss_says(tiny, path, tmp_path):
    run(path, tmp_path, rows=("MHA",), seeds=(0,), learning_rates=(1e-3,), pretrain_rates=(1e-3, 3e-3))
    run(path, tmp_path, rows=("MHA",), seeds=(0,), learning_rates=(2e-3,), pretrain_rates=(1e-3, 3e-3))
    (file,) = (tmp_path / "records").glob("*.json")
    study = figure3_tiny.Study(tiny, options_of(path, tmp_path), load_images(str(path)).holding_out(12))

    def chosen(**reached) -> tuple[float, ...]:
        """Of the pretraining and of a row, where the lower rates reach a top-5 of 0.5 and a loss of 1, the higher ones this."""
        found = json.loads(file.read_text(encoding="utf-8"))
        for r in found:
            rate = r["config"].get("train", r["config"]["pretrain"])["learning_rate"]
            r["metrics"] |= {"validation_top5": 0.5, "validation_loss": 1.0} | (reached if rate > 1e-3 else {})
        file.write_text(json.dumps(found), encoding="utf-8")
        start = study.start_rates(1)
        return start + study.rates(tiny.rows[0], 1, start[0])

    assert chosen(validation_top5=0.6, validation_loss=2.0) == (3e-3, 2e-3)
    assert chosen(validation_top5=0.4, validation_loss=0.5) == (1e-3, 1e-3)
    assert chosen(validation_loss=0.5) == (3e-3, 2e-3)  # of equals the lower loss
    assert chosen() == (1e-3, 1e-3)  # of these the lower rate


def test_a_run_that_diverged_is_on_record_and_is_not_chosen(tiny, path, tmp_path, monkeypatch, capsys):
    loss = ImageSets.loss

    def broken(self, model, *batch):
        gone = isinstance(model.blocks[0].attention, TuckerAttention) and next(calls) == 0
        return loss(self, model, *batch) * (float("nan") if gone else 1.0)

    calls = iter(range(10**6))  # the first step of the first of both rates
    run(path, tmp_path, rows=(PRETRAINED,), seeds=(0,))
    monkeypatch.setattr(ImageSets, "loss", broken)
    first, second = (r for r in run(path, tmp_path, rows=(FULL.label,), seeds=(0,)) if r.method == FULL.label)
    assert first.metrics["diverged_at"] == 1 and "top5" not in first.metrics and first.metrics["tokens_per_second"] is None
    assert "top5" in second.metrics and second.metrics["tokens_per_second"] > 0
    assert "at step 1; recorded" in capsys.readouterr().out
    study = figure3_tiny.Study(tiny, options_of(path, tmp_path), load_images(str(path)).holding_out(12))
    assert (first.rate, second.rate) == (1e-3, 2e-3)
    assert study.rates(FULL, 1, study.start_rates(1)[0]) == (2e-3,)


def test_what_is_exact_loses_nothing_and_hits_are_those_of_the_model(tiny, path, tmp_path):
    found = run(path, tmp_path, rows=("MHA", FULL.label, SMALL.label), seeds=(0,), learning_rates=(1e-3,))
    by_method = {
        r.method: r for r in found if r.config["pretrain"]["learning_rate"] == found[-1].config["pretrain"]["learning_rate"]
    }
    start = by_method[PRETRAINED].metrics
    for exact in ("MHA", FULL.label):
        assert by_method[exact].metrics["converted"]["hits"] == start["hits"]
        assert by_method[exact].metrics["converted"]["validation_loss"] == pytest.approx(start["validation_loss"], abs=1e-5)
    assert by_method[SMALL.label].metrics["converted"]["validation_loss"] != pytest.approx(start["validation_loss"], abs=1e-5)
    for metrics in (start, by_method["MHA"].metrics, by_method["MHA"].metrics["converted"]):
        for name in ("top1", "top5"):
            assert unpacked(metrics["hits"][name], 30).mean() == pytest.approx(metrics[name])
    (place,) = (tmp_path / "models").glob(f"*{by_method[PRETRAINED].config['pretrain']['learning_rate']:g}.safetensors")
    model, _ = vision.load_vit(place)
    data = load_images(str(path)).holding_out(12)
    logits = model(vision.as_input(torch.from_numpy(data.x_test), 255))
    first = logits.argmax(1).numpy() == data.y_test
    assert np.array_equal(unpacked(start["hits"]["top1"], 30), first)
    assert by_method["MHA"].metrics["start"] == figure3_tiny.weights_hash(model)
    with torch.no_grad():
        model.class_token[0] += 1e-6
    assert by_method["MHA"].metrics["start"] != figure3_tiny.weights_hash(model)


def test_a_model_that_is_gone_is_trained_again_and_one_that_is_there_is_read(tiny, path, tmp_path, monkeypatch):
    run(path, tmp_path, rows=(PRETRAINED,), seeds=(0,))
    titles, train = [], figure3_tiny.train
    monkeypatch.setattr(figure3_tiny, "train", lambda *a: titles.append(a[-1]) or train(*a))
    run(path, tmp_path, rows=("MHA",), seeds=(0,))
    assert titles == 2 * ["figure3 MHA seed 0"]
    for model in (tmp_path / "models").iterdir():
        model.unlink()
    found = run(path, tmp_path, rows=("GQA n_KV=2",), seeds=(0,))
    assert titles[2:] == ["figure3 MHA pretrained seed 0", *2 * ["figure3 GQA n_KV=2 seed 0"]]
    assert sum(r.method == PRETRAINED for r in found) == 2  # the first record stands
    for again, trained in (
        ((PRETRAINED,), 2),
        ((PRETRAINED,), 0),
        (("GQA n_KV=2",), 0),
    ):  # both rates, before other processes start
        titles.clear()
        for model in (tmp_path / "models").iterdir() if trained or again != (PRETRAINED,) else ():
            model.unlink()
        run(path, tmp_path, rows=again, seeds=(0,))
        assert titles == trained * ["figure3 MHA pretrained seed 0"]


def test_each_start_is_a_run_of_its_own(tiny, path, tmp_path):
    run(path, tmp_path, rows=(PRETRAINED,), seeds=(0,))
    given = dict(rows=(SMALL.label,), seeds=(0,), learning_rates=(1e-3,))
    starts = {how: run(path, tmp_path, start=how, **given)[-1] for how in ("hosvd", "hooi", "moment")}
    assert len({r.id for r in starts.values()}) == 3
    assert [r.method.removeprefix(SMALL.label) for r in starts.values()] == ["", ", start by HOOI", ", start by second moments"]
    assert [r.config.get("start") for r in starts.values()] == [None, "hooi", "moment"]
    losses = {r.metrics["converted"]["validation_loss"] for r in starts.values()}
    assert len(losses) == 3


def test_starts_are_what_they_are_called(tiny, path, tmp_path):
    """HOOI is nearer in the weights than the HOSVD, second moments nearer on such inputs; and these inputs are the model's own."""
    run(path, tmp_path, rows=(PRETRAINED,), seeds=(0,))
    study = figure3_tiny.Study(tiny, options_of(path, tmp_path), load_images(str(path)).holding_out(12))
    start = figure3_tiny.Start(study, 0, 1e-3)
    model = start.kept[0]
    received = []
    hook = model.blocks[1].attention.register_forward_pre_hook(lambda module, given: received.append(given[0]))
    model(vision.as_input(torch.from_numpy(study.data.x_train), 255))
    hook.remove()
    x = received[0].flatten(0, 1).double()
    assert relative_error(start.moments[1], x.T @ x / len(x)) < 1e-4

    def errors(how, moment):
        layers = (block.attention for block in start.converted(SMALL, how).blocks)
        pairs = zip((block.attention for block in model.blocks), layers, start.moments)
        return np.array([relative_errors(a, b, m if moment else None) for a, b, m in pairs]).mean()

    plain, refitted, aware = (errors(how, False) for how in ("hosvd", "hooi", "moment"))
    assert refitted < plain < aware and errors("moment", True) < errors("hosvd", True)
    assert start.moments is start.moments  # taken once


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(rows=("GQA n_KV=2",), start="hooi"), "no row is called GQA n_KV=2; there are: MHA pretrained; Tucker"),
        (
            dict(rows=(FULL.label,), start="hooi"),
            r"no row is called Tucker \[4,16,16\]; there are: MHA pretrained; Tucker \[3,6,4",
        ),
        (dict(rows=("MHA",), start="moment"), "no row is called MHA; there are: MHA pretrained; GQA"),
        (dict(images=None), "is trained on images that you bring: name an .npz file with --images"),
    ],
)
def test_what_cannot_be_run_is_refused(tiny, path, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        figure3.run(dataclasses.replace(options_of(path, tmp_path), **given))


def test_grey_images_are_refused(tiny, tmp_path):
    x, y = np.zeros((60, 8, 8), dtype=np.uint8), np.arange(60) % 6
    np.savez(tmp_path / "grey.npz", x_train=x, y_train=y, x_test=255 - x, y_test=y)
    with pytest.raises(ValueError, match=r"grey.npz: its images are \(8, 8, 1\); augmentation takes three colours"):
        run(tmp_path / "grey.npz", tmp_path)


@pytest.mark.parametrize("given", [dict(start="hooi"), dict(pretrain_rates=(1e-3,))])
def test_other_presets_know_no_start(given, tmp_path):
    with pytest.raises(ValueError, match="figure3 knows --start and --pretrain-rate in its preset gpu-tiny-imagenet alone"):
        figure3.run(Options("smoke", tmp_path, tmp_path, **given))


def test_the_command_line_reaches_the_preset(tiny, path, tmp_path):
    places = ("--images", path, "--out", tmp_path, "--records", tmp_path / "records", "--device", "cpu")
    start = ("figure3", "--preset", NAME, *places, "--seeds", "0", "--pretrain-rate", "1e-3")
    assert run_here(*start, "--rows", PRETRAINED) == 0
    assert run_here(*start, "--rows", SMALL.label, "--start", "hooi", "--learning-rate", "1e-3,2e-3") == 0
    methods = [r.method for r in records.load(tmp_path / "records")]
    assert methods == [PRETRAINED, *2 * [f"{SMALL.label}, start by HOOI"]]


def test_the_dry_run_needs_no_images_and_tells_minutes_and_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "COMMITTED", tmp_path / "no records")  # their speeds would count, and they grow
    assert run_here("figure3", "--preset", NAME, "--dry-run", "--rows", "MHA,Tucker [8,24,24]", "--gpu-memory", "140") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Steps: 8,789, which see 4,499,968 images" in printed and "Steps: 878, which see 449,536 images" in printed
    assert "| MHA pretrained | 21.4M | 7.08M |" in printed and "| Tucker [8,24,24] | 14.9M | 0.56M |" in printed
    # 6 x 21.4M parameters x 4.5M images x 65 tokens, at 150 TFLOP/s
    assert "guessed at 150 TFLOP/s on each of 1 GPU: MHA pretrained 4.2." in printed and not list(tmp_path.iterdir())
    assert run_here("figure3", "--preset", NAME, "--dry-run", "--rows", PRETRAINED) == 0
    assert "fine-tuning" not in capsys.readouterr().out


# The preset itself.


def test_unequal_rows_and_those_with_all_heads_are_as_large_as_the_rows_beside_them():
    size = lambda row: row.cost(384, 12).parameters  # noqa: E731
    rows = {row.label: row for row in PRESETS[NAME].rows}
    assert len(rows) == 31 == len(PRESETS[NAME].rows)
    for label, row in rows.items():
        if row.mechanism == "Tucker" and not row.post_ranks and row not in ALL_HEADS.values():
            moved = figure3_tiny.unequal(row)
            assert size(moved) == size(row) and moved.label in rows and moved.post_ranks != moved.ranks, label
    for label, whole in ALL_HEADS.items():
        assert 0.98 < size(whole) / size(rows[label]) < 1 and whole.ranks[0] == 12 and whole.label in rows


def test_few_rows_are_started_in_other_ways_and_the_page_says_how_many_runs_that_is():
    preset = PRESETS[NAME]
    labels = {how: [row.label for row in preset.started(how)] for how in STARTS}
    assert len(labels["hosvd"]) == 31 and {how: set(labels[how]) for how in preset.started_anew} == {
        how: set(rows) for how, rows in preset.started_anew.items()
    }
    assert {label.split()[0] for label in labels["hooi"]} == {"Tucker"} < {label.split()[0] for label in labels["moment"]}
    runs = {how: len(rows) * (len(preset.rates) + len(preset.seeds) - 1) for how, rows in labels.items()}
    page = (Path(__file__).parent.parent / "docs" / "vision.md").read_text(encoding="utf-8")
    said = re.findall(r"^python -m reproduce figure3 \$IMAGES *(?:--start (\w+))? +#(.*)$", page, re.MULTILINE)
    assert {how or "hosvd": int(re.search(r"\d+(?= fine|$)", words)[0]) for how, words in said} == runs
    assert f"{len(preset.pretrain_rates) + len(preset.seeds) - 1} pretrainings" in said[0][1]


def test_rows_with_unequal_ranks_have_a_partner():
    pairs = PRESETS[NAME].of_equal_ranks()
    assert len(pairs) == 10 and pairs["Tucker [8,16,32 / 8,48,32]"] == "Tucker [8,32,32]"
    assert {row.label for row in PRESETS[NAME].rows if row.post_ranks} == set(pairs)


# Its pieces.


def test_held_out_images_are_of_all_classes_and_in_no_other_set(path):
    data = load_images(str(path))
    apart = data.holding_out(12)
    assert np.bincount(apart.y_held_out).tolist() == [2] * 6 and np.bincount(apart.y_train).tolist() == [18] * 6
    whole, parts = (sorted(map(bytes, x)) for x in (data.x_train, np.concatenate([apart.x_train, apart.x_held_out])))
    assert whole == parts and apart.sha256 == data.sha256 and "held_out_images" not in data.describe()
    assert np.array_equal(apart.x_held_out, data.holding_out(12).x_held_out)
    for count in (13, 120):
        with pytest.raises(ValueError, match=f"{count} of its 120 training images cannot be held out"):
            data.holding_out(count)


def test_every_epoch_sees_each_image_once_in_an_order_of_its_own():
    steps = [vision.in_epochs(10, 4, 3, step) for step in range(5)]  # two epochs; the third batch ends one and begins the next
    numbers = np.concatenate(steps)
    first, second = numbers[:10], numbers[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and list(first) != list(second)
    assert list(vision.in_epochs(10, 20, 3, 0)) == list(numbers)
    assert not np.array_equal(vision.in_epochs(10, 10, 4, 0), first)  # of the seed


def test_batches_are_augmented_and_depend_on_seed_and_step_alone(tiny, path):
    images = ImageSets.of(load_images(str(path)).holding_out(12), "cpu")
    batch_at = images.batches(tiny.finetune, 0, Augmentation())
    x, targets = batch_at(0)
    assert x.shape == (16, 3, 8, 8) and targets.shape == (16, 6) and torch.equal(x, batch_at(0)[0])
    later = images.batches(tiny.finetune, 0, Augmentation(), 5)
    assert torch.equal(batch_at(7)[0], later(2)[0]) and not torch.equal(batch_at(2)[0], later(2)[0])
    assert not torch.equal(x, images.batches(tiny.finetune, 1, Augmentation())(0)[0])
    plain = images.train[0][torch.from_numpy(vision.in_epochs(108, 16, 0, 0))]
    assert not torch.equal(plain.float(), x)  # control


def test_logits_that_are_no_numbers_are_no_guesses(tiny, path):
    images = ImageSets.of(load_images(str(path)).holding_out(12), "cpu")
    model = vision.build_vit(dict(image_size=8, channels=3, n_classes=6, patch_size=4, d_model=16, n_heads=4, n_layers=2))
    judged = images.judged(model)
    assert np.isfinite([judged["top1"], judged["top5"], judged["validation_loss"]]).all()  # control
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    judged = images.judged(model)
    assert np.isnan([judged["top1"], judged["top5"], judged["validation_loss"]]).all()
    assert vision.outcome(lambda: None, lambda: judged, tiny.finetune)[1] == {"diverged_at": tiny.finetune.steps}


def test_a_vision_transformer_compiles_its_blocks():
    torch.compiler.reset()
    model = vision.build_vit(
        dict(image_size=8, channels=3, n_classes=6, patch_size=4, d_model=16, n_heads=4, n_layers=2)
    ).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.head.weight.normal_()
        expected = model(x)
        model.compile_parts(backend="eager")
        assert relative_error(model(x), expected) < 1e-12
    torch.compiler.reset()


def test_bits_are_packed_into_text():
    bits = np.random.default_rng(0).random(5000) < 0.8
    text = packed(bits)
    assert (
        len(text) == 836
        and np.array_equal(unpacked(text, 5000), bits)
        and np.array_equal(unpacked(packed(bits[:13]), 13), bits[:13])
    )
    assert not np.array_equal(unpacked(text, 5000), bits[::-1])
    with pytest.raises(ValueError, match="625 bytes hold no 5001 bits"):
        unpacked(text, 5001)
