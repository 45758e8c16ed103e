"""Figure 3 where images were held out: how rates and rows are chosen, intervals over seeds and images, rules, table and figure."""

import re

import numpy as np
import pytest
from helpers import a_record, write_records

from paper_figures import __main__ as figures
from reproduce.experiments.figure3_tiny import ALL_HEADS, PRESETS
from reproduce.report import claims, findings, headline, results
from reproduce.report.judge import (
    FAILED,
    REPRODUCED,
    UNRESOLVED,
    UNTESTED,
    accuracy,
    accuracy_difference,
    over_seeds_and_images,
)
from reproduce.report.query import alike
from reproduce.store import records
from reproduce.store.bits import packed
from reproduce.store.records import Record
from reproduce.train.options import STARTS

NAME, IMAGES = "gpu-tiny-imagenet", 5000
ROWS = {row.label: row for row in PRESETS[NAME].rows}
RIVALS = ["GQA n_KV=6", "MLA shared d_c=128"]
DATA = {
    "name": "tiny.npz",
    "sha256": "0" * 64,
    "train_images": 45_000,
    "held_out_images": 5000,
    "test_images": IMAGES,
    "classes": 100,
}
TRAIN = {
    "learning_rate": 3e-4,
    "steps": 878,
    "batch_size": 512,
    "warmup_steps": 88,
    "log_every": 10,
    "precision": "bfloat16",
}
PRETRAIN = TRAIN | {"learning_rate": 1e-3, "steps": 8789}
CONFIG = {"d_model": 384, "n_heads": 12, "n_layers": 12, "pretrain": PRETRAIN, "epochs": 10}


def hits(share: float, seed: int = 0) -> str:
    """The first images are right, a few more or less with each seed."""
    return packed(np.arange(IMAGES) < round(IMAGES * share) + seed)


def curve_of(train: dict) -> list[list[float]]:
    return [[min(step, train["steps"]), 4.0, 1.0] for step in range(10, train["steps"] + 10, 10)]


def a_run(row: str, top5: float, seed: int, rate=3e-4, loss=1.0, start="hosvd", **more) -> Record:
    reached = {"top1": top5 - 0.2, "top5": top5, "validation_loss": loss, "validation_top5": top5}
    reached["hits"] = {"top1": hits(top5 - 0.2, seed), "top5": hits(top5, seed)}
    metrics = reached | {
        "converted": reached,
        "attention_parameters": 12 * ROWS[row].cost(384, 12).parameters,
        "start": f"of {seed}",
        "curve": curve_of(TRAIN),
    }
    config = {**CONFIG, "row": ROWS[row].config(), "train": TRAIN | {"learning_rate": rate}}
    config |= {} if start == "hosvd" else {"start": start}
    names = {"id": f"{row} {seed} {rate} {start}", "experiment": "figure3", "preset": NAME, "method": row + STARTS[start]}
    return a_record(**names, seed=seed, config=config, data=DATA, metrics=metrics | more, device="a card", command="a command")


def runs(accuracies: dict[str, float], seeds=range(1, 6), **more) -> list[Record]:
    """Per row one seed that chooses between two rates, of which the second is better, and those that judge."""
    found = []
    for row, top5 in accuracies.items():
        found += [a_run(row, top5, 0, rate=1e-3, loss=2.0, **more), a_run(row, top5, 0, loss=1.0, **more)]
        found += [a_run(row, top5, seed, **more) for seed in seeds]
    return found


def the_claim(words: str):
    (found,) = [claim for claim in findings.FINDINGS if words in claim.says]
    return found


@pytest.mark.parametrize("rival", RIVALS)
def test_a_tenth_may_be_at_most_one_point_below(rival):
    claim = the_claim(f"than {rival}")
    for top5, verdict in ((0.896, REPRODUCED), (0.95, REPRODUCED), (0.891, UNRESOLVED), (0.88, FAILED)):
        said, its = claim.finding(runs({rival: 0.9, "Tucker [12,20,20]": top5}))
        assert its == verdict and "5 seeds and 5,000 images, 100 classes" in said, top5
    assert claim.finding(runs({rival: 0.9, "Tucker [12,20,20]": 0.95}, seeds=range(1, 5)))[1] == UNRESOLVED  # four judge
    assert claim.finding(runs({rival: 0.9, "Tucker [12,64,64]": 0.95}))[1] == UNTESTED  # half as large
    only = [r for r in runs({rival: 0.9, "Tucker [12,20,20]": 0.95}) if r.seed == 0]
    assert claim.finding(only)[1] == UNRESOLVED  # the seed that chooses does not judge


def test_held_out_images_choose_the_row_and_the_rate_and_test_images_do_not():
    found = runs({"GQA n_KV=6": 0.9, "Tucker [12,20,20]": 0.896, "Tucker [8,24,24]": 0.7, "Tucker [8,20,20]": 0.5})
    claim = the_claim("than GQA n_KV=6")
    assert claim.rows(found) == ["Tucker [12,20,20]"] and claim.finding(found)[1] == REPRODUCED  # no interval is widened
    for r in found:
        if r.method == "Tucker [8,24,24]":
            r.metrics["validation_top5"] = 0.99
    assert claim.rows(found) == ["Tucker [8,24,24]"] and claim.finding(found)[1] == FAILED
    for r in found:  # of the seed that chooses alone
        if r.method == "Tucker [8,24,24]" and r.seed == 0:
            r.metrics["validation_top5"] = 0.1
    assert claim.rows(found) == ["Tucker [12,20,20]"]
    for r in found:
        if r.seed == 0 and r.rate == 3e-4:
            r.metrics["validation_loss"] = 3.0  # the other rate is preferred, of which no other seed was run
    assert claim.finding(found)[1] == UNRESOLVED
    lone = [
        r for r in found if r.method != "Tucker [12,20,20]" or r.seed
    ]  # without the seed that chooses one that was run does
    assert claim.rows(lone)


def test_other_starts_are_not_the_paper_s_and_judge_nothing():
    found = runs({"GQA n_KV=6": 0.9, "Tucker [12,20,20]": 0.8})
    better = runs({"Tucker [12,20,20]": 0.95}, start="moment")
    assert the_claim("than GQA n_KV=6").finding(found + better)[1] == FAILED


def test_a_row_whose_run_diverged_has_failed():
    found = runs({"GQA n_KV=6": 0.9, "Tucker [12,20,20]": 0.95})
    gone = a_run("Tucker [12,20,20]", 0.95, 9, diverged_at=7)
    assert the_claim("than GQA n_KV=6").finding([*found, gone]) == ("Tucker [12,20,20] diverged", FAILED)


# The head mode.


PAIRS = {row: whole.label for row, whole in ALL_HEADS.items()}


def test_fewer_heads_are_set_beside_all_heads_of_the_same_size():
    claim = the_claim("head-mode redundancy")
    found = runs({label: 0.9 for label in ROWS if label.startswith("Tucker")})
    assert set(claim.rows(found)) == set(PAIRS)  # [8,20,20] has no row of its size beside it
    said, verdict = claim.finding(found)
    assert verdict == REPRODUCED and all(f"beside {other.removeprefix('Tucker ')}:" in said for other in PAIRS.values())
    assert claim.others(found) == [label for label in ROWS if re.match(r"Tucker \[8,\d+,\d+\]", label)]
    assert claim.finding([])[1] == UNTESTED
    assert claim.finding(runs({"Tucker [8,24,24]": 0.9, "Tucker [12,24,24]": 0.9}))[1] == UNTESTED  # only a larger one


@pytest.mark.parametrize(("behind", "verdict"), [(0.004, REPRODUCED), (0.009, UNRESOLVED), (0.03, FAILED), (-0.05, REPRODUCED)])
def test_the_head_mode_has_room_where_every_size_says_so(behind, verdict):
    accuracies = {row: 0.9 for pair in PAIRS.items() for row in pair}
    assert the_claim("head-mode redundancy").finding(runs(accuracies | {"Tucker [8,32,32]": 0.9 - behind}))[1] == verdict


# Intervals.


def test_an_interval_knows_of_seeds_and_images():
    rng = np.random.default_rng(0)
    for of_seeds, of_images in ((0.0, 0.2), (0.02, 0.0), (0.01, 0.2)):
        held, trials = 0, 400
        for _ in range(trials):
            noise = rng.normal(0, of_seeds, (5, 1)) + rng.normal(0, of_images, (1, 400)) + rng.normal(0, 0.1, (5, 400))
            estimate = over_seeds_and_images(noise)
            held += estimate.low <= 0 <= estimate.high
        assert held >= 0.93 * trials, (of_seeds, of_images)
    alone = [
        (v := rng.normal(0, 0.2, (1, 400)) + rng.normal(0, 0.1, (5, 400))).mean() / (v.mean(1).std(ddof=1) / 5**0.5)
        for _ in range(200)
    ]
    assert np.mean(np.abs(alone) <= 2.776) < 0.6  # control: Student's interval between seeds knows nothing of the images


def test_the_interval_by_hand():
    values = np.array([[1.0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 1]])
    estimate = over_seeds_and_images(values, seeds=3)
    of_seeds, of_images = values.mean(1).var(ddof=1) / 3, values.mean(0).var(ddof=1) / 4
    half = (4.302653**2 * of_seeds + 3.182446**2 * of_images) ** 0.5  # Student's at 2 and 3 degrees of freedom
    assert (estimate.value, estimate.high - estimate.low) == pytest.approx((values.mean(), 2 * half))
    assert over_seeds_and_images(values) is None  # three seeds are too few to judge
    still = over_seeds_and_images(np.ones((5, 10)))
    assert still.low == still.value == still.high == 1
    wider = over_seeds_and_images(values, 8, seeds=3)
    assert wider.high - wider.low > 1.5 * (estimate.high - estimate.low)


def test_differences_are_paired_by_seed_and_image():
    own, other = (runs({row: top5}) for row, top5 in (("MHA", 0.9), ("MQA", 0.88)))
    judges = [[r for r in group if r.seed] for group in (own, other)]
    estimate = accuracy_difference(*judges, "top5")
    assert estimate.value == pytest.approx(0.02) and 0.01 < estimate.low < estimate.high < 0.03
    apart = [accuracy(group, "top5") for group in judges]  # control: the images that both are right about make no noise
    assert all(e.high - e.low > 1.5 * (estimate.high - estimate.low) for e in apart)
    assert accuracy_difference(*judges, "top5", converted=True).value == pytest.approx(0.02)
    assert accuracy_difference(judges[0], judges[1][:4], "top5") is None and accuracy_difference([], judges[1], "top5") is None
    assert accuracy(judges[0][:1], "top5") is None
    for r in judges[1]:
        del r.metrics["hits"]  # as older records are
    older = accuracy_difference(*judges, "top5")
    assert older.over == "5 seeds" and accuracy(judges[1], "top5") is None
    for r in judges[1]:
        r.metrics["converted"] = {"top5": 0.5}
    assert accuracy_difference(*judges, "top5", converted=True) is None


# The table and the figure.


@pytest.fixture
def study() -> list[Record]:
    """All rows, one of which diverged, one with a single seed; and two rows with another start."""
    found = runs({label: 0.9 - 0.01 * n for n, label in enumerate(ROWS) if label != "Tucker [8,16,16]"})
    found += [a_run("Tucker [8,16,16]", 0.6, 0), a_run("Tucker [12,16,16]", 0.9, 7, diverged_at=12)]
    found += runs({"GQA n_KV=6": 0.91, "Tucker [12,20,20]": 0.8}, start="moment")
    pretrained = {name: value for name, value in CONFIG.items() if name != "epochs"}
    first = a_run("MHA", 0.9, 0).metrics | {"curve": curve_of(PRETRAIN)}
    return [
        *found,
        a_record(experiment="figure3", preset=NAME, method="MHA pretrained", config=pretrained, data=DATA, metrics=first),
    ]


def test_the_table_shows_chosen_rates_intervals_and_differences(study):
    drawn = results.render(study, ["figure3"])
    first = drawn.split("**Figure 3 as a table")[1]  # of two
    lines = {line.split(" | ")[0].strip("| "): line for line in first.splitlines() if line.startswith("|")}
    assert re.search(r"\| MHA \| 0.0003 \| 7,077,888 \| 90.\d \[8\d.\d, 90.\d\] \| 90.\d \[[\d., ]+\] \|  \|", drawn)
    assert re.search(r"\| −1.0 \[−1.\d, −0.\d\] \|", lines["GQA n_KV=6"])
    assert "diverged at step 12" in lines["Tucker [12,16,16]"] and lines["Tucker [8,16,16]"].endswith(
        "| 60.0 | 60.0 |  | 40.0 |  |"
    )
    assert "REDUCED SCALE" in drawn and "Seeds that judge: 5, 6, 1." in drawn and "for 10 epochs" in drawn
    assert "rows start from the HOSVD or SVD that knows the second moment" in drawn
    assert drawn.count("**Figure 3 as a table") == 2 and "made again" not in drawn
    assert re.findall(r"Not run yet: .*", drawn) == ["Not run yet: 28 of 30 rows."]  # with the other start; control: the first
    names = [table.name for table in results.tables(study)["figure3"]]
    assert names == [f"Figure 3, {NAME}", f"Figure 3, {NAME}, moment"]
    assert results.tables([r for r in study if not r.is_trained]) == {}  # the start alone is no table


def test_a_start_that_was_made_again_is_said(study):
    study[3].metrics["start"] = "another"
    assert f"Of seed {study[3].seed} the pretrained model was made again" in results.render(study, ["figure3"])


def test_without_multi_head_attention_no_difference_is_shown(study):
    drawn = results.render([r for r in study if r.method != "MHA"], ["figure3"])
    assert "| GQA n_KV=6 |" in drawn and "−" not in drawn.split("From:")[0].replace("minus", "")


def test_runs_of_other_settings_have_a_table_of_their_own(study):
    other = a_run("MHA", 0.9, 1)
    other.config["pretrain"] = PRETRAIN | {"learning_rate": 2e-3}
    assert results.render([*study, other], ["figure3"]).count("**Figure 3 as a table") == 3


@pytest.mark.no_cover
@pytest.mark.parametrize("without", ["", "MHA pretrained", "Tucker [12,20,20]"])
def test_the_figure_is_drawn(study, without, tmp_path, monkeypatch):
    named = [type(r)(**vars(r) | {"id": f"{number:016}"}) for number, r in enumerate(study) if r.method != without]
    write_records(tmp_path / "records", named)
    monkeypatch.setattr("sys.argv", ["paper_figures", "--records", str(tmp_path / "records"), "--out", str(tmp_path / "drawn")])
    assert figures.main() == 0
    assert (tmp_path / "drawn" / f"accuracy_against_parameters_{NAME}.png").stat().st_size > 10_000


@pytest.mark.no_cover
def test_the_claims_page_judges_them(study):
    page = claims.render(study)
    assert "- **heads**. " in page and "of a ViT" in page and len(alike([r for r in study if r.is_trained], any_rate=True)) == 2


def test_the_first_page_says_top_5_where_images_were_held_out(study):
    committed = [r for r in records.load(records.COMMITTED) if r.preset != NAME]
    said = lambda found: next(line for line in headline.six_verdicts(found).splitlines() if "a ViT's" in line)  # noqa: E731
    assert re.search(r"a ViT's \[top-1\]\(\S+\) \d\.\d points below \(10 classes\)\.", said(committed))
    best = findings.of_a_tenth("GQA n_KV=6")(study)
    behind = 100 * (0.9 - 0.01 - (0.9 - 0.01 * list(ROWS).index(best[0])))
    finished = [r for r in study if r.method != "Tucker [8,16,16]"]
    assert re.search(rf"a ViT's \[top-5\]\(\S+\) {behind:.1f} points below \(100 classes\)\.$", said(committed + finished))
    assert said(committed + study) == said(committed)  # a row has one seed yet: the study judges nothing
    better = runs({"GQA n_KV=6": 0.8, "Tucker [12,20,20]": 0.85})
    assert re.search(r"a ViT's \[top-5\]\(\S+\) 5.0 points above \(100 classes\)\.$", said(committed + better))
    alone = runs({"Tucker [12,20,20]": 0.85})  # no rival to be set beside
    assert "top-1" in said(committed + alone)
