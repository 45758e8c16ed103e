"""The tables of the GPT-2 runs at the paper's shape: which runs belong together, and what is said where there is none."""

import copy

from reproduce import gpt2_report, records
from reproduce.claims import FAILED, REPRODUCED, UNTESTED, _competitive

COMMITTED = records.load(records.COMMITTED)


def row_of(table: str, label: str) -> list[str]:
    found = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
    assert len(found) == 1, label
    return [cell.strip() for cell in found[0].split("|")[2:-1]]


def test_only_runs_at_the_preset_s_own_settings_stand_in_table_2():
    runs = gpt2_report.settled(COMMITTED)
    assert {r["config"]["train"]["warmup_steps"] for group in runs.values() for r in group} == {800}
    other = copy.deepcopy(runs["MHA"][0])
    other["config"]["train"]["learning_rate"] *= 2
    assert len(gpt2_report.settled([*COMMITTED, other])["MHA"]) == len(runs["MHA"])
    title, table, _, note, others = gpt2_report.budget_tables([*COMMITTED, other])
    assert "REDUCED BUDGET" in title and "other settings" in note
    assert f"{other['config']['train']['learning_rate']:g}" in others
    assert row_of(table, "MHA")[2] == "0.0012"


def test_a_row_without_a_run_says_so():
    kept = [r for r in COMMITTED if (r["experiment"], r["preset"], r["method"]) != ("table2", "gpu", "Tucker [8,64,64]")]
    _, table, *_ = gpt2_report.budget_tables(kept)
    assert set(row_of(table, "Tucker [8,64,64]")) == {"not run yet"}
    assert "not run yet" not in row_of(gpt2_report.budget_tables(COMMITTED)[1], "Tucker [8,64,64]")  # control


def test_the_sweep_holds_the_ablations_long_warm_ups_and_marks_each_row_s_best():
    _, table, order, _ = gpt2_report.sweep_table(COMMITTED)
    label = "Tucker [8,128,128]"
    short, long = (row_of(table, f"{label}, warm-up {steps}") for steps in (100, 400))
    assert sum(cell.startswith("**") for cell in short + long) == 1 and any(cell.startswith("**") for cell in long)
    without = [r for r in COMMITTED if r["experiment"] != "ablations"]
    assert "not run" in row_of(gpt2_report.sweep_table(without)[1], f"{label}, warm-up 400")[2]  # control
    assert order.index("Tucker") < order.index("MLA")


def test_a_run_that_diverged_is_shown_as_such():
    table = gpt2_report.ablation_table(COMMITTED)[1]
    assert row_of(table, "Tucker [8,128,128], decay of the product")[-1] == "diverged at step 300"


def test_commands_that_differ_in_what_is_swept_are_one():
    commands = [
        "python -m reproduce table2 --preset gpu --rows Tucker [8,64,64],MLA shared d_c=128 --out out --learning-rate 1",
        "python -m reproduce table2 --rows 'MHA' --preset gpu --records r --warmup-steps 9",
    ]
    once = "python -m reproduce table2 --preset gpu --rows ROWS --learning-rate RATE --warmup-steps STEPS"
    assert gpt2_report.patterns(commands) == [once]
    assert len(gpt2_report.patterns([*commands, "python -m reproduce table3 --preset gpu"])) == 2


def test_competitive_is_judged_by_the_row_in_question_alone():
    def with_loss(above):
        run = copy.deepcopy(gpt2_report.settled(COMMITTED)["Tucker [8,64,64]"][0])
        run["method"] = "Tucker [8,128,64]"
        run["metrics"]["validation_loss"] = gpt2_report.settled(COMMITTED)["MHA"][0]["metrics"]["validation_loss"] * (1 + above)
        return [r for r in COMMITTED if r["method"] != run["method"]] + [run]

    assert _competitive(with_loss(0.019))[1] == REPRODUCED
    assert _competitive(with_loss(0.021))[1] == FAILED
    assert _competitive([])[1] == UNTESTED
