"""Tables, claims and figures come from records and from nothing else."""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import a_record, committed_records, nudged

from reproduce.report import checks, claims, compression, language, query, results, words
from reproduce.report.judge import FAILED, REPRODUCED, UNTESTED, VERDICTS
from reproduce.store import records
from reproduce.store.files import code_hash

ROOT = Path(__file__).parent.parent
COMMITTED = committed_records()


def smoke_run(experiment="table2", **changes) -> records.Record:
    """A copy of the first committed one, with another train setting or field."""
    run = copy.deepcopy(next(r for r in COMMITTED if (r.experiment, r.preset) == (experiment, "smoke")))
    train = {name: value for name, value in changes.items() if name in run.config.get("train", {})}
    if train:
        run.config["train"] |= train
    return dataclasses.replace(run, **{name: value for name, value in changes.items() if name not in train})


def test_runs_of_one_row_in_two_configurations_stand_in_two_tables():
    run, seed, steps, rate = smoke_run(), smoke_run(seed=1), smoke_run(steps=7), smoke_run(learning_rate=0.77)
    text = smoke_run(data=run.data | {"name": "novel.txt", "sha256": "0123456789abcdef" * 4})
    assert query.alike([run, text, steps, seed, rate]) == [[run, seed, rate], [text], [steps]]
    assert query.largest(query.alike([run, steps, seed])) == [run, seed] and query.largest([]) == []
    assert query.largest([[run], [steps]]) == [steps]  # the last of equals
    groups = query.by_row([run, seed, rate])
    assert {label: len(group) for label, group in groups.items()} == {"MHA": 2, "MHA, rate 0.77": 1}
    drawn = results.render([run, text, steps])
    assert drawn.count("| MHA ") == 3 and " 7 steps of " in drawn and "novel.txt (content sha256 0123456789ab…)" in drawn
    assert all(len(line) < 500 for line in drawn.splitlines())


def test_a_pretrained_model_stands_with_all_that_was_made_of_it():
    found = [r for r in COMMITTED if (r.experiment, r.preset) == ("figure3", "smoke")]
    start, made = (next(r for r in found if r.is_trained == trained) for trained in (False, True))
    other = copy.deepcopy(made)
    other.config["train"]["steps"] = 7
    assert query.alike([start, made, other]) == [[start, made], [start, other]]
    stranger = copy.deepcopy(start)
    stranger.config["pretrain"]["steps"] = 7
    assert query.alike([stranger, made]) == [[made], [stranger]]  # control
    plainer = copy.deepcopy(made)
    del plainer.config["epochs"]
    assert query.alike([made, plainer]) == [[made], [plainer]]  # what was trained stands with its like alone
    drawn = results.render([start, made, other])
    assert "fine-tuned for 3 epochs" in drawn and "fine-tuned for 7 steps at REDUCED BUDGET, 0.31 epochs" in drawn
    assert results.render([start]) == ""  # nothing is fine-tuned yet


def test_a_fine_tuning_that_diverged_is_a_row():
    found = [r for r in COMMITTED if (r.experiment, r.preset) == ("figure3", "smoke")][:3]
    left = {name: found[1].metrics[name] for name in ("converted", "attention_parameters")}
    broken = dataclasses.replace(found[1], metrics=left | {"diverged_at": 9})
    row = next(line for line in results.render([found[0], broken, found[2]]).splitlines() if line.startswith("| MHA |"))
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["diverged at step 9", "—"]


def test_a_row_of_which_one_seed_diverged_is_not_told_by_the_others():
    for experiment, lost, hidden in (("table2", "validation_loss", "bits_per_byte"), ("figure3", "top1", "top5")):
        whole = [r for r in COMMITTED if (r.experiment, r.preset) == (experiment, "smoke") and r.is_trained]
        row = whole[0].method
        left = {name: value for name, value in whole[0].metrics.items() if name not in (lost, hidden)}
        broken = dataclasses.replace(whole[0], seed=7, metrics=left | {"diverged_at": 9})
        line, before = (
            next(line for line in results.render(found).splitlines() if line.startswith(f"| {row} "))
            for found in ([*whole, broken], whole)
        )
        assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["diverged at step 9", "—"]
        assert "diverged" not in before and "—" not in before  # control


def test_figures_leave_out_settings_of_which_one_seed_diverged():
    whole = [r for r in COMMITTED if (r.experiment, r.preset) == ("table2", "smoke")]
    broken = dataclasses.replace(whole[0], seed=7, metrics={"diverged_at": 9})
    assert query.unbroken([*whole, broken]) == whole[1:] and query.unbroken(whole) == whole
    other = dataclasses.replace(broken, config=broken.config | {"context": 1})
    assert query.unbroken([*whole, other]) == whole  # control: of another setting


@pytest.mark.parametrize("experiment, width, steps", [("table2", 768, 600_000), ("table3", 2048, 100_000)])
def test_the_paper_s_own_scale_is_not_called_reduced(experiment, width, steps):
    run = smoke_run(experiment, preset="paper", steps=steps)
    run.config.update(d_model=width)
    drawn = results.render([run])
    assert "at the paper's shape: validation loss after " in drawn and "REDUCED" not in drawn and "narrowed" not in drawn
    run.config["train"]["steps"] = 5
    drawn = results.render([run])
    assert "shape, REDUCED BUDGET: validation loss" in drawn and re.search(f"5 steps of .* in place of {steps:,}\\.", drawn)


def test_the_paper_s_vision_transformers_have_a_table():
    run = smoke_run(
        "figure3", preset="paper", method="MHA, vit", data={"name": "photographs", "sha256": "0" * 64} | SOME_IMAGES
    )
    train = {"steps": 20, "batch_size": 5, "learning_rate": 1e-3}
    config = {"model": "vit", "image_size": 224, "epochs": 10, "row": {}, "train": train}
    drawn = results.render([dataclasses.replace(run, config=config)])
    assert (
        "**Figure 3 as a table: vit, pretrained by others, converted, and on 10 images of photographs fine-tuned for 10 epochs"
        in drawn
    )
    assert "REDUCED" not in drawn and "| MHA, vit |" in drawn


SOME_IMAGES = {"train_images": 10, "test_images": 4}


def test_one_experiment_s_tables_can_be_had_alone():
    alone = results.render(COMMITTED, ["table2"])
    assert alone.startswith("### Table 2: GPT-2\n") and alone.count("\n### ") == 0 and alone in results.render(COMMITTED)
    assert "From: runs 1; devices " in alone  # without the page of provenance beside it


def test_ablations_at_smoke_scale_are_shown_as_too_short():
    run = dataclasses.replace(smoke_run(), experiment="ablations", method="Tucker [8,128,128], init xavier")
    drawn = results.render([run])
    assert "REDUCED SCALE" in drawn and "too short to tell" in drawn and "| Tucker [8,128,128], init xavier |" in drawn


def test_a_changed_tree_is_said_with_its_commit():
    commit = "0123456789" * 4
    said = [words.commit_of(a_record(commit=known)) for known in (commit, "unknown", commit + "+changes")]
    assert said == ["0123456789", "unknown", "0123456789+changes"]


def test_every_trained_row_of_table_2_is_there():
    trained = {r.method for r in COMMITTED if r.experiment == "table2" and r.preset == "smoke"}
    assert {"MHA", "GQA n_KV=4", "GQA n_KV=2", "MLA shared d_c=128"} < trained
    assert sum(label.startswith("Tucker") for label in trained) == 3


def test_the_note_on_compression_counts_where_knowing_the_inputs_paid():
    ways = {"aware": {"inputs": [0.1, 0.3], "loss": 3.0}, "plain": {"inputs": [0.2, 0.2], "loss": 3.1}}
    record = a_record(method="row", metrics={"ways": ways}, device="a device", command="a command")
    lost = "Knowing the inputs lowered the error of logits in 1 of 1 rows. It lowered the error of outputs in 0 of 1 rows."
    missed = " It did not lower: error of outputs of row."
    assert compression.compress_note([record]) == f"{lost} It lowered the loss in 1 of 1 rows.{missed}"
    del ways["plain"]["loss"]  # of images, for example
    assert compression.compress_note([record]) == lost + missed


def test_reduced_scale_is_said_in_the_table_itself():
    rendered = results.render(COMMITTED)
    titles = re.findall(r"\*\*(?:Table [23], [^*\n]*validation loss|Figure 3)[^\n]*", rendered)
    trained = {(r.experiment, r.preset) for r in COMMITTED if r.experiment in ("table2", "table3", "figure3")}
    assert len(titles) == sum(preset in ("smoke", "gpu", "gpu-tiny-imagenet") for _, preset in trained)
    for title in titles:
        assert (
            "REDUCED BUDGET" if "at the paper's shape" in title else "REDUCED SCALE"
        ) in title and "not available to us" in title


def verdict_of(judged, where):
    found = [verdict for claim, _, verdict in judged if claim.where == where]
    assert len(found) == 1, where
    return found[0]


def test_every_size_cell_has_a_verdict_and_the_slips_fail():
    judged = claims.verdicts(COMMITTED)
    assert {verdict for *_, verdict in judged} <= set(VERDICTS)
    sizes = [(c, v) for c, _, v in judged if c.where.startswith("Table")]
    assert len([c for c, _ in sizes if c.where.startswith("Table 2")]) == 14
    assert len([c for c, _ in sizes if c.where.startswith("Table 3")]) == 7
    assert UNTESTED not in {v for _, v in sizes}
    assert {c.where for c, v in sizes if v == FAILED} == {
        "Table 2, GQA n_KV=4, KV cache MB",
        "Table 3, MLA d_c=128, size",
    }


@pytest.mark.parametrize(("paper", "verdict"), [(92.3, REPRODUCED), (88.1, REPRODUCED), (93.3, FAILED)])
def test_a_row_that_can_be_read_in_two_ways_is_one_claim_and_one_way_is_enough(paper, verdict):
    changed = copy.deepcopy(COMMITTED)
    for record in changed:
        if (record.experiment, record.preset) == ("table3", "sizes"):
            for row in record.metrics["rows"]:
                row["paper"] = {"size": paper} if row["label"].startswith("MLA") else row["paper"]
    judged = claims.verdicts(changed)
    assert verdict_of(judged, "Table 3, MLA d_c=128, size") == verdict
    (said,) = [said for claim, said, _ in judged if claim.where == "Table 3, MLA d_c=128, size"]
    assert said.startswith("separated 92.27 (") and ", shared 88.08 (" in said


def test_claims_can_fail():
    changed = copy.deepcopy(COMMITTED)
    for record in changed:
        if record.preset == "sizes":
            for row in record.metrics["rows"]:
                row["parameters"] = int(row["parameters"] * (1.01 if row["label"] != "MHA" else 1.2))
    judged = claims.verdicts(changed)
    assert verdict_of(judged, "Table 2, MHA, attention MB") == FAILED
    assert verdict_of(judged, "Table 3, Tucker [32,64,64], size") == FAILED
    assert verdict_of(judged, "Table 1, MHA, parameters") == FAILED
    assert sum(v == FAILED for *_, v in judged) > 20


def test_without_records_nothing_is_claimed():
    assert {verdict for *_, verdict in claims.verdicts([])} == {UNTESTED}


def test_a_run_that_diverged_is_a_row_and_hides_no_other():
    runs = [r for r in COMMITTED if (r.experiment, r.preset) == ("table2", "smoke")]
    left = {name: runs[0].metrics[name] for name in ("attention_parameters", "cache_per_token", "curve")}
    broken = dataclasses.replace(runs[0], metrics=left | {"diverged_at": 7})
    table, whole = (language.loss_tables("table2", found)[0].body.splitlines() for found in ([broken, *runs[1:]], runs))
    assert "diverged at step 7" in table[2] and table[3:] == whole[3:]


def test_the_library_imports_with_numpy_and_torch_alone():
    """In a process where every other dependency of this project is missing."""
    extras = [
        "matplotlib",
        "tqdm",
        "tokenizers",
        "sklearn",
        "safetensors",
        "jupyter",
        "pytest",
        "hypothesis",
        "tensorly",
        "transformers",
        "scipy",
    ]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import tucker_ref, torch; "
        "print(tucker_ref.TuckerAttention(12, 3, (2, 4, 5))(torch.ones(1, 4, 12)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 4, 12])" in result.stdout


@pytest.mark.no_cover
def test_the_tables_of_claims_have_a_line_for_each():
    drawn = claims.render(COMMITTED)
    tables = [
        claims.table(COMMITTED, *kinds)
        for kinds in (("findings",), ("exact statements",), ("exact statements of ours",), ("sizes",))
    ]
    assert all(table in drawn for table in tables)
    assert sum(table.count("\n| ") for table in tables) == len(claims.verdicts(COMMITTED))


CHECKS = {
    "mutation": dict(mutants=50, mypy=3, timeouts=1, equivalent=5, survived=1, lot=dict(drawn=2, noticed=1), source="0"),
    "fuzz": dict(inputs=1000, tried={"a": 600, "b": 400}, public_names={"x": 2}, failed=[]),
    "hostile": dict(kinds={"shape": 30, "mask": 12}, skipped=0, records=dict(tried=1500, drawn=9)),
    "survival": {
        "table2": dict(kills=4, full_disks=2, interrupts=1, ends=2, files=9),
        "two writers": dict(kills=3, full_disks=0, interrupts=0, ends=1, files=5),
    },
    "coverage": {
        "tucker_ref": dict(lines=100, covered_lines=99, branches=50, covered_branches=45, left_out=7),
        "reproduce": dict(lines=200, covered_lines=190, branches=20, covered_branches=19, left_out=1),
    },
    "versions": dict(passed=60, failed=0, skipped=2, library="wheel"),
}
METHODS = {"mutation": "gqa"}  # a module
CHECK_RECORDS = [
    records.new_record(name, "tests", METHODS.get(name, f"method of {name}"), {}, metrics) for name, metrics in CHECKS.items()
]


def test_every_check_on_record_has_one_line():
    lines = checks.render(CHECK_RECORDS).splitlines()
    assert len(lines) == 2 + len(CHECKS)
    for line, expected in zip(
        lines[2:],
        (
            "50 mutants of 1 modules | tests met 47 and noticed 41; 5 change nothing, 1 survive; types alone rejected 3; "
            "of 2 of these, drawn by lot, tests noticed 1; stale records: 1, modules without one: ",
            "1,000 random inputs for 2 contracts of 1 public names | 0 contracts broken",
            "42 inputs of 2 kinds, most often shape (30), mask (12); 1,500 records with one leaf changed |",
            "7 times kill -9, 2 times a full disk, 1 times Ctrl-C, in 2 ways to write: table2, two writers | "
            "none of 14 files read afterwards damaged; all 3 runs",
            "`tucker_ref`: 99.0% of lines, 90.0% of branches; `reproduce`: 95.0% of lines, 95.0% of branches; 8 lines",
            "combinations of Python, torch and NumPy: 1 | 60 passed, 0 failed",
        ),
    ):
        assert expected in re.sub(" +", " ", line)
    assert checks.render([]) == "" and len(checks.render(CHECK_RECORDS[2:3]).splitlines()) == 3
    assert checks.versions_table(CHECK_RECORDS).splitlines()[2:] == ["| method of versions | 60 | 0 |"]
    assert checks.versions_table([]) == ""


def test_a_changed_record_changes_its_check():
    """Control: no number is remembered."""
    changed = [dataclasses.replace(record, metrics=nudged(record.metrics)) for record in CHECK_RECORDS]
    before, after = (checks.render(r).splitlines()[2:] for r in (CHECK_RECORDS, changed))
    assert len(before) == len(after) and all(a != b for a, b in zip(before, after))


def test_mutation_says_what_is_stale_and_what_was_never_tried():
    (record,) = (r for r in CHECK_RECORDS if r.experiment == "mutation")
    row = "| gqa | 50 | 47 | 41 | 5 | 1 | 3 | 2 | 1 |"
    assert checks.stale([record]) == ["gqa"] and f"{row} stale |" in re.sub(" +", " ", checks.mutants_table([record]))
    now = dataclasses.replace(record, metrics=record.metrics | {"source": code_hash(checks.module_path("gqa"))})
    assert checks.stale([now]) == [] and f"{row} of this code |" in re.sub(" +", " ", checks.mutants_table([now]))
    assert checks.stale([dataclasses.replace(now, method="no_such_module")]) == ["no_such_module"]
    before = dataclasses.replace(now, metrics={name: n for name, n in now.metrics.items() if name not in ("source", "lot")})
    assert checks.stale([before]) == ["gqa"] and "of 0 of these" in checks.mutants([before])[1]
    left = checks.untried([now])
    assert "gqa" not in left and {"attend", "kernels/decode"} <= set(left) and "__init__" not in left
    assert all(re.search(rf"\| {name} +\|.*\| +none \|", checks.mutants_table([now])) for name in left)
    assert checks.untried([dataclasses.replace(now, method=name) for name in ["gqa", *left]]) == []
    assert checks.mutants_table([]) == ""


def test_an_error_of_ours_stays_one():
    """What a user's records lack is said where they are read (store/schema.py); what is asked for beyond that is our fault."""
    with pytest.raises(KeyError, match="kills"):
        checks.render([dataclasses.replace(CHECK_RECORDS[3], metrics={"training": {}})])
