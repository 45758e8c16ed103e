"""What Muon and norms give to each row, what they cost, and how latent attention breaks down: tables from records, and their controls."""

import copy
import dataclasses
import re

import pytest
from helpers import committed_records

from reproduce.models.rows import TABLE2_BEST
from reproduce.report import best, breakdown, gains, query
from reproduce.store.records import Record

FRESH = [
    r for r in committed_records() if (r.experiment, r.preset) == ("table2", "gpu-fresh") and query.optimizer_of(r) == "muon"
]
OLDER = [r for r in committed_records() if (r.experiment, r.preset) in (("table2", "gpu"), ("ablations", "gpu"))]
KNOWN = [*FRESH, *OLDER]
MHA, GQA, TUCKER = "MHA", "GQA n_KV=4", "Tucker [8,128,128]"


def cells(table, label: str) -> list[str]:
    (line,) = [line for line in table.body.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def changed(r: Record, config: dict | None = None, **metrics) -> Record:
    """The run with these settings of its training and these metrics."""
    new = copy.deepcopy(r)
    new.config["train"].update(config or {})
    new.metrics.update(metrics)
    return new


def with_adamw(row: str, more: float, preset="gpu-fresh") -> list[Record]:
    """Muon's runs of a row as if AdamW had made them, with so many more nats."""
    own = [changed(r, validation_loss=r.metrics["validation_loss"] + more) for r in FRESH if r.method == row and r.seed == 0]
    for r in own:
        r.metrics["bits_per_byte"] *= r.metrics["validation_loss"] / (r.metrics["validation_loss"] - more)
        del r.config["train"]["optimizer"]
    return [dataclasses.replace(r, id=f"{r.id}{preset}", preset=preset) for r in own]


def lowest(row: str) -> Record:
    return min((r for r in FRESH if (r.method, r.seed) == (row, 0)), key=lambda r: r.metrics["validation_loss"])


# Muon.


def test_each_row_stands_at_its_best_with_either_optimiser():
    (table,) = gains.muon_table(KNOWN)
    assert [line.split(" | ")[0][2:] for line in table.body.splitlines()[2:]] == [row.label for row in TABLE2_BEST]
    muon, adamw = lowest(MHA), best.best_setting(best.settings_with_adamw(OLDER)[MHA])
    shown = cells(table, MHA)
    assert shown[0].startswith(f"{adamw[0].rate:g}, of ") and shown[2].startswith(f"{muon.rate:g}, of ")
    losses = query.mean_loss(adamw), muon.metrics["validation_loss"]
    assert shown[1].startswith(f"{losses[0]:.3f} ± ") and shown[3] == f"{losses[1]:.3f}"
    assert shown[4] == f"−{losses[0] - losses[1]:.3f}" and len(shown) == 5
    assert "AdamW has not been run on Muon's text yet." in table.note and "judged on 299,008" in table.note
    assert gains.muon_table(FRESH) == gains.muon_table(OLDER) == []  # with one optimiser alone there is nothing to compare


@pytest.mark.parametrize("preset", gains.SAME_TEXT)
def test_adamw_on_the_same_text_stands_beside_as_soon_as_it_was_run(preset):
    (table,) = gains.muon_table([*KNOWN, *with_adamw(MHA, 0.1, preset)])
    assert cells(table, MHA)[5:] == [cells(table, MHA)[2], f"{lowest(MHA).metrics['validation_loss'] + 0.1:.3f}", "−0.100"]
    assert cells(table, GQA)[5:] == ["", "not run", ""]
    assert "differ in the optimiser alone" in table.note and "not been run" not in table.note
    left = dict(validation_loss=None, diverged_at=7)
    broken = [dataclasses.replace(r, metrics={k: v for k, v in (r.metrics | left).items() if v}) for r in with_adamw(GQA, 0.1)]
    (table,) = gains.muon_table([*KNOWN, *(dataclasses.replace(r, preset=preset) for r in broken[:1])])
    assert cells(table, GQA)[5:] == ["", "diverged at step 7", ""]
    elsewhere = [dataclasses.replace(r, data=r.data | {"sha256": "0"}) for r in with_adamw(MHA, 0.1, preset)]  # control
    longer = [changed(r, {"steps": 2 * r.steps}) for r in with_adamw(MHA, 0.1, preset)]
    assert gains.muon_table([*KNOWN, *elsewhere, *longer]) == gains.muon_table(KNOWN)


def test_losses_on_different_validation_texts_have_no_difference():
    other = [changed(r, bits_per_byte=2 * r.metrics["bits_per_byte"]) if r.method == MHA else r for r in OLDER]
    (table,) = gains.muon_table([*FRESH, *other])
    assert cells(table, MHA)[4] == "another text" and cells(table, GQA)[4].startswith("−0.")
    assert "were judged on" not in table.note


def test_normalised_latents_are_no_row_without_norms():
    def lower(recipe: str) -> list[Record]:
        (one,) = [r for r in OLDER if r.method == f"{TUCKER}, {recipe}" and r.seed == 0 and r.rate == 2.4e-3]
        return [dataclasses.replace(changed(one, validation_loss=3.0), seed=seed, id=f"{seed}") for seed in (7, 8, 9)]

    assert gains.muon_table([*KNOWN, *lower("normalised latents")]) == gains.muon_table(KNOWN)
    (table,) = gains.muon_table([*KNOWN, *lower("cores at a quarter of the rate")])  # control
    assert cells(table, TUCKER)[0].startswith("cores at a quarter of the rate, 0.0024, of ")


def timed(adamw: float, muon: float, **more) -> list[Record]:
    """The same runs with these speeds, AdamW's on another card where one is given."""
    speeds = {"adamw": adamw, "muon": muon}
    found = [changed(r, tokens_per_second=speeds[query.optimizer_of(r)]) for r in KNOWN]
    return [dataclasses.replace(r, **more) if query.optimizer_of(r) == "adamw" else r for r in found]


def test_a_step_s_cost_is_of_medians_on_one_card():
    (table,) = gains.muon_table(timed(104, 100, device="NVIDIA H200"))
    assert "takes 1.04 to 1.04 times as long as one of AdamW; the aim was at most 1.08." in table.note
    assert "one NVIDIA H200 with the same batches" in table.note and "factor of 1.00" in table.note
    one = [changed(r, tokens_per_second=50) if r.id == lowest(MHA).id else r for r in timed(104, 100, device="NVIDIA H200")]
    (slow,) = gains.muon_table(one)
    assert "takes 1.04 to 1.04 times" in slow.note and "factor of 2.00" in slow.note  # no median moves
    assert "takes" not in gains.muon_table(timed(104, 100, device="another"))[0].note  # control
    larger = [changed(r, {"batch_size": 64}) if query.optimizer_of(r) == "adamw" else r for r in KNOWN]
    assert "takes" not in gains.muon_table(larger)[0].note


# Norms.


def test_norms_stand_beside_none_with_what_they_cost():
    speeds = {True: 80_000, False: 100_000}
    runs = [changed(r, tokens_per_second=speeds[r.method.endswith("norm")]) for r in FRESH]
    (table,) = gains.norms_table(runs)
    bare, normed = (lowest(label) for label in (MHA, f"{MHA} QK-norm"))
    shown, counts = cells(table, MHA), [sum(r.method == label for r in FRESH) for label in (MHA, f"{MHA} QK-norm")]
    assert shown[:2] == [f"{bare.rate:g}, of 4", f"{bare.metrics['validation_loss']:.3f}"]
    assert shown[2].startswith(f"{normed.rate:g}, of ") and shown[3] == f"{normed.metrics['validation_loss']:.3f}"
    assert shown[4] == f"−{bare.metrics['validation_loss'] - normed.metrics['validation_loss']:.3f}"
    assert shown[5:] == [f"100 ({counts[0]})", f"80 ({counts[1]})", "0.80"] and counts[1] > 8
    assert table.note == "Speeds are rough: runs of one row differ by up to a factor of 1.00."
    (again,) = gains.norms_table([changed(r, tokens_per_second=50_000) if r.id == bare.id else r for r in runs])
    assert again.note.endswith("a factor of 2.00.") and cells(again, MHA)[5:] == shown[5:]  # no median moves
    (without,) = gains.norms_table([r for r in runs if r.method != "MQA QK-norm"])
    lines = [[line.startswith("| MQA |") for line in found.body.splitlines()] for found in (table, without)]
    assert [sum(found) for found in lines] == [1, 0]  # one that was not tried with norms has no line


def test_a_row_without_norms_alone_has_no_line_and_one_without_times_no_speeds():
    assert gains.norms_table([r for r in FRESH if not r.method.endswith(("norm", "norms"))]) == gains.norms_table([]) == []
    (table,) = gains.norms_table([changed(r, tokens_per_second=None) for r in FRESH])
    assert cells(table, MHA)[5:] == ["", "", ""] and table.note == ""
    clipped = [r for r in FRESH if r.train.get("qk_clip")]
    assert clipped and gains.norms_table([*FRESH, *(changed(r, validation_loss=1.0) for r in clipped)]) == gains.norms_table(
        FRESH
    )


# Latent attention.


def test_latent_attention_breaks_down_beside_the_same_with_norms():
    (table,) = breakdown.latent_breakdown(FRESH)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.body.splitlines()[2:]]
    assert [line[0] for line in lines] == [f"{100 * n}" for n in range(9)] and lines[0][1] == ""
    broken, normed = ([float(line[n]) for line in lines[1:]] for n in (1, 10))
    assert broken[-1] > min(broken) + 0.5 and normed == sorted(normed, reverse=True)
    for line in lines:
        matrices, product = [float(cell) for cell in line[5:9]], float(line[9])
        assert product == pytest.approx(matrices[0] * matrices[1] * matrices[2] * matrices[3], rel=0.05)
    assert lines[0][5:10] == [*["1.00"] * 4, "1.0"] and float(lines[-1][9]) > 100
    assert re.search(r"rate 0\.0096, and does not .* until step 800 of 1,980", table.title)


def test_without_a_run_that_breaks_down_or_the_one_beside_it_there_is_no_such_table():
    at = lambda label: next(r for r in FRESH if r.method == label and r.rate == 9.6e-3)  # noqa: E731
    broken, normed = at("MLA separated d_c=128"), at("MLA separated d_c=128 latent norms")
    assert len(breakdown.latent_breakdown([broken, normed])) == 1  # control
    assert breakdown.latent_breakdown([broken]) == breakdown.latent_breakdown([changed(broken, observations=[]), normed]) == []
    whole = changed(broken, curve=normed.metrics["curve"])
    assert breakdown.latent_breakdown([whole, normed]) == []
    assert len(breakdown.latent_breakdown([changed(whole, diverged_at=1900), normed])) == 1
    seldom = changed(normed, observations=normed.metrics["observations"][::2])
    (table,) = breakdown.latent_breakdown([broken, seldom])
    assert [line.split(" ")[1] for line in table.body.splitlines()[2:]] == ["0", "200", "400", "600", "800"]
