"""The verdicts on losses, accuracies, ranks and times: each can be reached, and refuted, by records, and each rule has power."""

import copy
import dataclasses
import datetime
import math
import re
import statistics

import pytest
from helpers import a_record

from reproduce.report import claims, findings, judge, query, statements
from reproduce.report.judge import FAILED, MARGIN, REPRODUCED, UNRESOLVED, UNTESTED
from reproduce.report.ledger import FINDINGS, NO_RUN, OURS, RULES, SIZES, STATEMENTS, Claim
from reproduce.report.query import BUDGETS
from reproduce.store.records import COMMITTED as FOLDER
from reproduce.store.records import Record, load

COMMITTED = load(FOLDER)
WITHOUT_TEST_TEXT = [r for r in COMMITTED if not r.preset.startswith("gpu-fresh")]  # as AdamW's rows were judged
SEEDS = range(1, 9)
TABLE3 = {row.label: row for row in BUDGETS["table3"].rows}
TABLE2 = {row.label: row for row in BUDGETS["table2"].rows}
SMALLEST, RIVAL = "Tucker [32,64,64]", "GQA n_KV=8"


def fresh(experiment: str, losses: dict[str, float], seeds=SEEDS, spread: float = 0.0, **more) -> list[Record]:
    """Runs on fresh text that read a test text, one per row and seed; spread: by what every second seed differs."""
    rows = TABLE3 if experiment == "table3" else TABLE2
    return [
        a_record(
            experiment=experiment,
            preset="gpu-fresh",
            method=label,
            seed=seed,
            config={"row": rows[label].config(), "train": {"learning_rate": 1e-3, "steps": 10, "optimizer": "muon"}},
            data={"sha256": "0"},
            metrics={
                "validation_loss": loss,
                "attention_parameters": 100,
                "test": {"its own": {"loss": loss + spread * (seed % 2), "tokens": 300, "articles": [[loss * 10, 10]] * 30}},
            }
            | more,
        )
        for label, loss in losses.items()
        for seed in seeds
    ]


def settled_runs(experiment: str, losses: dict[str, list[float]], metric: str = "validation_loss") -> list[Record]:
    """Runs of the preset `gpu` at its present settings, one per value, without a test text."""
    budget = BUDGETS[experiment]
    return [
        a_record(
            experiment=experiment,
            preset="gpu",
            method=row,
            seed=seed,
            config={"train": dataclasses.asdict(budget.preset.train) | {"learning_rate": budget.rate(row)}},
            metrics={metric: value, "attention_parameters": 100},
        )
        for row, values in losses.items()
        for seed, value in enumerate(values)
    ]


def the_claim(words: str) -> Claim:
    (claim,) = [c for c in claims.SENTENCES if words in f"{c.where}: {c.says}"]
    return claim


def verdict(words: str, records: list[Record]) -> str:
    return the_claim(words).finding(copy.deepcopy(records))[1]


# Losses.

LOSS_CLAIMS = [
    ("comparable to GQA", "table3", SMALLEST, RIVAL),
    ("comparable to MLA, with", "table3", SMALLEST, "MLA separated d_c=128"),
    ("comparable to MLA with a shared", "table3", SMALLEST, "MLA shared d_c=128"),
    ("competitive with MHA", "table2", "Tucker [8,128,64]", "MHA"),
    ("competitive with MLA", "table2", "Tucker [8,128,64]", "MLA shared d_c=128"),
]


@pytest.mark.parametrize(("words", "experiment", "row", "base"), LOSS_CLAIMS)
def test_a_loss_may_be_at_most_the_margin_above(words, experiment, row, base):
    def said(above, spread=0.0):
        return verdict(words, fresh(experiment, {row: 4 + above}, spread=spread) + fresh(experiment, {base: 4.0}))

    assert said(-0.1) == said(0.0) == said(0.9 * MARGIN) == REPRODUCED
    assert said(1.1 * MARGIN) == said(0.08) == FAILED  # 2 % of 4 nats: what was let pass before
    assert said(-0.02, spread=0.06) == UNRESOLVED  # 0.01 above in the mean, spread between seeds
    assert said(0.0, spread=0.06) == UNRESOLVED  # 0.03 above in the mean: noise does not fail it, and does not help it
    assert verdict(words, []) == verdict(words, fresh(experiment, {row: 4.0})) == UNTESTED


def test_a_loss_may_be_one_to_three_per_cent_above_and_no_less():
    base = fresh("table3", {RIVAL: 4.0})

    def said(row, percent, spread=0.0):
        return verdict(
            f"[{row}]: loss only 1-3 %", base + fresh("table3", {f"Tucker [{row}]": 4 * (1 + percent / 100)}, spread=spread)
        )

    for row in ("32,128,128", "32,128,64", "32,64,64"):
        assert said(row, 1.1) == said(row, 2.9) == REPRODUCED
        assert said(row, 3.1) == said(row, 0.9) == said(row, -1) == FAILED
        assert said(row, 2.0, spread=0.2) == UNRESOLVED


def test_the_limits_of_one_to_three_per_cent_are_those_of_the_test_text():
    found = fresh("table3", {RIVAL: 4.0, SMALLEST: 4.116})  # 2.9 %
    assert verdict("[32,64,64]: loss only 1-3 %", found) == REPRODUCED
    for r in found:
        r.metrics["validation_loss"] = 1.0
    assert verdict("[32,64,64]: loss only 1-3 %", found) == REPRODUCED


def test_few_seeds_are_judged_over_articles_and_the_page_says_so():
    found = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.005}, seeds=(0, 1, 2))
    said, its = the_claim("competitive with MHA").finding(found)
    assert its == UNRESOLVED and "30 articles, these models, best of 1 settings" in said
    worse = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.5}, seeds=range(4))
    assert verdict("competitive with MHA", worse) == UNRESOLVED
    assert the_claim("competitive with MHA").on_every_row(worse) == {"Tucker [8,128,64]": FAILED}  # as a trial
    worse = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.5}, seeds=range(5))
    assert verdict("competitive with MHA", worse) == FAILED  # control
    found = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.005})
    assert "8 seeds, best of 1 settings" in the_claim("competitive with MHA").finding(found)[0]


def test_validation_losses_that_chose_the_rates_never_judge():
    """Three or eight seeds without a test text: shown with their interval, and left open."""
    for n in (3, 8):
        found = settled_runs("table2", {"MHA": [4.0] * n, "Tucker [8,128,64]": [3.9] * n})
        said, its = the_claim("competitive with MHA").finding(found)
        assert (
            its == UNRESOLVED
            and said == f"−0.100 (−0.100 to −0.100) nats with 100% of its parameters, {n} seeds, validation text"
        )
        assert the_claim("competitive with MHA").on_every_row(found) == {
            "Tucker [8,128,64]": REPRODUCED
        }  # as a trial it would pass
    one = settled_runs("table2", {"MHA": [4.0], "Tucker [8,128,64]": [3.9]})
    assert the_claim("competitive with MHA").finding(one) == ("one seed, with 100% of its parameters", UNRESOLVED)


def test_beside_a_row_that_read_no_test_text_the_seeds_of_the_preset_gpu_are_shown_and_judge_nothing():
    claim, one = the_claim("competitive with MHA"), fresh("table2", {"MHA": 4.0}, (0,))
    found = one + fresh("table2", {"Tucker [8,128,64]": 4.0}, (1, 2))
    assert claim.finding(found) == ("one seed, with 100% of its parameters", UNRESOLVED)  # control: nothing else is on record
    older = settled_runs("table2", {"MHA": [4.0] * 3, "Tucker [8,128,64]": [3.9] * 3})
    said = "−0.100 (−0.100 to −0.100) nats with 100% of its parameters, 3 seeds, validation text, preset gpu"
    assert claim.finding(found + older) == (said, UNRESOLVED)
    assert claim.on_every_row(found + older) == {
        "Tucker [8,128,64]": REPRODUCED
    }  # as a trial, as before any test text was read


def test_runs_that_read_the_test_text_judge_before_others():
    """Eight seeds on fresh text, 1 % worse; on record too: three better ones whose rate was chosen on their own text."""
    found = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.04})
    older = settled_runs("table2", {"MHA": [4.0] * 3, "Tucker [8,128,64]": [3.9] * 3})
    assert verdict("competitive with MHA", older + found) == FAILED
    for r in found:
        del r.metrics["test"]
    assert verdict("competitive with MHA", older + found) == UNRESOLVED  # control


@pytest.mark.parametrize(("words", "experiment", "row", "base"), LOSS_CLAIMS)
def test_a_row_of_which_a_run_diverged_has_failed(words, experiment, row, base):
    found = fresh(experiment, {row: 3.0, base: 4.0})
    assert verdict(words, found) == REPRODUCED  # control
    assert the_claim(words).finding(found + fresh(experiment, {row: 3.0}, (9,), diverged_at=7)) == (f"{row} diverged", FAILED)
    assert the_claim(words).finding(found + fresh(experiment, {base: 3.0}, (9,), diverged_at=7)) == (
        f"{base} diverged",
        UNRESOLVED,
    )
    settled = settled_runs(experiment, {row: [3.0] * 3, base: [4.0] * 3}) + settled_runs(experiment, {row: [7]}, "diverged_at")
    assert verdict(words, settled) == FAILED


def test_a_run_at_other_settings_counts_for_nothing():
    found = settled_runs("table3", {SMALLEST: [4.0], RIVAL: [4.0]})
    assert list(findings.beside(found, "table3", RIVAL)) == [SMALLEST]  # control
    found[0].config["train"]["learning_rate"] *= 2
    assert findings.beside(found, "table3", RIVAL) == {}


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"qk_clip": 100.0}])
def test_what_not_all_rows_were_tried_with_on_fresh_text_is_no_setting_of_a_row(change):
    found = fresh("table2", {"MHA": 4.0, "Tucker [8,128,64]": 4.5})
    (better,) = fresh("table2", {"Tucker [8,128,64]": 3.0}, (1,))
    other = dataclasses.replace(better, config=better.config | {"train": better.train | change})
    assert the_claim("competitive with MHA").finding([*found, other]) == the_claim("competitive with MHA").finding(found)
    at_another_rate = dataclasses.replace(better, config=better.config | {"train": better.train | {"learning_rate": 9e-3}})
    assert "best of 2 settings" in the_claim("competitive with MHA").finding([*found, at_another_rate])[0]  # control


def test_rows_that_are_not_run_on_fresh_text_keep_what_they_have():
    """Five rows of Table 3 read a test text there; a claim about any other row still has AdamW's runs, of both sides."""
    older = settled_runs("table3", {SMALLEST: [4.0] * 3, "Tucker [32,128,64]": [4.1] * 3, RIVAL: [4.0] * 3})
    claim = the_claim("[32,128,64]: loss only 1-3 %")
    before = claim.finding(older)
    assert before == ("+0.100 (+0.100 to +0.100) nats with 100% of its parameters, 3 seeds, validation text", UNRESOLVED)
    both = older + fresh("table3", {SMALLEST: 3.2, RIVAL: 3.1})
    assert claim.finding(both) == (f"{before[0]}, preset gpu", UNRESOLVED)
    assert the_claim("comparable to GQA").finding(both)[1] == FAILED  # control: this row has both
    assert {row: pair.own[0].preset for row, pair in findings.beside(both, "table3", RIVAL).items()} == {
        SMALLEST: "gpu-fresh", "Tucker [32,128,64]": "gpu",
    }  # fmt: skip
    assert all(p.own[0].preset == p.other[0].preset for p in findings.beside(both, "table3", RIVAL).values())
    words = {line.split("|")[1].strip(): line for line in claims.words_table(both).splitlines()[2:]}
    assert words["Table 3, Llama, beside GQA n_KV=8"].split("|")[4].strip() == f"{SMALLEST}; Tucker [32,128,64]"


# Accuracies.


def fine_tuned(
    accuracies: dict[str, float], classes=100, parameters=10, rate=3e-4, spread=0.0, seeds=range(5), **more
) -> list[Record]:
    return [
        a_record(
            experiment="figure3",
            preset="gpu",
            method=row,
            seed=seed,
            config={"train": {"learning_rate": rate}, "epochs": 3},
            data={"classes": classes, "sha256": "0"},
            metrics={"top5": top5 + spread * (seed % 2), "top1": 0.5, "attention_parameters": parameters} | more,
        )
        for row, top5 in accuracies.items()
        for seed in seeds
    ]


VISION = ["GQA n_KV=6", "MLA shared d_c=128"]


@pytest.mark.parametrize("rival", VISION)
def test_top_5_may_be_at_most_one_point_below(rival):
    words, base = f"than {rival}", fine_tuned({rival: 0.9}, parameters=100)
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.891})) == REPRODUCED
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.95})) == REPRODUCED
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.889})) == FAILED
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.88}, spread=0.04)) == UNRESOLVED
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.95}, seeds=range(4))) == UNRESOLVED
    assert verdict(words, base + fine_tuned({"Tucker [8,24,24]": 0.95}, parameters=13)) == UNTESTED  # not a tenth
    assert verdict(words, base) == verdict(words, []) == UNTESTED


@pytest.mark.parametrize("rival", VISION)
def test_ten_classes_cannot_tell(rival):
    words = f"than {rival}"
    for top5 in (0.5, 0.9):
        found = fine_tuned({rival: 0.9}, 10, parameters=100) + fine_tuned({"Tucker [8,24,24]": top5}, 10)
        assert verdict(words, found) == UNRESOLVED
    better = fine_tuned({rival: 0.9}, parameters=100) + fine_tuned({"Tucker [8,24,24]": 0.5})
    assert verdict(words, found + better) == FAILED  # of two sets of images, the one with more classes


def test_the_best_of_several_rows_has_wider_intervals():
    """One row whose interval just ends within the limit; beside a second one it no longer does."""
    words, base = "than GQA n_KV=6", fine_tuned({"GQA n_KV=6": 0.9}, parameters=100)
    row = fine_tuned({"Tucker [8,24,24]": 0.897}, spread=0.02)
    assert verdict(words, base + row) == REPRODUCED
    assert verdict(words, base + row + fine_tuned({"Tucker [12,20,20]": 0.5})) == UNRESOLVED
    assert verdict(words, base + row + fine_tuned({"Tucker [12,20,20]": 0.5}, parameters=30)) == REPRODUCED  # not in the choice
    assert verdict(words, base + row + fine_tuned({"Tucker [12,20,20]": 0.95})) == REPRODUCED


def test_a_row_must_hold_against_every_rate_of_its_rival():
    words = "than GQA n_KV=6"
    found = fine_tuned({"GQA n_KV=6": 0.9}, parameters=100) + fine_tuned({"Tucker [8,24,24]": 0.9})
    assert verdict(words, found) == REPRODUCED
    assert verdict(words, found + fine_tuned({"GQA n_KV=6": 0.8}, parameters=100, rate=1e-3)) == REPRODUCED
    assert verdict(words, found + fine_tuned({"GQA n_KV=6": 0.95}, parameters=100, rate=1e-3)) == FAILED
    said, _ = the_claim(words).finding(found + fine_tuned({"Tucker [8,24,24]": 0.5}, rate=1e-3))
    assert "[8,24,24] at 0.0003 top-5 +0.0" in said and "[8,24,24] at 0.001 top-5 −40.0" in said


def test_a_fine_tuning_that_diverged_counts_against_its_row():
    words = "than GQA n_KV=6"
    found = fine_tuned({"GQA n_KV=6": 0.9}, parameters=100) + fine_tuned({"Tucker [8,24,24]": 0.9})
    gone = fine_tuned({"Tucker [8,24,24]": 0.9}, seeds=(9,), diverged_at=4)
    assert the_claim(words).finding(found + gone) == ("Tucker [8,24,24] diverged", FAILED)
    gone = fine_tuned({"GQA n_KV=6": 0.9}, parameters=100, seeds=(9,), diverged_at=4)
    assert the_claim(words).finding(found + gone) == ("GQA n_KV=6 diverged", UNRESOLVED)


# Spectra.


FLAT, STEEP, BETWEEN = [1.0] * 12, [1.0] + [0.01] * 11, [1.0, 0.6] + [0.4] * 10


def spectra(
    pre: list[float], post: list[float], other=STEEP, steps: int = BUDGETS["table2"].preset.train.steps
) -> list[Record]:
    """One layer: its head modes before and after the softmax, its query mode; the others are steep."""

    def mode(values):
        return {"values": values, "size": len(values)}

    layer = {"pre": {"head": mode(pre), "query": mode(other), "key": mode(STEEP)}}
    layer["post"] = {"head": mode(post), "output": mode(STEEP), "value": mode(STEEP)}
    config = {"train": {"steps": steps}}
    return [a_record(experiment="spectra", preset="gpu", method="MHA", config=config, metrics={"trained": [layer]})]


def test_effective_ranks_are_those_of_values_and_of_squares():
    assert findings.effective_rank(FLAT, 1) == pytest.approx(12) == findings.effective_rank(FLAT, 2)
    assert findings.effective_rank([3.0, 0.0], 1) == 1
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert findings.effective_rank([2.0, 1.0], 1) == pytest.approx(math.exp(entropy))
    assert findings.effective_rank([2.0, 1.0], 2) == pytest.approx(findings.effective_rank([4.0, 1.0], 1))
    recorded = next(r for r in COMMITTED if r.experiment == "spectra").metrics["trained"][0]["pre"]["head"]
    assert findings.effective_rank(recorded["values"], 1) == pytest.approx(recorded["entropy_rank"], abs=2e-3)


def test_a_decay_is_clear_where_both_measures_say_so():
    words = "decay clearly"
    assert verdict(words, spectra(STEEP, STEEP)) == REPRODUCED
    assert verdict(words, spectra(FLAT, STEEP)) == verdict(words, spectra(FLAT, FLAT)) == FAILED
    assert verdict(words, spectra(BETWEEN, STEEP)) == UNRESOLVED  # 94 % from the values, 77 % from the squares
    assert verdict(words, spectra(FLAT, FLAT, steps=20)) == verdict(words, []) == UNTESTED
    assert verdict(words, spectra(FLAT, FLAT, steps=20) + spectra(STEEP, STEEP)) == REPRODUCED
    both = the_claim(words).finding(spectra([1.0, 1.0], [1.0, 1.0]) + spectra([1.0, 0.0], [1.0, 0.0]))
    assert "; decay: head before the softmax 75% / 75%, query " in both[0] and both[1] == REPRODUCED  # the mean over seeds


def test_every_unfolding_has_to_decay_and_is_named():
    claim = the_claim("decay clearly")
    assert claim.finding(spectra(STEEP, STEEP, FLAT))[1] == FAILED
    said, its = claim.finding(spectra(STEEP, BETWEEN, STEEP))
    assert its == UNRESOLVED and said.endswith("; depend on the measure: head after the softmax 95% / 75%")
    assert claim.finding(spectra(STEEP, STEEP, FLAT))[0].endswith("; do not decay: query 100% / 100%")


def of_others(half: float = 0.3) -> Record:
    """A model that others trained: flat heads, all else steep. On inputs its head mode has two values, of which one is the larger."""

    def layers(heads: list[float]) -> list[dict]:
        (layer,) = spectra(heads, heads)[0].metrics["trained"]
        return [{side: {mode: x | effective(x["values"]) for mode, x in modes.items()} for side, modes in layer.items()}]

    def effective(values):
        return {"entropy_rank": findings.effective_rank(values, 1)}

    metrics = {"trained": layers(FLAT), "inputs": layers([(1 - half**2) ** 0.5, half])}
    return a_record(experiment="spectra", preset="models", method="theirs", config={"model": "theirs"}, metrics=metrics)


def test_models_of_others_have_a_clause_and_do_not_judge():
    decay, heads = the_claim("decay clearly"), the_claim("head-mode redundancy")
    ours = spectra(STEEP, STEEP)
    alone, together = (decay.finding(found) for found in (ours, [*ours, of_others()]))
    clause = "Of others' models, which do not judge: theirs 4 decay, 2 do not decay"
    assert together == (f"{alone[0]}. {clause}", REPRODUCED) == (together[0], alone[1])
    assert decay.finding([of_others()]) == (f"{NO_RUN[0]}. {clause}", UNTESTED)
    assert "0.30 before the softmax, 0.30 after it" in heads.finding([of_others()])[0]
    assert "theirs 0.20 before" in heads.finding([of_others(0.2)])[0] and heads.finding([of_others()])[1] == UNTESTED
    blind = of_others()
    del blind.metrics["inputs"]
    assert heads.finding([blind]) == NO_RUN


# Times.


def steps_of(device="a card", **times: float) -> list[Record]:
    names = {"mha": "MHA", "gqa": RIVAL, "large": "Tucker [32,128,128]", "small": SMALLEST}
    rows = [{"model": "LLaMA", "row": names[name], "milliseconds": time} for name, time in times.items()]
    return [a_record(experiment="speed", preset="gpu", method="models", device=device, metrics={"rows": rows})]


def test_a_step_must_be_15_to_25_per_cent_shorter_beside_both():
    words = "iteration time"
    assert verdict(words, steps_of(mha=100, gqa=98, large=100, small=79)) == REPRODUCED  # one of the rows is enough
    assert verdict(words, steps_of(mha=100, gqa=95, small=79)) == UNRESOLVED  # 21 % and 17 %, too close to 15 %
    assert verdict(words, steps_of(mha=100, gqa=98, small=86)) == UNRESOLVED  # 14 %: within what timings are known to
    assert verdict(words, steps_of(mha=100, gqa=98, small=90)) == FAILED
    assert verdict(words, steps_of(mha=100, gqa=98, small=70)) == FAILED  # more than the paper says
    said, its = the_claim(words).finding(steps_of(mha=100, small=80, large=100))
    assert said == "[32,128,128] +0.0 % beside MHA; [32,64,64] −20.0 % beside MHA. On one a card" and its == REPRODUCED
    assert verdict(words, steps_of(mha=100, gqa=98)) == verdict(words, steps_of(small=80)) == verdict(words, []) == UNTESTED
    assert verdict(words, [dataclasses.replace(r, preset="smoke") for r in steps_of(mha=100, small=80)]) == UNTESTED


def test_times_of_two_records_are_never_compared():
    words, slow = "iteration time", steps_of(mha=100, gqa=98, small=95)
    assert verdict(words, slow + steps_of("a faster card", small=79)) == FAILED  # no base was timed there
    assert (
        verdict(words, slow + steps_of("a faster card", mha=50, gqa=49, small=40)) == UNRESOLVED
    )  # each card says something else
    assert verdict(words, slow + steps_of("a faster card", mha=50, gqa=49, small=48)) == FAILED
    said, _ = the_claim(words).finding(steps_of(mha=100, small=80) + steps_of("a faster card", mha=50, small=45))
    assert said == "−20.0 % beside MHA, one a card; −10.0 % beside MHA, one a faster card"  # each number names its own
    assert the_claim(words).finding(steps_of(small=80)) == the_claim(words).finding(steps_of(mha=100)) == NO_RUN
    assert query.step_times(slow + steps_of("a faster card", small=79)) == {"MHA": 100, RIVAL: 98, SMALLEST: 95}
    assert query.step_times([]) == {}


# The rules have power, and the page says so.


@pytest.mark.no_cover
def test_every_rule_fails_a_row_on_record_or_says_why_none_can():
    for line in claims.power_table(COMMITTED).splitlines()[2:]:
        rule, trial, failed, *_ = [cell.strip() for cell in line.strip("|").split("|")]
        assert rule in RULES and failed, line
    for claim in claims.all_claims(COMMITTED):
        assert has_power(claim, COMMITTED) or claim.none_can != "none", claim.where


def has_power(claim: Claim, found: list[Record]) -> bool:
    return FAILED in claim.on_every_row(found).values()


def test_a_rule_that_lets_all_pass_has_no_power():
    """Control, claim by claim."""
    for claim in claims.all_claims(COMMITTED):
        lax = dataclasses.replace(claim, judge=lambda records, row: ("", REPRODUCED), tried=None)
        assert not has_power(lax, COMMITTED), claim.where


def test_where_no_row_on_record_can_fail_another_one_would():
    for words, experiment, row, base in LOSS_CLAIMS:
        assert has_power(the_claim(words), fresh(experiment, {row: 4.08, base: 4.0}))

    def one_more(metrics):
        for row in metrics["rows"]:
            row["counted_parameters"] += 1
            row["counted_cache_per_token"] += 1

    formulas = [c for c in claims.all_claims(with_changed("table1", one_more)) if c.rule == "formula"]
    assert formulas and {c.finding(COMMITTED)[1] for c in formulas} == {FAILED}
    powerless = {c.rule for c in claims.all_claims(COMMITTED) if c.none_can != "none"}
    assert powerless == {"loss", "formula"}


def test_the_reasons_why_no_row_can_fail_are_true():
    losses = {row: [r.metrics["validation_loss"] for r in runs] for row, runs in query.settled(COMMITTED, "table3").items()}
    mean = {row: sum(found) / len(found) for row, found in losses.items()}
    assert max(mean, key=mean.get) == "MLA shared d_c=128"
    for found in (COMMITTED, WITHOUT_TEST_TEXT):
        assert ends_above("MLA shared d_c=128", found, seeds=2) == set()
        assert "MLA shared d_c=128" in ends_above("MHA", found, seeds=2)  # control
    assert ends_above("MLA shared d_c=128", WITHOUT_TEST_TEXT, seeds=1)  # rows with one seed, which gives no interval


def ends_above(row: str, found: list[Record], seeds: int) -> set[str]:
    """Rows of Table 2 with so many seeds whose mean loss is above this one's by more than the margin."""

    def level(runs, beside):
        on_test_text = judge.test_losses(runs) and judge.test_losses(beside)
        return statistics.mean(judge.test_losses(runs) if on_test_text else [r.metrics["validation_loss"] for r in runs])

    pairs = findings.beside(found, "table2", row).items()
    enough = {label: (pair.own, pair.other) for label, pair in pairs if len(pair.own) >= seeds}
    return {label for label, (own, other) in enough.items() if level(own, other) > level(other, own) + MARGIN}


def test_what_was_let_pass_before_would_fail_now():
    """Every row of Tables 2 and 3 was within +2 % and +3 %, the worst included, before some read a test text."""
    assert the_claim("competitive with MHA").on_every_row(WITHOUT_TEST_TEXT)["MLA shared d_c=128"] == FAILED  # +1.7 %
    assert the_claim("comparable to GQA").on_every_row(COMMITTED)["MLA shared d_c=128"] == FAILED  # +2.5 %


def test_one_difference_is_one_estimate_wherever_it_is_judged():
    """+2 % is what one sentence says, and too much for another: each by its rule. A wide interval leaves both open."""
    lines = [the_claim(words) for words in ("comparable to GQA", "[32,64,64]: loss only 1-3 %")]

    def found(loss, spread):
        return [
            claim.finding(fresh("table3", {RIVAL: 4.0}) + fresh("table3", {SMALLEST: loss}, spread=spread)) for claim in lines
        ]

    (said, comparable), (again, above) = found(4.08, 0.0)
    assert said == again and (comparable, above) == (FAILED, REPRODUCED)
    (said, comparable), (again, above) = found(4.0, 0.1)
    assert said == again and comparable == above == UNRESOLVED


def test_words_need_the_table_s_base():
    words = claims.words_table(WITHOUT_TEST_TEXT)
    cells = [cell.strip() for cell in words.splitlines()[2].strip("|").split("|")]
    assert cells[2] == "GQA n_KV=4" and "MLA shared d_c=128" in cells[3] and "MQA" in cells[4]  # level, above, one seed
    assert "Table 2" not in claims.words_table([r for r in WITHOUT_TEST_TEXT if (r.experiment, r.method) != ("table2", "MHA")])
    assert claims.words_table([]) == ""


def unsaid(rules: dict[str, str]) -> set[str]:
    """Rules of findings whose text does not say what refutes a claim, or what leaves it open."""
    return {c.rule for c in claims.SENTENCES if not (FAILED in rules[c.rule] and UNRESOLVED in rules[c.rule])}


def test_every_rule_of_a_finding_says_what_refutes_and_what_leaves_open():
    assert unsaid(RULES) == set()
    assert unsaid(RULES | {"loss": RULES["loss"].replace(FAILED, "")}) == {"loss"}  # control


def read_too_early(page: str, records: list[Record]) -> list[Record]:
    """Those that read a test text, or images of more than ten classes, before the day since which the rules stand."""
    day = datetime.datetime.strptime(re.search(r"They have stood since (.*?)\.", page)[1], "%d %B %Y").date().isoformat()
    seen = [r for r in records if "test" in r.metrics and r.experiment == "table2" or (r.data or {}).get("classes", 0) > 10]
    return [r for r in seen if r.finished[:10] <= day]


def test_the_rules_are_older_than_what_they_judge():
    page = (FOLDER.parents[1] / "CLAIMS.md").read_text(encoding="utf-8")
    assert read_too_early(page, COMMITTED) == []
    assert read_too_early(page.replace("since 29 Nov", "since 30 Nov"), COMMITTED)  # control


@pytest.mark.no_cover
def test_the_page_counts_sizes_apart_from_findings():
    page = claims.render(COMMITTED)
    sizes, findings = (sum(c.kind == kind for c in claims.all_claims(COMMITTED)) for kind in (SIZES, FINDINGS))
    assert f"| sizes | {sizes} | " in page and f"| findings | {findings} | " in page
    assert f"| exact statements | {sum(c.kind == STATEMENTS for c in claims.all_claims(COMMITTED))} | " in page
    kinds = {c.kind for c in claims.all_claims(COMMITTED)}
    assert kinds == {STATEMENTS, SIZES, FINDINGS, OURS}
    for kind in kinds:  # as many lines as are counted
        section = page.split(f"\n## {kind.capitalize()}\n")[1].split("\n## ")[0]
        assert f"| {kind} | {section.count(chr(10) + '| ') - 1} | " in page, kind
    assert page.count("\n## ") == 6 and all(f"- **{rule}**. " in page for rule in RULES)
    assert {c.rule for c in claims.all_claims(COMMITTED)} == set(RULES)


def test_without_runs_at_a_scale_that_could_tell_nothing_is_judged():
    """Records of the smoke presets alone, as `make reproduce` makes them."""
    small = [r for r in COMMITTED if r.preset in ("smoke", "sizes")]
    judged = {c.says: v for c, _, v in claims.verdicts(small) if c.kind == FINDINGS}
    assert set(judged.values()) == {UNTESTED}
    page = claims.render(small)
    assert "beside MHA |" not in page and f"| findings | {len(judged)} | 0 | 0 | 0 | {len(judged)} |" in page
    assert {v for *_, v in claims.verdicts([])} == {UNTESTED} and "| sizes | 4 | 0 |" in claims.render([])


# Statements.


def with_changed(experiment: str, change) -> list[Record]:
    """The committed records, one experiment's metrics changed."""
    found = copy.deepcopy([r for r in COMMITTED if r.experiment == experiment])
    change(found[-1].metrics)
    return [r for r in COMMITTED if r.experiment != experiment] + found


def statement(where: str, says: str, records: list[Record]) -> tuple[str, str]:
    (claim,) = [c for c in statements.EQUALITIES if c.where == where and says in c.says]
    return claim.finding(records)


def cells_of(where: str):
    """Which cells of `exactness` an entry of the ledger judges."""
    return {
        "Thm B.2": lambda c: c["mechanism"] == "MHA",
        "Thm B.3": lambda c: c["mechanism"] in ("GQA", "MQA"),
        "Thm B.4": lambda c: c["mechanism"].startswith("MLA"),
        "Cor. 3.2.1": lambda c: c["rotary"] == "coupled" and not c["norm"],
    }[where]


@pytest.mark.parametrize(
    ("where", "says"),
    [("Thm B.2", "is a Tucker"), ("Thm B.3", "MQA are"), ("Thm B.4", "MLA is"), ("Cor. 3.2.1", "second path")],
)
def test_a_layer_that_is_off_refutes_its_theorem_and_no_other(where, says):
    assert statement(where, says, COMMITTED)[1] == REPRODUCED

    def off(metrics, belongs=True):
        for cell in metrics["cells"]:
            if cells_of(where)(cell["cell"]) == belongs:
                cell["errors"] = {way: 2e-12 for way in cell["errors"]}

    assert statement(where, says, with_changed("exactness", off))[1] == FAILED
    others = with_changed("exactness", lambda metrics: off(metrics, belongs=False))
    assert statement(where, says, others)[1] == REPRODUCED
    assert statement(where, says, []) == ("not on record", UNTESTED)


def test_a_control_that_does_not_miss_leaves_a_theorem_open():
    def blind(metrics):
        for cell in metrics["cells"]:
            cell["controls"] = {name: 1e-4 for name in cell["controls"]}

    assert statement("Thm B.2", "is a Tucker", with_changed("exactness", blind))[1] == UNRESOLVED


def test_all_comparisons_of_exactness_belong_to_entries_of_the_ledger():
    cells = next(r for r in COMMITTED if r.experiment == "exactness").metrics["cells"]
    said = [
        c.finding(COMMITTED)[0]
        for c in statements.EQUALITIES
        if c.rule == "exact" and c.where not in ("Def. 3.1, Lemma B.5", "Sec. 3.3")
    ]
    counted = [int(re.search(r"in (\d+) comparisons", text)[1]) for text in said]
    assert sum(counted) == sum(len(cell["errors"]) for cell in cells)


@pytest.mark.parametrize(("where", "says", "part"), [("Def. 3.1", "positions", "positions"), ("Sec. 3.3", "flash", "flash")])
def test_positions_and_flash_can_be_refuted(where, says, part):
    (where,) = [c.where for c in statements.EQUALITIES if c.where.startswith(where)]
    assert statement(where, says, COMMITTED)[1] == REPRODUCED
    assert statement(where, says, with_changed("theorems", lambda metrics: metrics[part][0].update(error=1e-3)))[1] == FAILED
    assert (
        statement(where, says, with_changed("theorems", lambda metrics: metrics[part][1].update(control=1e-6)))[1] == UNRESOLVED
    )
    assert statement(where, says, []) == ("not on record", UNTESTED)


@pytest.mark.no_cover
def test_flash_on_a_gpu_counts_too():
    assert "bfloat16 on a GPU 6e-03 in 6 layers" in statement("Sec. 3.3", "flash", COMMITTED)[0]
    slow = copy.deepcopy(COMMITTED)
    for r in slow:
        if (r.experiment, r.method) == ("speed", "layers"):
            next(x for x in r.metrics["rows"] if x["backend"] == "flash" and x["row"].startswith("Tucker"))["error"] = 0.1
    assert statement("Sec. 3.3", "flash", slow)[1] == FAILED
    without = [r for r in COMMITTED if r.experiment != "speed"]
    said, its = statement("Sec. 3.3", "flash", without)
    assert "GPU" not in said and its == REPRODUCED


def test_ranks_may_be_smaller_where_layers_are_narrow_alone():
    where, says = "Thm B.2", "ranks"
    said, its = statement(where, says, COMMITTED)
    assert (said, its) == ("equal in 2 of 2 layers; (3,12,12) for (3,24,24) with narrow heads", REPRODUCED)

    def change(layer, ranks):
        def changed(metrics):
            next(e for e in metrics["ranks"] if e["layer"] == layer)["found"] = ranks

        return statement(where, says, with_changed("theorems", changed))[1]

    assert change("MHA", [3, 24, 23, 3, 24, 24]) == FAILED
    assert change("MHA, narrow heads", [3, 24, 25, 3, 24, 24]) == FAILED  # above the theorem's

    def narrow_alone(metrics):
        metrics["ranks"] = [e for e in metrics["ranks"] if "narrow" in e["layer"]]

    assert statement(where, says, with_changed("theorems", narrow_alone))[1] == UNTESTED  # 0 of 0 are equal
    assert change("MHA, narrow heads", [3, 1, 1, 3, 1, 1]) == REPRODUCED
    assert change("GQA", [1] * 6) == REPRODUCED  # another theorem's
    assert statement(where, says, []) == ("not on record", UNTESTED)


def test_growth_that_is_faster_than_the_paper_s_is_seen():
    assert statement("place not known to us", "grow", COMMITTED)[1] == REPRODUCED

    def like_mha(metrics):
        for entry in metrics["growth"]:
            entry["parameters"] = 4 * entry["d"] ** 2

    assert statement("place not known to us", "grow", with_changed("theorems", like_mha))[1] == FAILED

    def without_heads(metrics):
        for e in metrics["growth"]:
            if e["layer"] == "Tucker":
                e["parameters"] = 4 * e["r"] * e["d"] + 16 * e["r"] ** 2

    assert statement("place not known to us", "grow", with_changed("theorems", without_heads))[1] == FAILED
    assert statement("place not known to us", "grow", []) == ("not on record", UNTESTED)
