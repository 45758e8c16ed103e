"""Runs keep their names: what is on record is found again by this code, and not trained twice."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import committed_records

from reproduce.experiments import ablations, figure3, figure3_tiny, table2, table3
from reproduce.store import locks, records
from reproduce.store.saved import make_room, run_of
from reproduce.train import language, loop
from reproduce.train.distributed import Workers
from reproduce.train.options import Options
from reproduce.train.recipes import Recipe
from reproduce.train.runs import override
from reproduce.train.settings import TrainConfig, learning_rate_at
from reproduce.trust import survival

TRAINED = {"table2": table2, "table3": table3, "ablations": ablations, "figure3": figure3}


def identities(record, folder, monkeypatch) -> set[str]:
    """The ids of all runs that this code would train with the data, rate, steps and warm-up of that record."""
    if record.preset in figure3_tiny.PRESETS:
        return with_chosen_rates(record, folder)
    config, module, started = record.config, TRAINED[record.experiment], set()
    start = lambda run, *_: started.add(run.identity)  # noqa: E731
    images = np.empty((1437, *[config.get("image_size")] * 2, config.get("channels"))) if module is figure3 else []
    data = SimpleNamespace(
        **dict(vocab_size=config.get("vocab_size"), x_train=images, n_classes=config.get("n_classes")),
        **dict(train=range(10**6), validation=range(10**6), describe=lambda: record.data),
    )
    monkeypatch.setattr(language, "read_text", lambda *_: data)
    monkeypatch.setattr(language, "train_one", start)
    monkeypatch.setattr(figure3, "load_images", lambda *_: data)
    monkeypatch.setattr(figure3, "pretrained", start)
    monkeypatch.setattr(figure3, "fine_tune", lambda model, row, run, *_: start(run))
    for sized in (table2, table3):
        monkeypatch.setattr(sized, "record_sizes", lambda *_: None)
    options = Options(record.preset, folder, folder, seeds=(record.seed,))
    if "train" in config:
        given = {name: config["train"][name] for name in ("learning_rate", "steps", "warmup_steps")}
        given["warmup_steps"] //= config.get("recipe", {}).get("warmup", 1)
        given |= {name: config["train"].get(name) for name in ("optimizer", "qk_clip")} | {"passes": config.get("passes")}
        given |= {"rows": (record.method,)} if given["qk_clip"] else {}  # rows with QK-norm refuse it
        options = dataclasses.replace(options, **given)
    module.run(options)
    return started


def with_chosen_rates(record, folder) -> set[str]:
    """The same of the preset of Figure 3 that chooses its rates, from the pretraining that the record names."""
    config, images = record.config, np.empty((record.data["train_images"], record.config["image_size"], 0, 3))
    data = SimpleNamespace(x_train=images, n_classes=record.data["classes"], describe=lambda: record.data)
    options = Options(record.preset, folder, folder, start=config.get("start", "hosvd"))
    study, start = figure3_tiny.Study(figure3_tiny.PRESETS[record.preset], options, data), config["pretrain"]["learning_rate"]
    if "train" not in config:
        return {study.pretraining(record.seed, start).identity}
    rate = config["train"]["learning_rate"]
    return {study.fine_tuning(row, record.seed, start, rate).identity for row in study.preset.rows}


@pytest.mark.no_cover
def test_committed_runs_are_known_to_this_code(tmp_path, monkeypatch):
    """A repeated command skips them: no setting that defines a run may change its name or gain a companion unnoticed."""
    committed = [r for r in committed_records() if r.experiment in TRAINED and r.preset != "sizes"]
    older = [r for r in committed if r.experiment == "table2" and "model" not in r.config]
    assert len(older) == 12  # of the sweep's first day, when a config did not name its model
    committed = [r for r in committed if r not in older]
    assert {r.experiment for r in committed} == set(TRAINED)
    for r in committed:
        known = identities(r, tmp_path, monkeypatch)
        assert r.id in known, (r.experiment, r.preset, r.method, r.seed)
    changed = dataclasses.replace(r, data={**r.data, "sha256": "another"})  # control
    assert r.id not in identities(changed, tmp_path, monkeypatch)


def test_models_of_runs_with_one_title_are_kept_apart(tmp_path, capsys):
    """Another rate is another run: its model does not take the place of the first one, and whose model a file holds is known."""
    (tmp_path / "text").mkdir()
    for n in range(10):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} words and more. " * 40, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(tmp_path / "text"), steps=1)

    def train(**changes) -> str:
        rows, given = [(survival.ROWS[0], Recipe())], dataclasses.replace(options, **changes)
        language.train_rows("table2", rows, survival.SHAPE, survival.TOY, given)
        return capsys.readouterr().out

    train()
    path = language.model_path(tmp_path, "table2 MHA seed 0")
    first = path.read_bytes()
    (record,) = records.load(tmp_path / "records")
    aside = path.with_stem(f"{path.stem}-{record.id}")
    assert run_of(path) == record.id and "no longer" not in train()
    assert f"{path} was the model of another run, which is in {aside} now" in train(learning_rate=1e-3)
    assert aside.read_bytes() == first != path.read_bytes() and len(records.load(tmp_path / "records")) == 2
    assert "no longer" not in train()  # it is found where it is now
    aside.unlink()
    assert "its model is no longer in" in train() and "no longer" not in train(learning_rate=1e-3)
    path.write_bytes(b"damaged")
    assert run_of(path) == "unknown" and "which is in" in train(learning_rate=3e-3)


def test_nobody_else_makes_room_while_a_model_is_written(tmp_path, monkeypatch):
    """Two rates side by side end at once: had both found the place empty, one model would replace the other."""
    (tmp_path / "words.txt").write_text("Words and more words, and some again.\n" * 200, encoding="utf-8")
    monkeypatch.setattr(locks, "_patience", 0.01)
    save, told = language.save_model, []

    def meanwhile(path, *arguments, **more):
        with pytest.raises(TimeoutError, match="models is locked by process"), locks.locked(path.parent):
            told.append("both write")
        save(path, *arguments, **more)

    monkeypatch.setattr(language, "save_model", meanwhile)
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(tmp_path / "words.txt"), steps=1)
    language.train_rows("table2", [(survival.ROWS[0], Recipe())], survival.SHAPE, survival.TOY, options)
    path = language.model_path(tmp_path, "table2 MHA seed 0")
    assert path.exists() and not told
    with locks.locked(path.parent):  # control: before and after, anyone can
        told.append("alone")
    assert told == ["alone"]


def test_a_run_of_several_machines_names_them_and_has_no_speed(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("Words and more words, and some again.\n" * 200, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(tmp_path / "words.txt"), steps=1)

    def elsewhere(*arguments):
        result = loop.train(*arguments)
        result.machines.append("another card, 8 workers")
        return result

    for rate, trained in ((1e-3, loop.train), (2e-3, elsewhere)):
        monkeypatch.setattr(language, "train", trained)
        given = dataclasses.replace(options, learning_rate=rate)
        language.train_rows("table2", [(survival.ROWS[0], Recipe())], survival.SHAPE, survival.TOY, given)
    one, several = (r.metrics for r in records.load(tmp_path / "records"))
    assert one["tokens_per_second"] > 0 and "machines" not in one
    assert several["tokens_per_second"] is None and several["machines"][1] == "another card, 8 workers"


def test_a_row_that_a_kernel_refuses_costs_no_other_row_and_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("Words and more words, and some again.\n" * 200, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(tmp_path / "words.txt"), steps=1)
    rows = [(row, Recipe()) for row in survival.ROWS[:2]]
    plain, refused = language.train, RuntimeError("cuDNN Frontend error: no execution plans\nof many lines")

    def training(model, *arguments):
        if refused and model.blocks[0].attention.__class__.__name__ == "MultiHeadAttention":
            raise refused
        return plain(model, *arguments)

    def methods() -> list[str]:
        language.train_rows("table2", rows, survival.SHAPE, survival.TOY, options)
        return [record.method for record in records.load(options.records)]

    monkeypatch.setattr(language, "train", training)
    with pytest.raises(
        ValueError, match=r"^failed: table2 MHA seed 0 \(RuntimeError: cuDNN .* no execution plans\)\. All else"
    ):
        methods()
    (other,) = (record.method for record in records.load(options.records))
    assert other != "MHA"
    for error in (ValueError("of what was given"), RuntimeError("of one worker")):  # controls: these end all
        refused = error
        given = dataclasses.replace(options, workers=Workers(count=1 + isinstance(error, RuntimeError)))
        monkeypatch.setattr(Workers, "agree", lambda *_: None)
        with pytest.raises(type(error), match=f"^{error}"):
            language.train_rows("table2", rows, survival.SHAPE, survival.TOY, given)
    refused = None
    assert methods() == [other, "MHA"]


def test_models_are_found_by_seed_and_preset(tmp_path):
    title, tokenizer = "table2 MHA seed 1", "{}"
    path = language.model_path(tmp_path, title)
    config = {"model": "gpt2", "d_model": 24, "n_heads": 2, "n_layers": 1, "context": 8, "vocab_size": 9}
    model = language.build_model(config | {"attention": {"mechanism": "MHA"}})
    for number, preset in enumerate(("smoke", "gpu")):
        make_room(path, str(number))
        language.save_model(path, model, config, tokenizer, run=str(number), preset=preset)
    aside = path.with_stem(f"{path.stem}-0")
    assert language.model_of(tmp_path, title, "gpu") == path and language.model_of(tmp_path, title, "smoke") == aside
    assert (
        language.model_of(tmp_path, title, "paper") is None and language.model_of(tmp_path, "table2 MHA seed 0", "gpu") is None
    )
    language.save_model(path, model, config, tokenizer)  # one that does not say
    assert language.model_of(tmp_path, title, "paper") == path


def test_a_warm_up_that_is_longer_than_the_run_is_refused(tmp_path):
    settings, options = (
        TrainConfig(steps=10, batch_size=2, learning_rate=1e-3, warmup_steps=4),
        Options("smoke", tmp_path, tmp_path),
    )
    longest = override(settings, dataclasses.replace(options, warmup_steps=10))  # a control: the last step is at the peak
    assert learning_rate_at(9, longest) == 1e-3 > learning_rate_at(8, longest)
    assert override(settings, dataclasses.replace(options, steps=3)).warmup_steps == 4  # a run cut short keeps its rates
    for given in ({"warmup_steps": 11}, {"warmup_steps": 4, "steps": 3}):
        with pytest.raises(
            ValueError, match=r"--warmup-steps (11|4): the run has (10|3) steps; its learning rate would never reach"
        ):
            override(settings, dataclasses.replace(options, **given))
