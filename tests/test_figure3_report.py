"""Figure 3 where images were held out: how rates and rows are chosen, intervals over seeds and images, rules, table and figure."""

import re

import numpy as np
import pytest
from helpers import a_record, committed_records, write_records

from paper_figures import __main__ as figures
from reproduce.experiments.figure3_tiny import ALL_HEADS, PRESETS
from reproduce.report import claims, findings, headline, pages, results, vision_pairs
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
from reproduce.store.bits import packed, unpacked
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
    """Per row one seed that chooses between two rates, the first better by loss and the second by top-5, and those that judge."""
    found = []
    for row, top5 in accuracies.items():
        found += [a_run(row, top5, 0, rate=1e-3, loss=0.5, validation_top5=top5 - 0.001, **more), a_run(row, top5, 0, **more)]
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
        if r.method == "Tucker [8,24,24]" and r.rate == 3e-4:
            r.metrics["validation_top5"] = 0.99
    assert claim.rows(found) == ["Tucker [8,24,24]"] and claim.finding(found)[1] == FAILED
    for r in found:  # of the seed that chooses alone
        if r.method == "Tucker [8,24,24]" and r.seed == 0:
            r.metrics["validation_top5"] = 0.1
    assert claim.rows(found) == ["Tucker [12,20,20]"]
    chose = [r for r in found if r.seed == 0 and r.rate == 3e-4]
    for r in chose:
        r.metrics["validation_loss"] = 3.0  # control: the loss has no say
    assert claim.finding(found)[1] == REPRODUCED
    for r in chose:
        r.metrics["validation_top5"] -= 0.1  # the other rate is preferred, of which no other seed was run
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
    first = drawn.split("**Other starts")[0]
    lines = {line.split(" | ")[0].strip("| "): line for line in first.splitlines() if line.startswith("|")}
    assert re.search(r"\| MHA \| 0.0003 \| 7,077,888 \| 90.\d \[8\d.\d, 90.\d\] \| 90.\d \[[\d., ]+\] \|  \|", drawn)
    assert re.search(r"\| −1.0 \[−1.\d, −0.\d\] \|", lines["GQA n_KV=6"])
    assert "diverged at step 12" in lines["Tucker [12,16,16]"] and lines["Tucker [8,16,16]"].endswith(
        "| 60.0 | 60.0 |  | 40.0 |  |"
    )
    assert "REDUCED SCALE" in drawn and "Seeds that judge: 5, 6, 1." in drawn and "for 10 epochs" in drawn
    assert "rows start from the HOSVD of their layers' weights" in drawn
    assert drawn.count("**Figure 3 as a table") == 1 and "made again" not in drawn and "Not run yet" not in drawn
    few = results.render([r for r in study if r.method in ("MHA", "MQA")], ["figure3"])
    assert re.findall(r"Not run yet: .*", few) == ["Not run yet: 29 of 31 rows."]
    names = [table.name for table in results.tables(study)["figure3"]]
    assert names == [f"Figure 3, {NAME}", vision_pairs.ANEW, vision_pairs.UNEQUAL]
    assert results.tables([r for r in study if not r.is_trained]) == {}  # the start alone is no table


def test_the_tables_show_the_rate_that_held_out_top_5_chose(study):
    row = "Tucker [12,20,20]"
    tried = {r.rate: r for r in study if (r.method, r.seed) == (row, 0)}
    assert f"| {row} | 0.0003 |" in results.render(study, ["figure3"])  # by loss it would be 0.001
    moment = "Tucker [12,20,20], start by second moments"
    assert f"| {moment} | {row} | 0.0003 |" in parts(study)[vision_pairs.ANEW]
    tried[1e-3].metrics["validation_top5"] = tried[3e-4].metrics["validation_top5"]  # of equals the lower loss
    drawn = results.render(study, ["figure3"])
    assert (
        f"| {row} | 0.001 |" in drawn
        and "| MHA | 0.0003 |" in drawn
        and "Every rate was chosen by top-5 on training images" in drawn
    )
    assert f"| {moment} | {row} | 0.0003, 0.001 |" in parts(study)[vision_pairs.ANEW]
    tried[1e-3].metrics["validation_loss"] = tried[3e-4].metrics["validation_loss"]  # of these the lower rate
    assert f"| {row} | 0.0003 |" in results.render(study, ["figure3"])


def test_a_start_that_was_made_again_is_said(study):
    study[3].metrics["start"] = "another"
    assert f"Of seed {study[3].seed} the pretrained model was made again" in results.render(study, ["figure3"])


def test_without_multi_head_attention_no_difference_is_shown(study):
    drawn = results.render([r for r in study if r.method != "MHA"], ["figure3"])
    assert "| GQA n_KV=6 |" in drawn and "−" not in drawn.split("From:")[0].replace("minus", "")


# Other starts, and unequal ranks.


STARTED = PRESETS[NAME].started_anew
ALL_STARTED = dict.fromkeys(STARTED["moment"], 0.8)


def parts(found: list[Record]) -> dict[str, str]:
    return pages.texts_of([vision_pairs.ANEW, vision_pairs.UNEQUAL], found)


def test_before_there_are_records_the_page_says_so():
    for found in ([], runs(ALL_STARTED), runs({"Tucker [12,20,20]": 0.8}, start="hooi")):  # of one side alone
        assert parts(found) == dict.fromkeys((vision_pairs.ANEW, vision_pairs.UNEQUAL), pages.NONE_YET)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((0.02, 0.02, 0.02), "**helps** (of 3 rows 3 above, 0 below)"),
        ((0.02, 0.0, 0.0), "**helps** (of 3 rows 1 above, 0 below)"),
        ((0.0, -0.02, 0.0), "**harms** (of 3 rows 0 above, 1 below)"),
        ((0.02, -0.02, 0.0), "**depends on the row** (of 3 rows 1 above, 1 below)"),
        ((0.0, 0.0, 0.0), "**changes nothing**, within a point"),
        ((None, 0.0, 0.0), "open, since 2 of 3 rows have their 5 seeds"),
    ],
)
def test_a_start_is_judged_by_all_its_rows(gains, said):
    found = runs(ALL_STARTED)
    for row, gain in zip(STARTED["hooi"], gains):
        found += runs({row: 0.8 + (gain or 0)}, start="hooi", seeds=range(1, 5 if gain is None else 6))
    shown = parts(found)[vision_pairs.ANEW]
    assert f"- To start from HOOI, the HOSVD refitted: {said}." in shown and "second moment" not in shown
    assert shown.count(", start by HOOI | Tucker [") == 3 and parts(found)[vision_pairs.UNEQUAL] == pages.NONE_YET


def test_a_row_that_is_neither_told_apart_nor_level_leaves_the_start_open():
    found = runs(ALL_STARTED) + runs(dict.fromkeys(STARTED["hooi"], 0.8), start="hooi")
    for r in found:
        if (r.method, r.seed) == ("Tucker [8,32,32], start by HOOI", 1):
            r.metrics["hits"] = r.metrics["hits"] | {"top5": hits(0.9)}  # one seed is far from the others
    shown = parts(found)[vision_pairs.ANEW]
    assert "HOSVD refitted: not resolved." in shown and "| not resolved |" in shown


@pytest.mark.parametrize(("gone", "said"), [("hooi", "**harms** (of 3 rows 0 above, 1 below)"), ("hosvd", "not resolved")])
def test_a_row_that_diverged_is_below(gone, said):
    found = runs(ALL_STARTED) + runs(dict.fromkeys(STARTED["hooi"], 0.8), start="hooi")
    found.append(a_run("Tucker [8,20,20]", 0.9, 9, start=gone, diverged_at=7))
    shown = parts(found)[vision_pairs.ANEW]
    assert f"HOSVD refitted: {said}." in shown and ("diverged at step 7" in shown) == (gone == "hooi")


def test_pairs_are_shown_before_and_after_with_intervals_that_hold_together():
    found = runs(ALL_STARTED) + [r for row in ALL_STARTED for r in runs({row: 0.82}, start="moment")]
    rng = np.random.default_rng(0)
    for r in found:  # so that intervals have a width
        for name in ("top1", "top5"):
            flipped = unpacked(r.metrics["hits"][name], IMAGES) ^ (rng.random(IMAGES) < 0.05)
            r.metrics["hits"] = r.metrics["hits"] | {name: packed(flipped)}
            r.metrics["converted"] = r.metrics["converted"] | {"hits": r.metrics["hits"]}
    shown = parts(found)[vision_pairs.ANEW]
    assert "knows the second moment of the layers' inputs: **helps** (of 5 rows 5 above, 0 below)." in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("| GQA n_KV=3, start by second moments |")]
    cells = line.strip("| ").split(" | ")
    assert cells[1:3] == ["GQA n_KV=3", "0.0003"] and cells[7] == "above" and len(cells) == len(vision_pairs.HEADER)
    own, other = ([r for r in found if r.method == row and r.seed] for row in (cells[0], "GQA n_KV=3"))
    for cell, (name, converted) in zip(cells[4::2][:2] + cells[9:], (("top5", True), ("top5", False), ("top1", False))):
        wide, narrow = (accuracy_difference(own, other, name, tries, converted=converted) for tries in (5, 1))
        assert cell == f"+{100 * wide.value:.1f} [+{100 * wide.low:.1f}, +{100 * wide.high:.1f}]"
        assert wide.high > narrow.high  # control


def test_unequal_ranks_stand_beside_equal_ones():
    partner = PRESETS[NAME].of_equal_ranks()
    accuracies = {label: 0.8 for label in [*partner, *partner.values()]}
    assert "To make ranks unequal: **changes nothing**, within a point." in parts(runs(accuracies))[vision_pairs.UNEQUAL]
    better = accuracies | {row: 0.84 for row in list(partner)[:4]} | {list(partner)[5]: 0.7}
    shown = parts(runs(better))[vision_pairs.UNEQUAL]
    assert "**depends on the row** (of 10 rows 4 above, 1 below)." in shown and shown.count("\n| Tucker [") == 10
    assert "| Tucker [8,16,32 / 8,48,32] | Tucker [8,32,32] | 0.0003 |" in shown
    one = {row: accuracies[row] for row in ("Tucker [8,16,32 / 8,48,32]", "Tucker [8,32,32]")}
    assert "To make ranks unequal: open, since 1 of 10 rows have their 5 seeds." in parts(runs(one))[vision_pairs.UNEQUAL]
    chooser = [r for r in runs(one) if r.seed == 0]
    assert "open, since 0 of 10 rows" in parts(chooser)[vision_pairs.UNEQUAL]


def test_pairs_that_did_not_start_from_the_same_weights_say_so():
    found = runs({"Tucker [12,20,20]": 0.8}) + runs({"Tucker [12,20,20]": 0.8}, start="hooi")
    assert "made again" not in parts(found)[vision_pairs.ANEW]
    for r in found:
        if r.seed == 3 and "start" in r.config:
            r.metrics["start"] = "another"
    assert "Of seed 3 the pretrained model was made again" in parts(found)[vision_pairs.ANEW]


def test_runs_of_other_settings_have_a_table_of_their_own(study):
    other = a_run("MHA", 0.9, 1)
    other.config["pretrain"] = PRETRAIN | {"learning_rate": 2e-3}
    assert results.render([*study, other], ["figure3"]).count("**Figure 3 as a table") == 2


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
    committed = [r for r in committed_records() if r.preset != NAME]
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
