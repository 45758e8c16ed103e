"""Healing: attention that was converted is trained alone, at several rates, beside the unconverted model; on a tiny Gemma 3."""

import copy
import dataclasses
import functools

import pytest
import torch
from helpers import DIFFERENT, files_read, relative_error, run_here
from made_records import MLA, a_row

from reproduce.data.text import read_documents
from reproduce.experiments import compress_models, heal, samples
from reproduce.models.sizes import count_parameters
from reproduce.report import healing, pages, results
from reproduce.store import records, schema
from reproduce.train.loop import Diverged, TrainResult
from reproduce.train.options import Options
from reproduce.train.public_models import open_model
from reproduce.train.settings import TrainConfig
from reproduce.trust import opening

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
BY_NAME = {(a.name, a.which): a for a in opening.ARCHITECTURES}
GEMMA3 = BY_NAME["Gemma 3", ""]
KINDS = {
    "gemma3": dataclasses.replace(GEMMA3, options=GEMMA3.options | {"num_key_value_heads": 1}),
    "gpt2": BY_NAME["GPT-2", ""],
    "bert": BY_NAME["BERT", "without a head"],
}
TINY = heal.Preset(
    TrainConfig(steps=6, batch_size=4, learning_rate=0.0, log_every=2, checkpoint_every=2, **heal.ATTENTION_ONLY),
    window=24, micro_batch=2, rates=(1e-3, 1e-2), judged=21,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models by kind, and texts."""
    folder = tmp_path_factory.mktemp("models")
    for kind, architecture in KINDS.items():
        opening.save(architecture, folder / kind)
    for name, more in (("read", ""), ("val", "Held out. "), ("test", "And one more. ")):
        lines = (f"{more}Some words stand here to be read by it, in line {n} of {n * n}." for n in range(300))
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(heal.PRESETS, "smoke", TINY)
    for module in (compress_models, heal):
        monkeypatch.setattr(module, "WINDOWS", 6)


def options(made, tmp_path, kind="gemma3", **more) -> Options:
    texts = {name: str(made / f"{name}.txt") for name in ("read", "val", "test")}
    given = dict(
        model=str(made / kind), text=texts["read"], validation=texts["val"], test=(texts["test"],), rows=("as it is", MLA)
    )
    return Options("smoke", tmp_path, tmp_path / "records", **given | more)


def study_of(made, tmp_path, **more) -> tuple[heal.Study, dict]:
    """A study of the tiny model, and its layers."""
    opened = open_model(str(made / "gemma3"))
    return heal.Study.of(opened, options(made, tmp_path, **more)), {p: copy.deepcopy(x) for p, x in opened.layers.items()}


def test_rows_are_trained_at_every_rate_and_a_table_says_what_comes_back(made, tmp_path, capsys):
    heal.run(options(made, tmp_path, rows=()))
    rows = {r.method: r for r in records.load(tmp_path / "records", "heal", to_show=True)}
    assert set(rows) > {"as it is", MLA} and sum(label.startswith("Tucker by layer") for label in rows) == 1
    for label, r in rows.items():
        m = r.metrics
        assert [tried["learning_rate"] for tried in m["rates"]] == [1e-3, 1e-2] and m["tokens_seen"] == 6 * 4 * 23
        assert m["chosen"] == min(m["rates"], key=lambda tried: tried["validation_loss"])["learning_rate"]
        assert [entry[0] for entry in m["rates"][0]["curve"]] == [2, 4, 6]
        states = [m[state]["tests"]["test.txt"] for state in ("before", "converted", "healed")]
        assert all(len(test["windows"]) == 21 and test["tokens"] == 21 * 23 for test in states)
        assert all(sum(test["windows"]) / test["tokens"] == pytest.approx(test["loss"], abs=1e-4) for test in states)
        assert m["share"] == (1.0 if label == "as it is" else 0.5)
        if label != "as it is":
            assert m["converted"]["tests"]["test.txt"]["loss"] != m["before"]["tests"]["test.txt"]["loss"]
            assert m["cache"] <= m["before"]["cache"] / 2
    assert rows["as it is"].metrics["converted"] == {
        k: rows["as it is"].metrics["before"][k] for k in ("validation_loss", "tests")
    }
    assert not list((tmp_path / "checkpoints").glob("*"))
    (table,) = results.tables(list(rows.values()))["heal"]
    assert table.body.count("\n| ") == len(rows) and "and then trained alone" in table.title
    heal.run(options(made, tmp_path, rows=()))
    assert "on record already, skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row is called MHA; there are: as it is, MLA"):
        heal.run(options(made, tmp_path, rows=("MHA",)))


def test_the_loss_is_compiled_on_a_gpu_and_is_the_same(made, tmp_path, monkeypatch):
    study, _ = study_of(made, tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    there = dataclasses.replace(study, options=dataclasses.replace(study.options, device="cuda:1"))
    assert study.cross_entropy is heal.cross_entropy and there.cross_entropy is there.cross_entropy is not heal.cross_entropy
    logits, targets = torch.randn(2, 5, 30, requires_grad=True), torch.randint(30, (2, 5))
    here, compiled = (
        torch.autograd.grad(loss(logits, targets), logits)[0] for loss in (study.cross_entropy, there.cross_entropy)
    )
    assert relative_error(compiled, here) < 1e-6
    assert relative_error(compiled, torch.autograd.grad(study.cross_entropy(logits, targets.flip(1)), logits)[0]) > DIFFERENT


def test_what_is_frozen_stays_to_the_last_bit_and_the_attention_moves(made, tmp_path):
    study, layers = study_of(made, tmp_path)
    model, attention = study.opened.model, heal.Attention([copy.deepcopy(layer) for layer in layers.values()])
    study.opened.put(dict(zip(layers, attention.blocks)))
    trained = {id(p) for p in attention.parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert study.train(attention, study.run_of(MLA, 0), 1e-2)["validation_loss"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if id(p) in trained}  # all of it, and nothing else
    assert len(moved) < len(before) and sum(before[name].numel() for name in moved) == count_parameters([attention])
    with torch.no_grad():  # control: a frozen weight that changed would be seen
        model.get_input_embeddings().weight[0, 0] += 1e-6
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} > moved


@pytest.mark.no_cover
def test_the_test_text_is_read_by_the_rate_that_held_out_text_prefers(made, tmp_path, monkeypatch):
    """Control: with the losses the other way round the other rate is chosen, and another model reads the test."""
    found = {}
    for losses in ((2.0, 1.0), (1.0, 2.0)):
        answers, train = iter(losses), heal.Study.train

        def trained(self, *arguments, answers=answers, train=train):
            return train(self, *arguments) | {"validation_loss": next(answers)}

        with monkeypatch.context() as patched:
            patched.setattr(heal.Study, "train", trained)
            place = tmp_path / str(losses)
            heal.run(options(made, place, rows=(MLA,)))
        (record,) = records.load(place / "records")
        found[record.metrics["chosen"]] = record.metrics["healed"]["tests"]["test.txt"]["loss"]
    assert set(found) == {1e-3, 1e-2} and len(set(found.values())) == 2


def test_a_stopped_row_goes_on_and_ends_the_same(made, tmp_path, monkeypatch, capsys):
    whole, stopped = (options(made, tmp_path / name, rows=(MLA,)) for name in ("whole", "stopped"))
    heal.run(whole)
    loss, calls = heal.Study.loss, []

    def breaking(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * (6 + 5):  # two parts a step: in the last but one step of the second rate
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(heal.Study, "loss", breaking)
        heal.run(stopped)
    assert len(list((stopped.out / "checkpoints").glob("heal-*-rate-*.pt"))) == 2
    heal.run(stopped)
    assert "goes on after step 4" in capsys.readouterr().out
    first, second = (records.load(o.records)[0].metrics for o in (whole, stopped))
    for m in (first, second):
        for tried in m["rates"]:
            del tried["seconds"]
    assert first == second


def test_on_another_machine_the_rate_that_is_preferred_is_trained_again_and_no_other(made, tmp_path, monkeypatch):
    """Weights stay on the machine that was lent; a small file comes back."""
    whole, stopped = (
        options(made, tmp_path / name, rows=(MLA,), learning_rates=(1e-2, 1e-3, 1e-4)) for name in ("whole", "stopped")
    )
    heal.run(whole)
    (expected,) = records.load(whole.records)
    assert expected.metrics["chosen"] == 1e-2
    train, asked, last = heal.Study.train, [], 1e-4

    def trained(self, attention, this, rate):
        asked.append(rate)
        if rate == last:
            raise KeyboardInterrupt
        return train(self, attention, this, rate)

    monkeypatch.setattr(heal.Study, "train", trained)
    with pytest.raises(KeyboardInterrupt):
        heal.run(stopped)
    (known,) = (stopped.out / "checkpoints").glob("*.json")
    assert known.stat().st_size < 4096 and asked == [1e-2, 1e-3, 1e-4]
    for checkpoint in (stopped.out / "checkpoints").glob("*.pt"):
        checkpoint.unlink()
    asked, last = [], None
    heal.run(stopped)
    assert asked == [1e-4, 1e-2] and not list((stopped.out / "checkpoints").iterdir())
    (found,) = records.load(stopped.records)
    for m in (expected.metrics, found.metrics):
        for tried in m["rates"]:
            del tried["seconds"]
    assert found.metrics == expected.metrics
    known.write_text('{"rates": [{"learning_rate": 1e-3}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="delete it to try all rates again; it lacks rates"):
        heal.known_rates(known)
    with pytest.raises(ValueError, match="delete it to try all rates again"):
        known.write_text("{", encoding="utf-8")
        heal.known_rates(known)


def test_a_rate_that_breaks_off_is_on_record_and_so_is_a_row_of_which_all_do(made, tmp_path, monkeypatch):
    def breaks(model, batch_at, loss_of, settings, *_, **__):
        if settings.learning_rate >= least:
            raise Diverged("the loss is nan", 4, TrainResult([[2, 1.0, 1.0]], 0.1))
        return TrainResult([], 0.1)

    monkeypatch.setattr(heal, "train", breaks)
    for least, chosen in ((5e-3, 1e-3), (0, None)):
        place = tmp_path / str(least)
        heal.run(options(made, place, rows=("as it is", MLA)))
        rows = records.load(place / "records", to_show=True)
        assert [r.metrics.get("chosen") for r in rows] == [chosen] * 2
        assert rows[1].metrics["rates"][1] == {"learning_rate": 1e-2, "diverged_at": 4, "curve": [[2, 1.0, 1.0]]}
        (table,) = results.tables(rows)["heal"]
        assert ("| diverged |" in table.body) == (chosen is None)


def test_a_rate_that_breaks_off_in_its_last_step_is_not_chosen(made, tmp_path):
    for rates, chosen in (((1e-3, 1e30), 1e-3), ((1e30,), None)):
        place = tmp_path / str(chosen)
        heal.run(options(made, place, rows=("as it is",), steps=1, learning_rates=rates))
        (row,) = records.load(place / "records", to_show=True)
        *tame, spoiled = row.metrics["rates"]
        assert spoiled == {"learning_rate": 1e30, "diverged_at": 1, "curve": spoiled["curve"]} and len(spoiled["curve"]) == 1
        assert row.metrics.get("chosen") == chosen and all(tried["validation_loss"] > 0 for tried in tame)


def test_other_rates_and_steps_and_every_tenth_document_held_out(made, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="read.txt holds .* tokens to train on; 4,000 windows of 23 need 92,000: name a longer text"
    ):
        heal.run(options(made, tmp_path, steps=1000))
    read = files_read(monkeypatch)
    heal.run(options(made, tmp_path, rows=("as it is",), validation=None, learning_rates=(1e-4,), steps=2, seeds=(3,)))
    assert sorted(read) == ["read.txt", "test.txt"]  # once, for all that is made of them
    (record,) = records.load(tmp_path / "records")
    assert record.seed == 3 and record.config["healing"]["rates"] == [1e-4] and record.config["healing"]["steps"] == 2
    assert record.data["validation"]["name"] == "read.txt" and record.data["tokens"] == 2 * 4 * 24


def test_windows_to_train_on_are_the_text_in_its_order(made, monkeypatch):
    opened = open_model(str(made / "gemma3"))
    read = read_documents(str(made / "read.txt"))
    monkeypatch.setattr(samples, "BATCH", 2)  # documents: what is beyond the windows is not read
    few, more = (samples.corpus(opened, read, None, n, 24, 5) for n in (3, 9))
    assert few.tokens.shape == (3, 24) and torch.equal(few.tokens, more.tokens[:3]) and few.sha256 == more.sha256
    other = samples.corpus(opened, read, str(made / "val.txt"), 3, 24, 5)
    assert other.held_out.name == "val.txt" and other.sha256 != few.sha256 and len(other.held_out.tokens) == 5
    opened.vocabulary = 3
    with pytest.raises(ValueError, match="beyond the 3 of its embedding"):
        samples.corpus(opened, read, None, 3, 24, 5)
    opened.tokenizer = None
    with pytest.raises(ValueError, match="text needs its tokenizer"):
        samples.corpus(opened, read, None, 3, 24, 5)


def test_what_is_refused(made, tmp_path, capsys):
    with pytest.raises(ValueError, match="heal needs --model, and --test texts"):
        heal.run(options(made, tmp_path, test=()))
    with pytest.raises(ValueError, match="bert predicts nothing; healing is training on the next token"):
        heal.run(options(made, tmp_path, kind="bert"))
    (tmp_path / "test.txt").write_text((made / "test.txt").read_text(encoding="utf-8")[9:], encoding="utf-8")
    with pytest.raises(ValueError, match="--test: two test texts are called test.txt"):
        heal.run(options(made, tmp_path, test=(str(made / "test.txt"), str(tmp_path / "test.txt"))))
    for kind in ("read", "val"):
        (tmp_path / f"part of {kind}.txt").write_text(
            (made / f"{kind}.txt").read_text(encoding="utf-8")[999:4999], encoding="utf-8"
        )
        with pytest.raises(
            ValueError, match=f"--test part of {kind}.txt is a text that models are made with, .* or stands in one"
        ):
            heal.run(options(made, tmp_path, test=(str(tmp_path / f"part of {kind}.txt"),)))
    for seen in ("read", "val"):
        with pytest.raises(ValueError, match=f"--test {seen}.txt is a text that models are made with, trained or chosen on"):
            heal.run(options(made, tmp_path, test=(str(made / f"{seen}.txt"),)))
    assert not records.load(tmp_path / "records")
    assert run_here("heal", "--model", made / "gemma3", "--out", tmp_path) == 1
    assert "error: heal needs --model, and --test texts to judge by" in capsys.readouterr().err
    assert run_here("heal", "--help") == 0
    assert "the control" in capsys.readouterr().out


# What is said of it.


def test_what_the_text_teaches_is_not_taken_for_healing():
    control, row = a_row("as it is", 2.0, 1.8), a_row(MLA, 3.0, 2.0)
    assert healing.closed(row, control, "wiki.txt") == pytest.approx(0.8)  # and not all of it
    assert healing.closed(a_row(MLA, 3.0, 1.8), control, "wiki.txt") == pytest.approx(1)
    assert healing.closed(a_row(MLA, 3.0, 2.8), control, "wiki.txt") == pytest.approx(0)
    assert healing.closed(row, None, "wiki.txt") is None and healing.closed(a_row(MLA, 3.0, None), control, "wiki.txt") is None
    assert healing.closed(a_row(MLA, 2.0, 1.9), control, "wiki.txt") is None  # the conversion cost nothing
    assert healing.regained(row, "wiki.txt") == pytest.approx(1)  # which the control's text made easier
    assert (
        healing.regained(a_row(MLA, 3.0, None), "wiki.txt") is None
        and healing.regained(a_row(MLA, 2.0, 1.9), "wiki.txt") is None
    )
    estimate = healing.above(row, control, "wiki.txt")
    assert estimate.low <= 0.2 <= estimate.high and estimate.value == pytest.approx(0.2) and not estimate.of_seeds
    said = healing.render([control, row, a_row("Tucker", 2.5, None)])
    assert f"has come back**, beside the unconverted model trained alike: {MLA} 80 %." in said and "20M tokens" in said
    assert "| MLA separated d_c=6 | 100 % | 100 % | 0.001 | 1.000 | 0.667 | +0.200 [+0.200, +0.200] | 80 % (100 %) |" in said
    assert "| as it is | 100 % | 100 % | 0.001 | 0.667 | 0.600 |  |  |" in said
    assert "| Tucker | 100 % | 100 % | diverged | 0.833 | – | – | – (–) |" in said
    assert pages.texts_of(["healing", "Healing"], [control, row])["Healing"]


def test_rows_that_were_judged_on_other_texts_stand_in_another_table():
    control, row, other = a_row("as it is", 2.0, 1.8), a_row(MLA, 3.0, 2.0), a_row("Tucker", 2.5, 2.0)
    assert len(healing.heal_tables([control, row, other])) == 1  # control
    for state in ("before", "converted", "healed"):
        other.metrics[state]["tests"] = {"novel.txt": other.metrics[state]["tests"]["wiki.txt"]}
    assert len(healing.heal_tables([control, row, other])) == 2 and "on novel" in healing.render([control, row, other])


def test_a_rate_at_the_edge_is_said_to_be_there():
    run = a_row(MLA, 3.0, 2.0)
    said = {}
    for rates in ([1e-3], [1e-3, 4e-3], [2e-4, 1e-3], [2e-4, 1e-3, 4e-3]):
        run.config["healing"]["rates"] = rates
        said[len(rates), rates[0]] = "| 0.001, at the edge |" in healing.render([run])
    assert said == {(1, 1e-3): False, (2, 1e-3): True, (2, 2e-4): True, (3, 2e-4): False}


def test_without_records_the_page_says_so_and_a_trial_is_none():
    assert healing.render([]) == healing.render([a_row(MLA, 3.0, 2.0, preset="smoke")]) == healing.NONE_YET
    for few in ([a_row(MLA, 3.0, 2.0)], [a_row("as it is", 2.0, 1.8), a_row(MLA, 2.0, 1.9)]):
        assert "cannot be said from these records" in healing.render(few)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["healed"]["tests"]["wiki.txt"].update(windows=[1.0]), "judged on the same windows of the same texts"),
        (lambda m: m["converted"].update(tests={"other": m["converted"]["tests"]["wiki.txt"]}), "judged on the same windows"),
        (lambda m: m.pop("chosen"), "healed at the rate that was chosen, or neither of the two"),
        (lambda m: m.pop("healed"), "healed at the rate that was chosen, or neither of the two"),
        (lambda m: m.update(rates=[]), "a list of 1 or more"),
    ],
)
def test_a_record_that_says_half_is_refused(change, message):
    metrics = copy.deepcopy(a_row(MLA, 3.0, 2.0).metrics)
    schema.check(schema.HealMetrics, metrics, "f")  # control
    change(metrics)
    with pytest.raises(ValueError, match=message):
        schema.check(schema.HealMetrics, metrics, "f")
