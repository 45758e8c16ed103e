"""The verdicts on quality: each can be reached, and refuted, by records."""

import copy
import dataclasses

import pytest
from helpers import a_record

from reproduce.report import claims
from reproduce.report.claims import FAILED, REPRODUCED, UNTESTED
from reproduce.report.query import BUDGETS
from reproduce.store.records import Record


def runs(experiment: str, losses: dict[str, list[float]], metric: str = "validation_loss") -> list[Record]:
    """Runs of the preset `gpu` at its present settings, one per value."""
    budget = BUDGETS.get(experiment)
    return [
        a_record(
            experiment=experiment,
            preset="gpu",
            method=row,
            config={"train": dataclasses.asdict(budget.preset.train) | {"learning_rate": budget.rate(row)}} if budget else {},
            metrics={metric: value, "attention_parameters": 100},
        )
        for row, values in losses.items()
        for value in values
    ]


def spectra(pre: float, post: float) -> list[Record]:
    head = lambda rank: {"head": {"entropy_rank": rank, "size": 12}}  # noqa: E731
    return [
        a_record(
            experiment="spectra",
            preset="gpu",
            method="MHA",
            config={"train": {"steps": BUDGETS["table2"].preset.train.steps}},
            metrics={"trained": [{"pre": head(pre), "post": head(post)}]},
        )
    ]


TUCKER = ("Tucker [32,128,128]", "Tucker [32,128,64]", "Tucker [32,64,64]")
RIVALS = {"GQA n_KV=8": [4.0, 4.02], "MLA shared d_c=128": [4.1, 4.1]}
WIDER = {"GQA n_KV=6": [0.8, 0.82], "MLA shared d_c=128": [0.8, 0.8]}
LLAMA, ORDER, FIGURE, SPECTRA = "LLaMA text", "Abstract, all models", "Fig. 3, ViT", "Spectra figure"
CASES = [
    (LLAMA, runs("table3", {"GQA n_KV=8": [4.0], **{row: [4.11] for row in TUCKER}}), REPRODUCED),
    (LLAMA, runs("table3", {"GQA n_KV=8": [4.0], **{row: [4.13] for row in TUCKER}}), FAILED),
    (LLAMA, runs("table3", {"GQA n_KV=8": [4.0], TUCKER[0]: [4.0]}), UNTESTED),
    (ORDER, runs("table3", {**RIVALS, TUCKER[2]: [4.0, 4.04]}), REPRODUCED),
    (ORDER, runs("table3", {**RIVALS, TUCKER[2]: [4.05, 4.06]}), FAILED),
    (ORDER, runs("table3", {**RIVALS, TUCKER[2]: [4.0]}), UNTESTED),
    (FIGURE, runs("figure3", {**WIDER, "Tucker [8,24,24]": [0.8, 0.81]}, "top1"), REPRODUCED),
    (FIGURE, runs("figure3", {**WIDER, "Tucker [8,24,24]": [0.7, 0.71]}, "top1"), FAILED),
    (FIGURE, runs("figure3", {**WIDER, "Tucker [8,24,24]": [0.7, 0.71], "Tucker [12,20,20]": [0.8, 0.81]}, "top1"), REPRODUCED),
    (FIGURE, runs("figure3", {**WIDER, "Tucker [8,24,24]": [0.7, 0.71], "Tucker [12,20,20]": [0.9]}, "top1"), FAILED),
    (SPECTRA, spectra(6.0, 10.0), REPRODUCED),
    (SPECTRA, spectra(6.0, 11.0), FAILED),
]  # fmt: skip


@pytest.mark.parametrize(("where", "records", "verdict"), CASES)
def test_a_claim_of_quality_follows_the_records(where, records, verdict):
    (claim,) = [c for c in claims.SENTENCES if c.where == where and "iteration" not in c.says]
    assert claim.judge(copy.deepcopy(records))[1] == verdict
    assert claim.judge([])[1] == UNTESTED


def test_a_row_that_has_not_run_yet_is_said_to():
    (claim,) = [c for c in claims.SENTENCES if c.where == "Sec. 4.2, GPT-2"]
    found = runs("table2", {"MHA": [3.8], "Tucker [8,64,64]": [3.9]})
    assert claim.judge(found) == ("not run yet; Tucker [8,64,64] +2.6 % against MHA", UNTESTED)
    assert claim.judge(runs("table2", {"MHA": [3.8]})) == ("not run yet", UNTESTED)


def test_a_row_of_which_all_runs_diverged_has_failed():
    (claim,) = [c for c in claims.SENTENCES if c.where == ORDER]
    broken = runs("table3", {TUCKER[2]: [4.0, 4.0]}, "diverged_at")
    assert claims._broken(broken, "table3") == {TUCKER[2]} and claim.judge(broken)[1] == FAILED


def test_rows_that_diverged_beside_the_one_in_question_are_said():
    """Two seeds of three ended with good losses: that is not what these rows reach."""
    losses = {"MHA": [3.8] * 2, "Tucker [8,128,64]": [3.81] * 2, "Tucker [8,64,64]": [3.8] * 2}
    ended = [dataclasses.replace(r, metrics=r.metrics | {"tokens_seen": 50_000_000}) for r in runs("table2", losses)]
    said, verdict = claims._competitive(ended)
    assert (said, verdict) == (
        "Tucker [8,128,64] +0.3 %; Tucker [8,64,64] +0.0 % against MHA, 50M tokens", REPRODUCED,
    )  # fmt: skip
    broken = runs("table2", {"Tucker [8,64,64]": [7]}, "diverged_at")
    assert claims._competitive(ended + broken) == (
        "Tucker [8,128,64] +0.3 %; Tucker [8,64,64] diverged against MHA, 50M tokens", REPRODUCED,
    )  # fmt: skip
    assert claims._competitive(ended + runs("table2", {"Tucker [8,128,64]": [7]}, "diverged_at"))[1] == FAILED
    assert claims._competitive(ended + runs("table2", {"MHA": [7]}, "diverged_at")) == ("MHA diverged", UNTESTED)


@pytest.mark.parametrize("where", [LLAMA, ORDER])
def test_a_row_of_which_a_run_diverged_has_failed(where):
    (claim,) = [c for c in claims.SENTENCES if c.where == where and "iteration" not in c.says]
    found = runs("table3", {**RIVALS, **{row: [4.0, 4.0] for row in TUCKER}})
    assert claim.judge(found)[1] == REPRODUCED  # control
    found += runs("table3", {TUCKER[2]: [7]}, "diverged_at")
    assert claim.judge(found) == (f"{TUCKER[2]} diverged", FAILED)
    rival = runs("table3", {"GQA n_KV=8": [7]}, "diverged_at") + found[:-1]
    assert claim.judge(rival) == ("GQA n_KV=8 diverged", UNTESTED)  # what to compare with is not known


def test_head_modes_are_those_of_runs_of_the_table_s_length():
    short = spectra(6.0, 6.0)
    short[0].config["train"]["steps"] = 20
    assert claims._head_redundancy(short)[1] == UNTESTED and claims._head_redundancy(short + spectra(6.0, 11.0))[1] == FAILED
    both = claims._head_redundancy(spectra(12.0, 12.0) + spectra(6.0, 6.0))
    assert both == ("75% and 75% of n_H before and after the softmax", REPRODUCED)  # the mean over seeds


def test_a_run_at_other_settings_counts_for_nothing():
    found = runs("table3", {TUCKER[2]: [4.0]})
    assert list(claims._chosen(found, "table3")) == [TUCKER[2]]  # control
    found[0].config["train"]["learning_rate"] *= 2
    assert claims._chosen(found, "table3") == {}
