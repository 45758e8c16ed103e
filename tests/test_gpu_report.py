"""The tables of what one GPU trained: which runs belong together, and what is said where there is none."""

import copy
import dataclasses

import pytest
from helpers import a_record, committed_records

from reproduce.experiments import table2, table3
from reproduce.experiments.ablations import PRESETS as ABLATIONS
from reproduce.report import breakdown, budgets, cells, commands, fresh, gpu, headline, query, words
from reproduce.report.query import grouped
from reproduce.store import records
from reproduce.train.recipes import Recipe

COMMITTED = committed_records()


def row_of(table: str, label: str) -> list[str]:
    found = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
    assert len(found) == 1, label
    return [cell.strip() for cell in found[0].split("|")[2:-1]]


def test_only_runs_at_the_preset_s_own_settings_stand_in_table_2():
    runs = query.settled(COMMITTED, "table2")
    assert {r.config["train"]["warmup_steps"] for group in runs.values() for r in group} == {800}
    other = copy.deepcopy(runs["MHA"][0])
    other.config["train"]["learning_rate"] *= 2
    assert len(query.settled([*COMMITTED, other], "table2")["MHA"]) == len(runs["MHA"])
    table, others = budgets.budget_tables([*COMMITTED, other], "table2")
    assert "REDUCED BUDGET" in table.title and "other settings" in others.title
    assert f"{other.rate:g}" in others.body
    assert row_of(table.body, "MHA")[2] == "0.0012"


def test_every_row_of_table_2_stands_at_the_best_of_the_rates_that_were_tried():
    settled = query.settled(COMMITTED, "table2")
    budget = query.budget_of(settled["MHA"][0])
    tried = [r for r in COMMITTED if (r.experiment, r.preset) == ("table2", "gpu") and query.budget_of(r) == budget]
    losses = {}
    for (row, rate, warmup), group in grouped(tried, lambda r: (*query.method_and_rate(r), r.warmup)).items():
        if warmup == 800:
            losses.setdefault(row, {})[rate] = query.mean_loss(group)
    assert settled.keys() == losses.keys() and len(losses["MHA"]) == len(losses["Tucker [8,128,128]"]) == 3
    for row, by_rate in losses.items():
        assert query.BUDGETS["table2"].rate(row) == min(by_rate, key=by_rate.get), row


def test_seeds_at_another_setting_are_one_line_and_settings_are_not():
    run = copy.deepcopy(query.settled(COMMITTED, "table2")["MHA"][0])
    run.config["train"]["learning_rate"] = 0.77
    again = dataclasses.replace(copy.deepcopy(run), seed=1)
    run.metrics["validation_loss"], again.metrics["validation_loss"] = 3.0, 3.2
    (others,) = budgets.budget_tables([run, again], "table2")
    assert row_of(others.body, "MHA")[:5] == ["0.77", "800", "3,052", run.data["name"], "3.100 ± 0.141 (2)"]
    again.config["train"]["warmup_steps"] = 9  # control
    assert len(budgets.budget_tables([run, again], "table2")[0].body.splitlines()) == 4


@pytest.mark.parametrize("experiment", query.BUDGETS)
def test_runs_at_other_settings_alone_are_shown_as_such(experiment):
    other = copy.deepcopy(next(r for r in COMMITTED if (r.experiment, r.preset) == (experiment, "gpu")))
    other.config["train"]["learning_rate"] = 0.77
    (others,) = budgets.budget_tables([other], experiment)
    assert "at other settings" in others.title and others.runs == [other] and "0.77" in others.body
    own = next(iter(query.settled(COMMITTED, experiment).values()))[0]
    assert "at other settings" not in budgets.budget_tables([own], experiment)[0].title  # control: no table of others


def test_a_row_without_a_run_says_so():
    kept = [r for r in COMMITTED if (r.experiment, r.preset, r.method) != ("table2", "gpu", "Tucker [8,64,64]")]
    assert set(row_of(budgets.budget_tables(kept, "table2")[0].body, "Tucker [8,64,64]")) == {"not run yet"}
    assert "not run yet" not in row_of(budgets.budget_tables(COMMITTED, "table2")[0].body, "Tucker [8,64,64]")  # control


def test_the_sweep_holds_the_ablations_long_warm_ups_and_marks_each_row_s_best():
    (sweep,) = gpu.sweep_table(COMMITTED)
    table, order = sweep.body, sweep.note
    label = "Tucker [8,128,128]"
    short, long = (row_of(table, f"{label}, warm-up {steps}") for steps in (100, 400))
    assert sum(cell.startswith("**") for cell in short + long) == 1 and any(cell.startswith("**") for cell in long)
    without = [r for r in COMMITTED if r.experiment != "ablations"]
    assert "not run" in row_of(gpu.sweep_table(without)[0].body, f"{label}, warm-up 400")[2]  # control
    assert order.index("Tucker") < order.index("MLA")


def test_rates_that_the_sweep_left_out_have_a_reason_that_holds():
    runs = query.sweep_runs(COMMITTED)
    row, reason = "Tucker [8,64,64]", "another rate had been better with the shorter warm-up"
    assert reason in gpu.gaps(runs)
    best = min((r for r in runs if r.method == row and r.warmup == 100), key=lambda r: r.metrics["validation_loss"])
    best_rate = best.rate
    without = [r for r in runs if (r.method, r.rate) != (row, best_rate) or r is best]
    assert len(without) == len(runs) - 1 and gpu.gaps(without) == ""  # control: left out where the short one was best
    assert gpu.gaps([best]) == ""  # nothing is left out


def test_a_run_that_diverged_is_shown_as_such():
    table = gpu.ablation_table(COMMITTED)[0].body
    assert row_of(table, "Tucker [8,128,128], decay of the product")[-1] == "diverged at step 300"


def test_a_setting_of_which_one_seed_diverged_is_no_row_s_best():
    """Neither in the sweep, nor by the loss that a command is said to give."""
    runs = query.sweep_runs(COMMITTED)
    label = "Tucker [8,64,64]"
    best = min((r for r in runs if r.method == label), key=lambda r: r.metrics["validation_loss"])
    broken = dataclasses.replace(best, seed=7, metrics={"diverged_at": 9})
    assert query.mean_loss([best, broken]) is None and query.mean_loss([best]) == best.metrics["validation_loss"]
    (table, losses), (_, before) = (
        gpu.rates_table(found, lambda r: f"{r.method}, warm-up {r.warmup}") for found in ([*runs, broken], runs)
    )
    assert "diverged at step 9" in row_of(table, f"{label}, warm-up {best.warmup}")
    assert losses[label] > before[label] == best.metrics["validation_loss"]  # control
    lost = dataclasses.replace(query.settled(COMMITTED, "table2")["MHA"][0], seed=7, metrics={"diverged_at": 9})
    assert "MHA diverged at step 9" in commands.render([*COMMITTED, lost]) and "MHA diverged" not in commands.render(COMMITTED)


def test_a_case_of_the_ablations_that_is_not_on_record_is_named():
    without = [r for r in COMMITTED if r.method != "Tucker [8,128,128], normalised latents"]
    waiting, said = (gpu.ablation_table(r)[0].note for r in (without, COMMITTED))
    assert "Tucker [8,128,128], normalised latents" in waiting and "normalised latents" not in said
    assert "ended at 6.747" in waiting  # the sweep's run of the same setting as the ablations' own


def test_cures_stand_beside_the_runs_without_them():
    plain = query.settled(COMMITTED, "table2")["Tucker [8,128,64]"]
    method = "Tucker [8,128,64], normalised latents"
    cured = dataclasses.replace(copy.deepcopy(plain[0]), experiment="ablations", method=method)
    cured.config.update(recipe={"latent_norm": True})
    cured.metrics.update(validation_loss=3.5, observations=[{"largest_logit": 55.0}])
    table = gpu.cures_table([*[r for r in COMMITTED if r.experiment == "table2"], cured])[0].body
    assert row_of(table, "Tucker [8,128,64], normalised latents") == ["0.0024", "3.500", "55"]
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert ["0.0024", cells.loss_cell(plain), f"{query.largest_logit(plain):,.0f}"] in lines
    assert [rate for rate, *_ in lines] == ["0.0012", "0.0024", "0.0048", "0.0024"]  # each once: not those of another warm-up
    assert len({loss for _, loss, _ in lines}) == 4
    assert len(gpu.cures_table([cured])[0].body.splitlines()) == 3  # control: Table 2 has no run of it
    again = dataclasses.replace(copy.deepcopy(cured), seed=1)
    assert len(gpu.cures_table([cured, again])[0].body.splitlines()) == 3  # seeds are one line
    again.config["train"]["learning_rate"] *= 2
    assert len(gpu.cures_table([cured, again])[0].body.splitlines()) == 4  # control: rates are not


def test_a_row_is_set_beside_the_runs_of_its_own_seeds():
    base = [a_record(seed=seed, metrics={"validation_loss": loss}) for seed, loss in enumerate((3.0, 3.5))]
    row = [a_record(seed=seed, metrics={"validation_loss": loss}) for seed, loss in ((1, 3.54), (0, 3.02), (7, 9.0))]
    assert cells.above_cell(row[:1], base) == "+0.040"  # control: beside the mean of the base it would be +0.290
    assert cells.above_cell(row[:2], base).startswith("+0.030 [")
    assert cells.above_cell(row[2:], base) == cells.above_cell(base, base) == ""


def test_every_row_stands_at_the_best_of_its_settings_with_most_seeds():
    (best,) = gpu.best_table(COMMITTED)
    table = best.body
    change, rate, loss, *_, tried = row_of(table, "Tucker [8,128,128]")[1:]
    assert (change, rate) == ("factors at a quarter of the rate", "0.0048") and "3 seeds" in best.title
    assert "ad00779a96" in {r.commit[:10] for r in best.runs}
    assert tried == "7 (4)" and loss.startswith(cells.loss_cell(by_setting(COMMITTED)["Tucker [8,128,128], " + change, 4.8e-3]))
    means = [float(line.split("|")[5].split()[0]) for line in table.splitlines()[2:]]
    assert means == sorted(means)
    lucky = dataclasses.replace(copy.deepcopy(query.settled(COMMITTED, "table2")["Tucker [8,128,128]"][0]), id="another")
    lucky.config["train"]["learning_rate"], lucky.metrics["validation_loss"] = 0.7, 1.0
    again = row_of(gpu.best_table([*COMMITTED, lucky])[0].body, "Tucker [8,128,128]")
    assert (again[2], again[-1]) == ("0.0048", tried.replace("7 ", "8 "))  # one seed is no match for three
    said, without = (gpu.best_table(found)[0].note for found in ([*COMMITTED, lucky], COMMITTED))
    assert "Tucker [8,128,128] at 0.7 ended at 1.000" in said and "Tucker [8,128,128] at" not in without  # and is named
    plain = [r for r in COMMITTED if r.experiment != "ablations"]
    assert "left out" in without and "left out" not in gpu.best_table(plain)[0].note
    three = [dataclasses.replace(lucky, seed=seed) for seed in range(3)]
    assert row_of(gpu.best_table([*COMMITTED, *three])[0].body, "Tucker [8,128,128]")[2] == "0.7"  # control
    three = [dataclasses.replace(run, metrics={"diverged_at": 3, "attention_parameters": 1}) for run in three]
    assert row_of(gpu.best_table([*COMMITTED, *three])[0].body, "Tucker [8,128,128]")[2] == "0.0048"
    assert gpu.best_table(three) == gpu.best_table([]) == []
    assert (
        gpu.best_table([r for r in COMMITTED if r.experiment == "ablations"]) == []
    )  # of Table 2 there is none to set it beside


def by_setting(records):
    runs = query.full_budget_runs(records) + [r for r in records if (r.experiment, r.preset) == ("ablations", "gpu")]
    return grouped(runs, query.method_and_rate)


def test_slowed_runs_are_those_of_factors_or_attention_under_their_row_s_name():
    full, sweep = (query.slowed_runs(COMMITTED, preset) for preset in ("gpu", "gpu-sweep"))
    assert {r.method for r in full} == {"MHA", "Tucker [8,128,128]", "Tucker [8,128,64]", "Tucker [8,64,64]"}
    assert {r.method for r in sweep} == {"MHA", "GQA n_KV=4", "MLA shared d_c=128", "Tucker [8,128,128]"}
    assert {r.warmup for r in sweep} == {400}  # those with the short warm-up stand apart
    methods = {r.id: r.method for r in COMMITTED}
    assert all(("factors" if r.method.startswith("Tucker") else "attention") in methods[r.id] for r in full + sweep)


def test_cures_stand_in_table_2_s_order_of_rows():
    lines = gpu.cures_table(COMMITTED)[0].body.splitlines()[2:]
    rows = {r.method: query.row_label(r) for r in COMMITTED if r.experiment in ("table2", "ablations") and r.is_trained}
    shown = list(dict.fromkeys(rows[line.split("|")[1].strip()] for line in lines))
    assert shown == [row.label for row in table2.ON_GPU_ROWS if row.label in shown] and len(shown) > 3


def test_commands_that_differ_in_what_is_swept_are_one():
    commands = [
        "python -m reproduce table2 --preset gpu --rows Tucker [8,64,64],MLA shared d_c=128 --out out --learning-rate 1",
        "python -m reproduce table2 --rows 'MHA' --preset gpu --records r --warmup-steps 9",
    ]
    once = "python -m reproduce table2 --preset gpu --rows ROWS --learning-rate RATE --warmup-steps STEPS"
    assert words.patterns(commands) == [once]
    assert len(words.patterns([*commands, "python -m reproduce table3 --preset gpu"])) == 2


def test_commands_say_how_long_they_take():
    slower = [dataclasses.replace(r, wall_seconds=2 * r.wall_seconds) for r in COMMITTED]
    assert commands.render(slower) != commands.render(COMMITTED)
    assert commands.render([]).count("not run yet") == 6 and commands.on_record([]) == ""


def test_what_is_on_record_is_counted():
    line = next(line for line in commands.on_record(COMMITTED).splitlines() if "`table3 --preset gpu`" in line)
    runs = [r for r in COMMITTED if (r.experiment, r.preset) == ("table3", "gpu")]
    assert f"| {len(runs)} | {sum(r.wall_seconds for r in runs) / 3600:.1f} |" in line and line.endswith("| 600 | 0, 1, 2 |")


def test_what_was_not_run_is_named():
    presets = {"table2": table2.PRESETS, "ablations": ABLATIONS, "table3": table3.PRESETS}

    def a_run(experiment, preset):
        run = next(r for r in COMMITTED if (r.experiment, r.preset) == (experiment, "gpu"))
        train = run.config["train"] | {"steps": presets[experiment][preset].train.steps}
        return dataclasses.replace(run, preset=preset, config=run.config | {"train": train})

    every = [a_run(experiment, preset) for experiment, own in presets.items() for preset in own if preset.startswith("gpu")]
    assert len(every) > 9 and "Not run yet" not in commands.on_record(every)
    without = [r for r in every if (r.experiment, r.preset) != ("table3", "gpu-fresh")]
    assert commands.on_record(without).splitlines()[-1] == "Not run yet: `table3 --preset gpu-fresh`."


def test_a_break_down_is_told_step_by_step_and_beside_what_holds_it():
    steps, logits = breakdown.breakdown_tables(COMMITTED)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in steps.body.splitlines()[2:]]
    assert [line[0] for line in lines] == [f"{100 * n}" for n in range(10)] and lines[0][
        1
    ] == ""  # nothing is trained at step 0
    losses = [float(line[1]) for line in lines[1:]]
    assert min(losses) == losses[3] and losses[-1] > losses[3] + 0.5  # it breaks down
    assert lines[0][-3:] == ["1.00"] * 3
    shown = [float(line.split("|")[2].replace(",", "")) for line in logits.body.splitlines()[2:]]
    assert shown == sorted(shown) and "| unchanged | 114,200 |" in logits.body
    unseen = [dataclasses.replace(r, metrics=r.metrics | {"observations": []}) for r in COMMITTED]
    assert breakdown.breakdown_tables(unseen) == []
    changed = [r for r in COMMITTED if r.experiment == "ablations" and query.recipe_of(r)]
    assert [table.name for table in breakdown.breakdown_tables(changed)] == ["Largest logits"]  # without the row as it is


def test_the_largest_logit_of_any_seed_is_shown():
    group = query.settled(COMMITTED, "table2")["MHA"]
    seen = [o["largest_logit"] for r in group for o in r.metrics["observations"]]
    assert len(group) > 1 and query.largest_logit(group) == max(seen) > min(seen)
    assert f"{max(seen):,.0f}" in row_of(budgets.budget_tables(COMMITTED, "table2")[0].body, "MHA")
    unseen = copy.deepcopy(group)
    for r in unseen:
        del r.metrics["observations"]
    assert row_of(budgets.budget_tables(unseen, "table2")[0].body, "MHA")[-2] == ""


def test_speeds_are_those_of_the_card_that_trained_most_rows():
    runs = [
        a_record(device=card, method=row, metrics={"tokens_per_second": speed})
        for card, row, speed in (("A", "MHA", 9), ("A", "MHA", 9), ("B", "MHA", 4), ("B", "MHA", 6), ("B", "MQA", 3))
    ]
    broken = a_record(device="B", method="MHA", metrics={"diverged_at": 7})
    assert query.speeds_on_one_card([*runs, broken]) == ("B", {"MHA": 5, "MQA": 3})
    assert query.speeds_on_one_card([broken]) == ("no run ended", {})
    runs = [r for group in query.settled(COMMITTED, "table2").values() for r in group]
    moved = [dataclasses.replace(r, device="another" if r.method == "MHA" else "one") for r in runs]
    table = budgets.budget_tables(moved, "table2")[0].body
    assert row_of(table, "MHA")[-1] == "another card" and row_of(table, "MQA")[-1] != "another card"  # control


def test_llama_rows_stand_beside_gqa_8_and_the_step_of_the_true_shape():
    shown = budgets.budget_tables(COMMITTED, "table3")[0]
    table = shown.body
    assert "REDUCED SCALE" in shown.title
    cells = {label: row_of(table, label) for label in ("GQA n_KV=8", "Tucker [32,64,64]")}
    assert cells["GQA n_KV=8"][4] == "" and cells["Tucker [32,64,64]"][4] == "+0.091 [+0.001, +0.180]"
    times = query.step_times(COMMITTED)
    assert [row[-1] for row in cells.values()] == [f"{times[label]:.0f}" for label in cells]
    without = budgets.budget_tables([r for r in COMMITTED if r.experiment != "speed"], "table3")[0].body
    assert "ms a step" in table and "ms a step" not in without


def of_case(example: records.Record, label: str, recipe: Recipe) -> records.Record:
    """The same run as if of that case of the ablations."""
    (row,) = [row for row in table2.ON_GPU_ROWS if row.label == label]
    config = example.config | {"row": row.config(), "recipe": recipe.config()}
    return dataclasses.replace(example, method=gpu.method_of(label, recipe), config=config)


def test_the_ablations_say_nothing_more_where_there_is_nothing_to_say():
    known = {r.method for r in COMMITTED if r.experiment == "ablations"}
    example = next(r for r in COMMITTED if r.method == "Tucker [8,128,128], init std 0.02")
    missing = [case for case in gpu.CASES if case[1].config() and gpu.method_of(*case) not in known]
    full = [*COMMITTED, *(of_case(example, *case) for case in missing)]
    without = [r for r in full if (r.experiment, r.preset) != ("table2", "gpu-sweep")]
    assert "once more" in gpu.ablation_table(full)[0].note and gpu.ablation_table(without)[0].note == ""


def trial(experiment="table2", preset="gpu", **settings) -> records.Record:
    """A copy of a committed run with other training settings, and a loss that would be noticed."""
    run = copy.deepcopy(next(r for r in COMMITTED if (r.experiment, r.preset) == (experiment, preset)))
    run.config["train"] |= settings
    run.metrics.update(validation_loss=9.0, tokens_per_second=1e9, tokens_seen=1)
    return run


@pytest.mark.parametrize("first", [True, False])
def test_a_short_trial_changes_no_table_but_its_own_line(first):
    """Whether it stands before or after the others."""
    for short in (trial(steps=20), trial(preset="gpu-sweep", steps=20), trial("ablations", "gpu-sweep", steps=20)):
        found = [short, *COMMITTED] if first else [*COMMITTED, short]
        assert gpu.sweep_table(found) == gpu.sweep_table(COMMITTED)
        assert gpu.ablation_table(found) == gpu.ablation_table(COMMITTED)
        assert gpu.cures_table(found) == gpu.cures_table(COMMITTED)
        assert breakdown.breakdown_tables(found) == breakdown.breakdown_tables(COMMITTED)
        table, others = budgets.budget_tables(found, "table2")
        assert table == budgets.budget_tables(COMMITTED, "table2")[0]
        assert (" 20 " in others.body and "9.000" in others.body) == (short.preset == "gpu")
    changed = trial()  # control: a run of the same budget does count
    assert budgets.budget_tables([*COMMITTED, changed], "table2")[0].body != table.body


def test_seeds_are_counted_for_the_titles():
    runs = query.sweep_runs(COMMITTED)
    assert words.seeds_in_words(runs) == "one seed" and ", one seed.**" in gpu.sweep_table(COMMITTED)[0].title
    assert words.seeds_in_words([*runs, dataclasses.replace(runs[0], seed=7)]) == "up to 2 seeds"


def test_speed_is_that_of_one_gpu():
    run = query.settled(COMMITTED, "table2")["MHA"][0]
    many = copy.deepcopy(run)
    many.metrics.update(workers={"workers": 8}, tokens_per_second=1e9)
    assert query.speeds_on_one_card([run, many]) == query.speeds_on_one_card([run])
    many.metrics["workers"]["workers"] = 1  # control
    assert query.speeds_on_one_card([run, many]) != query.speeds_on_one_card([run])


def test_a_difference_is_that_of_runs_with_one_seed():
    base = [a_record(seed=seed, metrics={"validation_loss": loss}) for seed, loss in ((0, 3.0), (1, 3.5))]
    row = [a_record(seed=seed, metrics={"validation_loss": 3.04}) for seed in (0, 7)]
    assert cells.above_cell(row, base) == cells.above_cell(row[:1], base) == "+0.040"
    assert cells.above_cell(row[1:], base) == ""  # control: no run of the other has this seed


def test_a_row_of_which_a_run_broke_off_has_no_mean():
    whole = query.settled(COMMITTED, "table2")["Tucker [8,64,64]"][0]
    left = {name: whole.metrics[name] for name in ("attention_parameters", "cache_per_token", "curve")}
    broken = dataclasses.replace(whole, metrics=left | {"diverged_at": 300})
    plain = [r for r in COMMITTED if r.preset != "gpu-fresh"]  # which has the first page where enough seeds judge
    found = [*plain, broken]
    cells = row_of(budgets.budget_tables(found, "table2")[0].body, "Tucker [8,64,64]")
    assert cells[3:5] == ["diverged at step 300", ""]
    assert "Tucker [8,64,64]" not in headline.headline(found) and "Tucker [8,64,64]" in headline.headline(plain)


def test_fresh_text_says_how_equally_rows_were_tried():
    rates = {"MHA": (1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3), "GQA n_KV=2": (2.4e-3,)}
    runs = [r for r in COMMITTED if r.preset == "gpu-fresh" and r.seed == 0 and r.rate in rates.get(r.method, ())]
    (table,) = fresh.rates_table(runs)
    assert "not tried equally yet, at 0 to 4 rates each" in table.note
    assert "Not run at any rate: GQA n_KV=4; MQA; " in table.note and table.note.endswith("Tucker [8,64,64] QK-norm.")
    assert [row_of(table.body, label)[-1] for label in ("MHA", "GQA n_KV=2")] == ["4", "1"]  # the table says how many
    assert row_of(table.body, "GQA n_KV=2").count("not run") == 3

    (one,) = [r for r in runs if r.method == "GQA n_KV=2"]
    every = [
        dataclasses.replace(
            one, id=f"{n}{rate}", method=row.label, config=one.config | {"train": one.train | {"learning_rate": rate}}
        )
        for n, row in enumerate(table2.FRESH_ROWS)
        for rate in ((1e-3, 2e-3) if row in table2.TABLE2_BEST else (2e-3,))
    ]
    assert fresh.rates_table(every)[0].note == "Every row as it is was tried at as many rates: 2."
    assert "at 1 to 2 rates each" in fresh.rates_table(every[1:])[0].note  # control


def test_fresh_text_shows_the_seed_that_chose_and_what_broke_off():
    runs = [r for r in COMMITTED if r.preset == "gpu-fresh" and r.method == "MHA"]
    later = dataclasses.replace(runs[0], id="later", seed=5, metrics=runs[0].metrics | {"validation_loss": 1.0})
    assert fresh.rates_table([*runs, later]) == fresh.rates_table(runs)
    left = {name: runs[0].metrics[name] for name in ("attention_parameters", "cache_per_token", "curve")}
    broken = [dataclasses.replace(r, method="MQA", id=f"{r.rate}", metrics=left | {"diverged_at": 300}) for r in runs[:2]]
    cells = row_of(fresh.rates_table([*runs, *broken])[0].body, "MQA")
    assert cells.count("diverged at step 300") == 2 and cells[-1] == "2"
