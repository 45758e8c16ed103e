"""Whether ranks depend on the optimiser: the rule that stood before the runs, on spectra made to order, and what the page says."""

import dataclasses

import pytest
from helpers import a_record
from made_records import a_model, study

from paper_figures import __main__ as figures
from reproduce.report import findings, optimizers, pages, query, results, room, unfoldings
from reproduce.report.judge import LEVEL, UNRESOLVED, over_layers
from reproduce.report.optimizers import FLATTER, STEEPER


@pytest.mark.parametrize(
    "muon, near, said",
    [
        (
            0.2,
            0.01,
            "Ranks depend on the optimiser**, with and without QK-norm: W head is flatter with Muon, W query is flatter",
        ),
        (0.45, 0.01, "Ranks depend on the optimiser**, with and without QK-norm: W head is steeper with Muon"),
        (0.302, 0.01, "Ranks do not depend on the optimiser**: all modes of the weights are level"),
        (0.2, 2.0, "stays open**: no mode has the same clear word"),  # control: a rate does as much to one optimiser
    ],
)
def test_the_answer_follows_the_rule(muon, near, said):
    assert said in optimizers.answer(study(muon, near=near))
    assert optimizers.answer(study(muon, near=near)).endswith("That is of these models: another seed was not asked.")


def test_one_mode_is_enough_and_a_word_of_one_row_alone_is_not():
    one = study(0.3, heads=0.3)
    for n, record in enumerate(one):
        if query.optimizer_of(record) == "muon":
            one[n] = a_model(record.method, "muon", 0.3, rate=record.rate, loss=record.metrics["validation_loss"], heads=0.1)
    assert "QK-norm: W head is flatter with Muon. That" in optimizers.answer(one)
    half = [r for r in one if r.method == "MHA"] + [r for r in study(0.3) if r.method != "MHA"]
    assert "stays open" in optimizers.answer(half)


def test_without_a_near_rate_nothing_is_said():
    far = [r for r in study(0.2) if r.rate == 1e-3]
    assert "stays open" in optimizers.answer(far)
    (table,) = optimizers.optimizer_tables(far)
    assert "(– / –), not resolved" in table.body
    assert "do not depend" in optimizers.answer([r for r in study(0.302) if r.rate == 1e-3])  # level needs no yardstick


@pytest.mark.parametrize(
    "values, squares, yardsticks, word",
    [
        ([0.2, 0.21, 0.22], [0.3, 0.31, 0.32], (0.05, 0.05), FLATTER),
        ([-0.2, -0.21, -0.22], [-0.3, -0.31, -0.32], (0.05, 0.05), STEEPER),
        ([0.2, 0.21, 0.22], [0.3, 0.31, 0.32], (0.25, 0.4), UNRESOLVED),
        ([0.2, 0.21, 0.22], [0.3, 0.31, 0.32], (0.25, 0.1), FLATTER),
        ([0.2, 0.21, 0.22], [-0.3, -0.31, -0.32], (0.0, 0.0), UNRESOLVED),
        ([0.2, -0.21, 0.22], [0.3, 0.31, 0.32], (0.0, 0.0), UNRESOLVED),
        ([0.01, 0.011, 0.012], [0.02, 0.021, 0.022], (None, None), LEVEL),
        ([0.01, 0.011, 0.012], [0.2, 0.21, 0.22], (0.0, 0.0), FLATTER),
        ([-0.01, -0.011, -0.012], [-0.2, -0.21, -0.22], (0.0, 0.0), STEEPER),
        ([0.2, 0.21, 0.22], [0.3, 0.31, 0.32], (None, None), UNRESOLVED),
    ],
)
def test_words(values, squares, yardsticks, word):
    estimates = [over_layers(values), over_layers(squares)]
    assert optimizers.word(estimates, list(yardsticks)) == word
    assert not estimates[0].of_seeds and estimates[0].over == "3 layers, these models"


def test_the_model_that_validation_prefers_stands_for_its_row_and_optimiser():
    records = study(0.2) + [a_model("MHA", "muon", 5.0, rate=2e-3, loss=3.9)]
    best = unfoldings.by_optimizer(records)
    assert list(best) == [f"GPT-2, {name}, 0M tokens" for name in ("AdamW", "Muon", "AdamW, QK-norm", "Muon, QK-norm")]
    assert best["GPT-2, Muon, 0M tokens"][0].rate == 2e-3 and best["GPT-2, AdamW, 0M tokens"][0].rate == 1e-3
    bare = a_model("MHA", "muon", 5.0, rate=4e-3, loss=3.8)
    del bare.metrics["inputs"][2]["pre"]["key"]["values"]
    assert list(unfoldings.by_optimizer(records + [bare])) == [name for name in best if name != "GPT-2, Muon, 0M tokens"]
    assert findings._spectra([bare], tried=True) == {}
    silent = a_model("MHA", "muon", 5.0, rate=4e-3)
    del silent.metrics["validation_loss"]
    assert unfoldings.by_optimizer(records + [silent]) == best


def test_the_page_has_the_answer_the_table_and_the_figures(tmp_path):
    records = study(0.2)
    said = pages.texts_of(["optimisers", "Ranks by optimiser"], records)
    assert said["optimisers"].startswith("**Ranks depend") and "spectra_optimizers.png" in said["optimisers"]
    (table,) = results.tables(records)["spectra"]
    assert "| MHA QK-norm, on inputs | 0.001 and 0.001 | " in table.body and "keys about their mean" not in table.body
    assert " / ".join(["1.2"]) in table.body and "), flatter" in table.body
    effective = room.room_tables(records)[0].body
    assert "| GPT-2, Muon, QK-norm, 0M tokens, on inputs |" in effective
    ours = {"name": "trained.txt", "sha256": "0"}  # a model of ours has a text that it was trained on, and one that it read
    looked_at = [dataclasses.replace(r, data=ours, metrics=r.metrics | {"read": {"name": "read.txt"}}) for r in records]
    assert room.room_tables(looked_at)[0].title.endswith(" reads in read.")
    assert unfoldings.texts_read(looked_at) == "read" and unfoldings.texts_read([]) == ""
    assert "GPT-2, Muon, 0M tokens" in findings._spectra(records, tried=True) and not findings._spectra(records)
    figures.draw_room(records, tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"spectra_optimizers.png", "head_mode_loss_optimizers.png"}


def test_without_records_the_page_says_so(tmp_path):
    assert pages.texts_of(["optimisers"], [])["optimisers"] == optimizers.NONE_YET
    few = [r for r in study(0.2) if r.method == "MHA"]
    assert optimizers.answer(few) == optimizers.NONE_YET and optimizers.optimizer_tables(few)
    assert optimizers.render([r for r in few if query.optimizer_of(r) == "muon"]) == optimizers.NONE_YET


def test_losses_stand_by_row_optimiser_and_rate():
    runs = [r for r in study(0.2)]
    trained = [
        a_record(**{**vars(r), "experiment": "table2", "metrics": {"validation_loss": r.metrics["validation_loss"]}})
        for r in runs
    ]
    trained.append(a_record(**{**vars(trained[0]), "id": "x", "metrics": {"diverged_at": 7}}))
    (table,) = results.tables(trained)["table2"]
    assert "| MHA | AdamW | 0.0005 | 0 | 4.100 |" in table.body and "| MHA QK-norm | Muon | 0.001 | 0 | 4.000 |" in table.body
    assert "diverged at step 7" in table.body
