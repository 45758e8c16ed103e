"""How differences become words and verdicts: intervals that cover, words that need them, and noise that helps no claim."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from helpers import a_record
from scipy import stats

from reproduce.report import judge
from reproduce.report.judge import (
    ABOVE,
    BELOW,
    FAILED,
    LEVEL,
    MARGIN,
    REPRODUCED,
    UNRESOLVED,
    UNTESTED,
    Estimate,
    at_their_best,
    between_seeds,
    broken,
    loss_difference,
    metric_difference,
    over_articles,
    together,
)  # fmt: skip

# Words and verdicts.


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.02, 0.04, ABOVE),
        (-0.04, -0.02, BELOW),
        (0.001, 0.003, ABOVE),  # small, but not zero
        (-0.002, 0.003, LEVEL),
        (-MARGIN, MARGIN, LEVEL),
        (-0.002, 0.011, UNRESOLVED),
        (-0.011, 0.002, UNRESOLVED),
        (-1, 1, UNRESOLVED),
    ],
)
def test_a_word_needs_an_interval_that_says_it(low, high, word):
    estimate = Estimate((low + high) / 2, low, high, "")
    assert estimate.word == estimate.word_within(judge.MARGIN) == word


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.01, REPRODUCED),
        (-5, -4, REPRODUCED),
        (0.011, 0.02, FAILED),
        (0.009, 0.011, UNRESOLVED),
        (-1, 1, UNRESOLVED),
    ],
)
def test_a_claim_needs_an_interval_that_lies_on_one_side_of_its_limit(low, high, verdict):
    assert Estimate(0, low, high, "").verdict(-np.inf, 0.01) == verdict


def test_a_range_is_left_on_both_sides():
    said = [Estimate(0, low, high, "").verdict(1, 3) for low, high in ((1, 3), (0, 0.9), (3.1, 9), (0.9, 2), (2, 3.1))]
    assert said == [REPRODUCED, FAILED, FAILED, UNRESOLVED, UNRESOLVED]


def test_several_rows_have_one_verdict():
    assert together([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert together([REPRODUCED, UNRESOLVED]) == UNRESOLVED
    assert together([REPRODUCED, UNRESOLVED, FAILED, UNTESTED]) == FAILED
    assert together([FAILED, REPRODUCED], every=False) == REPRODUCED
    assert together([FAILED, UNRESOLVED], every=False) == UNRESOLVED
    assert together([FAILED, FAILED], every=False) == FAILED
    assert together([]) == together([], every=False) == UNTESTED


# Intervals.


def test_the_interval_between_seeds_is_student_s():
    differences = [0.01, 0.03, -0.02, 0.05, 0.04]
    found = between_seeds(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    assert found.value == pytest.approx(0.022) and found.over == "5 seeds"
    assert between_seeds(differences[:4]) is None  # too few
    assert between_seeds(differences[:4], seeds=2) is not None  # control
    wider = between_seeds(differences, tries=4)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / 4)
    assert (wider.low, wider.high) == pytest.approx(expected, rel=1e-12)


def some_articles(rng, n=105, true=0.0, spread=0.05):
    """Articles of one text, lengths as skewed as Wikipedia's, and two rows' nats; longer articles have smaller deviations."""
    tokens = np.maximum(rng.lognormal(7.8, 0.9, n).round(), 50)
    base = tokens * (3.8 + 0.5 * rng.standard_normal(n))
    row = base + tokens * (true + spread * rng.standard_normal(n) * (1000 / tokens) ** 0.25)
    return np.stack([row, tokens], 1), np.stack([base, tokens], 1)


def test_the_difference_over_articles_is_that_of_the_losses():
    row, base = some_articles(np.random.default_rng(0), true=0.03)
    found = over_articles(row, base)
    (a, tokens), (b, _) = row.sum(0), base.sum(0)
    assert found.value == pytest.approx(a / tokens - b / tokens) and found.over == "105 articles, these models"
    again = over_articles(row[::-1], base[::-1])
    assert (again.low, again.high) == pytest.approx((found.low, found.high), rel=1e-9)


def test_articles_have_to_be_the_same_and_enough():
    row, base = some_articles(np.random.default_rng(0))
    assert over_articles(row[:19], base[:19]) is None and over_articles(row[:20], base[:20]) is not None
    for other in (base[:-1], base[::-1]):
        with pytest.raises(ValueError, match="cannot be paired"):
            over_articles(row, other)


def test_windows_are_articles_of_one_length():
    rng = np.random.default_rng(0)
    losses = [{"tokens": 200, "windows": list(rng.normal(30, 1, 20))} for _ in range(2)]
    as_articles = [np.array([[nats, 10] for nats in text["windows"]]) for text in losses]
    assert judge.over_windows(*losses) == over_articles(*as_articles)
    few = [text | {"windows": text["windows"][:19]} for text in losses]
    assert judge.over_windows(*few) is None and judge.over_windows(*few, windows=19) is not None
    assert judge.over_windows({"tokens": 200}, losses[0]) is judge.over_windows(losses[0], {"tokens": 200}) is None


def test_the_interval_over_articles_is_the_bootstrap_s():
    """Whole articles drawn with replacement give the same error as leaving one out."""
    rng = np.random.default_rng(1)
    row, base = some_articles(rng, true=0.02)
    found = over_articles(row, base)
    drawn = rng.integers(0, len(row), (4000, len(row)))
    differences = (row[drawn, 0] - base[drawn, 0]).sum(1) / row[drawn, 1].sum(1)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.98 * differences.std(), rel=0.1)
    tokens_alone = (row[:, 0] - base[:, 0]).std() / row[:, 1].sum() ** 0.5  # control: tokens taken as independent
    assert half != pytest.approx(1.98 * tokens_alone, rel=0.5)


# Error rates.


def share(trials: list[bool]) -> float:
    return sum(trials) / len(trials)


@pytest.mark.no_cover
@pytest.mark.parametrize("seeds", [5, 8])
def test_without_a_difference_below_or_above_is_said_in_five_per_cent_between_seeds(seeds):
    drawn = np.random.default_rng(seeds).normal(0, 0.02, (6000, seeds))
    said = [between_seeds(row).word for row in drawn.tolist()]
    assert 0.04 < share([word in (BELOW, ABOVE) for word in said]) < 0.06
    normal = [abs(statistics.mean(row)) > 1.96 * statistics.stdev(row) / seeds**0.5 for row in drawn.tolist()]
    assert share(normal) > 0.08  # control: with the normal distribution's 1.96


def test_without_a_difference_below_or_above_is_said_in_five_per_cent_over_articles():
    rng = np.random.default_rng(2)
    said = [over_articles(*some_articles(rng)).word for _ in range(4000)]
    assert 0.035 < share([word in (BELOW, ABOVE) for word in said]) < 0.065


def test_with_a_difference_the_interval_over_articles_holds_it_in_95_per_cent():
    rng = np.random.default_rng(3)
    found = [over_articles(*some_articles(rng, n=78, true=0.02)) for _ in range(4000)]
    assert 0.935 < share([e.low <= 0.02 <= e.high for e in found]) < 0.965


def test_an_interval_over_articles_says_nothing_about_other_seeds():
    """Why the page says "these models": where seeds differ and the rows do not, one seed each says below or above far too often."""
    rng = np.random.default_rng(4)
    luck = rng.normal(0, 0.02, 1000)
    said = [over_articles(*some_articles(rng, true=seed, spread=0.02)).word for seed in luck]
    assert share([word in (BELOW, ABOVE) for word in said]) > 0.3


def test_over_articles_no_claim_is_settled():
    """Seeds spread by 0.03, a true gap of 0.03: by its interval one seed would often pass, or fail where it should pass."""
    rng = np.random.default_rng(9)
    found = [over_articles(*some_articles(rng, true=gap, spread=0.02)) for gap in rng.normal(0.03, 0.03, 500)]
    assert {e.verdict(-np.inf, MARGIN) for e in found} == {UNRESOLVED}
    assert share([judge.replace(e, of_seeds=True).verdict(-np.inf, MARGIN) == REPRODUCED for e in found]) > 0.1  # control
    luck = [over_articles(*some_articles(rng, true=gap, spread=0.02)) for gap in rng.normal(0, 0.03, 500)]
    assert {e.verdict(-np.inf, MARGIN) for e in luck} == {UNRESOLVED}


def test_the_seed_that_chose_would_help_its_row():
    """Of eight equal settings the luckiest is chosen: its luck counts if it judges too, and does not if five others do."""
    rng = np.random.default_rng(10)

    def below(chooser_judges):
        said = []
        for _ in range(4000):
            row, base = rng.normal(0, 0.02, (2, 6))
            row[0] = rng.normal(0, 0.02, 8).min()
            judging = slice(0, 5) if chooser_judges else slice(1, 6)
            said.append(between_seeds((row - base)[judging].tolist()).word == BELOW)
        return share(said)

    assert below(False) < 0.033
    assert below(True) > 0.036  # control


@pytest.mark.parametrize("true", [0.011, 0.03])
def test_noise_never_helps_a_claim(true):
    """A row that lies above the limit passes in at most the 2.5 % of one side, whatever the noise."""
    rng = np.random.default_rng(5)

    def passes(noise):
        drawn = rng.normal(true, noise, (3000, 5)).tolist()
        return share([between_seeds(row).verdict(-np.inf, MARGIN) == REPRODUCED for row in drawn])

    assert max(passes(noise) for noise in (0.001, 0.01, 0.03, 0.1)) < 0.035

    def passed_before(noise):  # control: a gap was forgiven up to the spread of the seeds
        drawn = rng.normal(0, noise, (3000, 2, 5)) + np.array([[[true], [0]]])
        return share((drawn[:, 0].mean(1) - drawn[:, 1].mean(1) <= np.hypot(*drawn.std(2, ddof=1).T)).tolist())

    assert passed_before(0.001) < 0.05 < 0.8 < passed_before(0.1)


def test_noise_leaves_a_true_claim_open():
    rng = np.random.default_rng(6)

    def said(noise):
        verdicts = [between_seeds(row).verdict(-np.inf, MARGIN) for row in rng.normal(0, noise, (2000, 5)).tolist()]
        return share([v == REPRODUCED for v in verdicts]), share([v == FAILED for v in verdicts])

    passed, failed = zip(*map(said, (0.001, 0.01, 0.03, 0.1)))
    assert passed[0] > 0.99 and list(passed) == sorted(passed, reverse=True) and passed[-1] < 0.06
    assert max(failed) < 0.035


@pytest.mark.parametrize("rows", [2, 6])
def test_the_best_of_several_rows_passes_no_more_often_than_one(rows):
    drawn = np.random.default_rng(7).normal(MARGIN, 0.02, (3000, rows, 5)).tolist()

    def passes(tries):
        return share([any(between_seeds(row, tries).high <= MARGIN for row in trial) for trial in drawn])

    assert passes(rows) < 0.035
    assert passes(1) > 0.04  # control: each at 95 %


# Which runs are compared.


def run(seed=0, loss=4.0, test=None, articles=None, rate=1e-3, method="MHA", row=None, **more):
    """A run of one row and rate; test: its loss on the test text, articles: per article."""
    metrics = {"validation_loss": loss} | more
    if test is not None:
        articles = [[test * 100, 100]] * 30 if articles is None else articles
        metrics["test"] = {"its own": {"loss": test, "tokens": 3000, "articles": articles}, "another": {"loss": 9.0}}
    return a_record(
        method=method, seed=seed, metrics=metrics, config={"row": {"mechanism": "MHA"} | (row or {}), "train": {"learning_rate": rate}}
    )  # fmt: skip


def test_with_five_seeds_losses_are_paired_by_seed():
    base = [run(seed, test=4 + seed / 10) for seed in range(6)]
    row = [run(seed, test=4.02 + seed / 10 + 0.001 * (seed % 2)) for seed in reversed(range(1, 6))]
    found = loss_difference(row, base)
    assert found.over == "5 seeds" and found.value == pytest.approx(0.0206) and found.word == ABOVE
    shuffled = [run(seed, test=r.metrics["test"]["its own"]["loss"]) for seed, r in zip((2, 3, 4, 5, 1), row)]
    assert loss_difference(shuffled, base).word == UNRESOLVED  # control: wrong partners


def test_with_fewer_seeds_the_articles_decide_and_it_is_said():
    rng = np.random.default_rng(8)
    row, base = some_articles(rng, true=0.05, spread=0.01)
    own, other = ([run(s, test=4.0, articles=a.tolist()) for s in range(4)] for a in (row, base))
    found = loss_difference(own, other)
    assert found == over_articles(row, base) and found.word == ABOVE
    assert loss_difference(own[:1], other) == found  # one seed
    assert loss_difference(own[:1], other[1:]) is None  # no common seed
    few = [run(0, test=4.0, articles=row[:9].tolist())]
    assert loss_difference(few, [run(0, test=4.0, articles=base[:9].tolist())]) is None


def test_seeds_of_one_row_are_averaged_before_articles_are_compared():
    twice = [run(s, test=4.0, articles=[[100.0 * (s + n), 50] for n in range(1, 31)]) for s in (0, 1)]
    base = [run(s, test=4.0, articles=[[100.0 * n, 50] for n in range(1, 31)]) for s in (0, 1)]
    assert loss_difference(twice, base).value == pytest.approx(1.0)  # 0 and 100 more nats for every 50 tokens


@pytest.mark.parametrize("seeds", [2, 6])
def test_losses_on_different_test_texts_are_not_paired(seeds):
    row, base = ([run(s, test=4.0) for s in range(seeds)] for _ in range(2))
    assert loss_difference(row, base).value == 0  # control
    tests = row[1].metrics["test"]
    row[1].metrics["test"] = {"a third": tests["its own"], **tests}
    with pytest.raises(ValueError, match=r"different test texts: a third \(3,000 tokens\), its own .* cannot be paired"):
        loss_difference(row, base)
    row[1].metrics["test"] = {"its own": tests["its own"] | {"tokens": 2000}}
    with pytest.raises(ValueError, match="cannot be paired"):
        loss_difference(row, base)


def test_without_a_test_text_there_is_no_difference_in_loss():
    rows = [run(s) for s in range(8)]
    assert loss_difference(rows, rows) is None
    assert metric_difference(rows, rows, "validation_loss").word == LEVEL
    assert metric_difference(rows[:4], rows, "validation_loss") is None


def test_a_run_that_diverged_counts_against_its_row_and_has_no_partner():
    rows = [run(s, test=4.0) for s in range(6)]
    gone = [*rows[:5], run(5, diverged_at=3)]
    assert broken(rows, rows) is None
    assert broken(gone, rows) == FAILED and broken(rows, gone) == broken(gone, gone) == UNRESOLVED
    assert loss_difference(gone, rows).over == loss_difference(rows, gone).over == "5 seeds"


def test_a_row_is_judged_at_the_setting_that_validation_text_prefers():
    """The seed of the sweep chooses, on validation text; the others judge."""
    sweep = [run(0, loss, test=9 - loss, rate=rate) for rate, loss in ((1e-3, 4.1), (2e-3, 4.0), (4e-3, 4.2))]
    later = [run(s, 4.3, test=4.3, rate=2e-3) for s in range(1, 6)]
    best = at_their_best(sweep + later)["MHA"]
    assert best.runs == later and best.settings == 3  # 4.3 or the best test loss, 4.8 at 4e-3, change nothing
    assert at_their_best(sweep + later[:4])["MHA"].runs == later[:4]  # five seeds of which one chose are too few
    broken_off = [*sweep[:1], run(0, diverged_at=3, rate=2e-3)]
    del broken_off[1].metrics["validation_loss"]
    nowhere = run(0, float("inf"), diverged_at=3, rate=1e-3)
    lost = at_their_best([broken_off[1], *later[:2], nowhere])["MHA"].runs
    assert lost == [broken_off[1], *later[:2]]  # a run that diverged is not left out
    assert at_their_best(sweep)["MHA"].runs == [sweep[1]]
    assert at_their_best([sweep[1], *later])["MHA"].runs == [sweep[1], *later]  # nothing was chosen


def test_settings_of_which_the_sweep_s_run_diverged_or_is_missing_are_not_chosen():
    sweep = [run(0, 4.1, rate=1e-3), run(0, 4.2, rate=2e-3), run(0, diverged_at=9, rate=4e-3)]
    del sweep[2].metrics["validation_loss"]
    lucky = [run(1, 3.0, rate=8e-3), run(1, 3.0, rate=4e-3)]
    assert at_their_best(sweep + lucky)["MHA"].runs == sweep[:1]
    assert at_their_best(sweep[2:])["MHA"].runs == sweep[2:]  # all of it diverged: that is what it reaches


def test_images_choose_by_top_5_then_by_loss_then_the_lower_rate_and_text_by_loss():
    def chosen(*tried, experiment="figure3"):
        names = ("rate", "validation_top5", "loss")
        own = [replace(run(**dict(zip(names, values))), experiment=experiment) for values in tried]
        return at_their_best(own)["MHA"].chooser.rate

    assert chosen((1e-4, 0.77, 2.0), (3e-4, 0.78, 2.1)) == 3e-4
    assert chosen((1e-4, 0.77, 2.0), (3e-4, 0.78, 2.1), experiment="table2") == 1e-4  # control
    for order in (1, -1):
        assert chosen(*((1e-4, 0.78, 2.1), (3e-4, 0.78, 2.0), (1e-3, 0.77, 1.9))[::order]) == 3e-4  # of equals the lower loss
        assert chosen(*((1e-4, 0.78, 2.0), (3e-4, 0.78, 2.0))[::order]) == 1e-4  # of these the lower rate
        gone = replace(run(rate=1e-5, diverged_at=3), experiment="figure3", metrics={"diverged_at": 3})
        left = replace(run(rate=1e-4, loss=9.0, validation_top5=0.0), experiment="figure3")
        assert at_their_best([gone, left][::order])["MHA"].runs == [left]  # one that diverged comes last
    start = replace(run(loss=2.0, validation_top5=0.78), experiment="figure3", config={"pretrain": {"learning_rate": 2e-3}})
    assert start.on_held_out == (-0.78, 2.0, 2e-3)


def test_norms_are_settings_of_a_row_and_ranks_are_not():
    plain, normed = run(0, 4.1), run(0, 4.0, method="MHA QK-norm", row={"qk_norm": "head"})
    other = run(0, 3.9, method="Tucker [8,4,4]", row={"mechanism": "Tucker", "ranks": [8, 4, 4], "latent_norm": True})
    best = at_their_best([plain, normed, other])
    assert list(best) == ["MHA", "Tucker [8,4,4]"] and best["MHA"].runs == [normed] and best["MHA"].settings == 2
