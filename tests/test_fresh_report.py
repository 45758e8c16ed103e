"""Tables and the figure of Muon on fresh text: each row at its best, the trend, and where parameters should go."""

import dataclasses

import pytest
from helpers import a_record, committed_records

from paper_figures import __main__ as figures
from paper_figures import trend
from reproduce.experiments import table2
from reproduce.models.rows import TABLE2_ALLOCATIONS, TABLE2_BEST, TABLE2_JUDGED, TABLE3_BEST, Row
from reproduce.report import again, allocations, best, claims, fresh, headline, pages, results
from reproduce.report.judge import ABOVE, BELOW, LEVEL, SEEDS, UNRESOLVED, away_from_zero, between_seeds
from reproduce.store.records import COMMITTED, Record, append, load_some

MHA, TUCKER = Row("MHA"), Row("Tucker", ranks=(8, 64, 64))
JUDGES = range(1, 1 + SEEDS)
COMMITTED_BUT_FRESH = [r for r in committed_records() if r.preset != "gpu-fresh"]
TRAIN = {"steps": 1980, "batch_size": 32, "learning_rate": 4.8e-3, "optimizer": "muon"}


def a_run(
    row: Row, seed: int, loss: float, *, rate=4.8e-3, narrower=1, steps=1980, preset="gpu-fresh", test=True, **more
) -> Record:
    """As table2 makes it; loss: on validation text, on the first test text 0.1 more, on the other one 0.2 more."""
    config = {
        "model": "gpt2", "d_model": 768 // narrower, "n_heads": 12, "n_layers": 12, "context": 1024, "vocab_size": 50_257,
        "row": row.config(), "attention": row.narrowed(narrower).config(), "train": TRAIN | {"learning_rate": rate, "steps": steps},
    } | ({"passes": 2} if steps == 3960 else {"one_pass": True})  # fmt: skip
    texts = {
        name: {"loss": loss + above, "tokens": 10 * articles, "articles": [[10 * (loss + above), 10]] * articles}
        for name, above, articles in (("kept", 0.1, 30), ("other", 0.2, 19))
    }
    metrics = {
        "validation_loss": loss, "attention_parameters": 200 if row.mechanism == "MHA" else 100, "cache_per_token": 10,
        "tokens_seen": steps * 32 * 1024, "validation_tokens": 300, "bits_per_byte": loss / 3,
    } | ({"test": texts} if test else {})  # fmt: skip
    return a_record(
        id=f"{row.label}{seed}{rate}{narrower}{steps}", experiment="table2", preset=preset, method=row.label, seed=seed, config=config,
        data={"name": "wiki", "sha256": "0"}, metrics=metrics | more,
    )  # fmt: skip


def study(gap: float, spread: float = 0.0, own: Row = TUCKER, **more) -> list[Record]:
    """Two rows: two rates and a norm tried with seed 0, the best of them again with the seeds that judge."""
    tried = [
        a_run(row, 0, loss, rate=rate, test=False, **more)
        for row, lowest in ((MHA, 4.0), (own, 4.0 + gap))
        for plain in (row,)
        for row, rate, loss in ((plain, 2.4e-3, lowest + 0.2), (plain, 4.8e-3, lowest + 0.1), (plain.normed(), 9.6e-3, lowest))
    ]
    judged = [
        a_run(row.normed(), seed, lowest + spread * (seed % 2) * (row is own), rate=9.6e-3, **more)
        for row, lowest in ((MHA, 4.0), (own, 4.0 + gap))
        for seed in JUDGES
    ]
    return tried + judged


def whole(gap: float, spread: float = 0.0) -> list[Record]:
    """The same of all rows that the first page compares."""
    rows = [row for row in TABLE2_BEST if row.label in (*best.COMPARED[1:], "MLA separated d_c=128")]
    return list({r.id: r for row in rows for r in study(gap, spread, own=row)}.values())


def one_diverged(runs: list[Record]) -> list[Record]:
    """The same, but that the smallest Tucker row's run of seed 3 broke off."""
    left = {"diverged_at": 7, "attention_parameters": 100, "cache_per_token": 10}
    return [dataclasses.replace(r, metrics=left) if (r.method, r.seed) == (TUCKER.normed().label, 3) else r for r in runs]


def cells(table: str, label: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_each_row_stands_at_its_best_with_the_number_of_settings_and_its_interval():
    (table,) = fresh.best_tables("table2", "gpu-fresh", study(-0.05, 0.01))
    mha, tucker = cells(table.body, "MHA"), cells(table.body, "Tucker [8,64,64]")
    assert mha[:2] == tucker[:2] == ["QK-norm, 0.0096", "3"]
    assert mha[4:] == ["4.100 ± 0.000 (5)", *[""] * 5]  # the seed that chose does not count
    assert tucker[4] == "4.056 ± 0.005 (5)" and tucker[5].startswith("−0.044 [−0.05") and tucker[6] == BELOW
    assert tucker[7] == tucker[5]  # the other text, which is as far above for both
    assert "no token read twice" in table.title.lower() and "on kept" in table.title


@pytest.mark.parametrize("gap, spread, word", [(0.001, 0.001, ABOVE), (-0.002, 0.004, LEVEL), (0.02, 0.3, UNRESOLVED)])
def test_the_word_follows_the_interval(gap, spread, word):
    (table,) = fresh.best_tables("table2", "gpu-fresh", study(gap, spread))
    assert cells(table.body, "Tucker [8,64,64]")[6] == word


def test_with_few_seeds_the_word_is_of_these_models():
    few = [r for r in study(-0.05) if r.seed < 3]
    (table,) = fresh.best_tables("table2", "gpu-fresh", few)
    assert cells(table.body, "Tucker [8,64,64]")[6] == f"{BELOW}, these models"
    alone = [r for r in few if r.seed < 2]
    assert (
        cells(fresh.best_tables("table2", "gpu-fresh", alone)[0].body, "Tucker [8,64,64]")[7] == ""
    )  # one pair has no interval


def test_a_row_that_diverged_or_has_no_base_has_no_difference():
    runs = study(-0.05)
    (table,) = fresh.best_tables("table2", "gpu-fresh", one_diverged(runs))
    assert cells(table.body, "Tucker [8,64,64]")[4:] == ["diverged at step 7", *[""] * 5]
    alone = [r for r in runs if r.method.startswith("Tucker")]
    assert cells(fresh.best_tables("table2", "gpu-fresh", alone)[0].body, "Tucker [8,64,64]")[5:7] == ["", ""]


def test_the_interval_over_articles_stands_beside_and_changes_no_word():
    def uneven(r: Record) -> Record:
        """The Tucker row's articles by turns better and worse, the more so the higher its seed."""
        if r.method != TUCKER.normed().label or "test" not in r.metrics:
            return r
        kept = r.metrics["test"]["kept"]
        articles = [[nats + (-1) ** n * 0.5 * r.seed, tokens] for n, (nats, tokens) in enumerate(kept["articles"])]
        return dataclasses.replace(r, metrics=r.metrics | {"test": r.metrics["test"] | {"kept": kept | {"articles": articles}}})

    runs = study(-0.05, 0.01)
    (even,), (table,) = (fresh.best_tables("table2", "gpu-fresh", found) for found in (runs, [uneven(r) for r in runs]))
    assert "over 30 articles of kept | over 19 articles of other |" in table.body.splitlines()[0]
    before, after = (cells(found.body, "Tucker [8,64,64]") for found in (even, table))
    assert before[:8] == after[:8] and before[8] == "[−0.044, −0.044]"  # all articles alike
    mean, error = -0.05 + 0.01 * 3 / 5, 0.15 * (30 / 29) ** 0.5 / 30**0.5  # of five seeds, whose mean is 3
    low, high = (f"{mean + side * 2.045 * error:+.3f}".replace("-", "−") for side in (-1, 1))
    assert after[8:] == [f"[{low}, {high}]", ""]  # nineteen are too few
    assert "change no word" in table.note


def test_rows_stand_beside_every_larger_one_on_every_text():
    (table,) = fresh.pairs_tables("table2", "gpu-fresh", whole(-0.05, 0.01))
    first, second = table.body.split("\n\n")
    labels = [label.strip().removeprefix("minus ") for label in first.splitlines()[0].split("|")[1:-1]]
    assert labels == ["kept", *best.COMPARED[:2], "MLA separated d_c=128", *best.COMPARED[3:5]]
    last = cells(first, "Tucker [8,64,64]")
    assert last[0].startswith("−0.044 [−0.05") and last[0].endswith(f"{BELOW}*")  # as in the table at best
    assert last[1:] == [f"+0.000 [+0.000, +0.000] {LEVEL}"] * 4  # the other rows are alike
    assert cells(first, "GQA n_KV=4")[1:] == [""] * 4
    assert second.startswith("| other |") and cells(second, "Tucker [8,64,64]") == last
    moved = [change(r, "Tucker [8,64,64]", 0.03) for r in whole(-0.05, 0.01)]  # control
    first, second = fresh.pairs_tables("table2", "gpu-fresh", moved)[0].body.split("\n\n")
    assert cells(first, "Tucker [8,64,64]")[1:] == [f"+0.030 [+0.030, +0.030] {ABOVE}*"] * 4
    assert cells(second, "Tucker [8,64,64]") == last  # the other text's losses were not
    assert fresh.pairs_tables("table2", "gpu-fresh", study(-0.05)) == []  # the only pair stands in the table at best


def test_a_pair_of_too_few_seeds_or_with_a_run_that_diverged_has_no_word():
    few = [r for r in whole(-0.05, 0.01) if not (r.method.startswith("Tucker [8,64,64]") and r.seed > 4)]
    assert "Tucker [8,128,64]" in (body := fresh.pairs_tables("table2", "gpu-fresh", few)[0].body) and "[8,64,64]" not in body
    more = whole(-0.05, 0.01) + [a_run(TUCKER.normed(), 9, 3.95, rate=9.6e-3), a_run(MHA.normed(), 9, 4.0, rate=9.6e-3)]
    first = fresh.pairs_tables("table2", "gpu-fresh", one_diverged(more))[0].body.split("\n\n")[0]
    assert cells(first, "Tucker [8,64,64]") == [""] * 5


def test_differences_are_judged_together():
    clear, narrow = [1.0, 1.1, 0.9, 1.0, 1.05], [1.0, 0.3, 0.9, 1.5, 0.2]
    estimate = between_seeds(narrow)
    assert estimate.low > 0 and estimate.value - 1.2 * (estimate.value - estimate.low) < 0  # just told from zero
    assert away_from_zero({("one",): narrow}) == {("one",)}
    assert away_from_zero({("one",): narrow, ("two",): narrow}) == set()
    assert away_from_zero({("one",): narrow, ("clear",): clear}) == {("one",), ("clear",)}  # the clear one first, then the last
    assert away_from_zero({("one",): [0.0] * 5, ("two",): [0.5] * 5}) == {("two",)}


def change(r: Record, row: str, by: float) -> Record:
    """The run, its test losses higher by so much if it is one of the row."""
    if not r.method.startswith(row) or "test" not in r.metrics:
        return r
    kept = r.metrics["test"]["kept"]
    return dataclasses.replace(
        r, metrics=r.metrics | {"test": r.metrics["test"] | {"kept": kept | {"loss": kept["loss"] + by}}}
    )  # fmt: skip


def with_adamw(r: Record) -> Record:
    """The same run with AdamW, on fresh text as well."""
    train = {name: value for name, value in r.train.items() if name != "optimizer"}
    return dataclasses.replace(r, id=f"{r.id} AdamW", config=r.config | {"train": train})


def test_runs_with_adamw_at_a_preset_of_muon_s_stand_in_no_table_of_its_rows_and_judge_nothing():
    runs = whole(-0.05, 0.01)
    lower = [change(with_adamw(dataclasses.replace(r, metrics=r.metrics | {"validation_loss": 1.0})), "", -1.0) for r in runs]
    for draw in (fresh.fresh_tables, lambda found, _: headline.headline(found), lambda found, _: claims.render(found)):
        assert draw([*runs, *lower], "gpu-fresh") == draw(runs, "gpu-fresh")
    muon = [dataclasses.replace(r, config=r.config | {"train": TRAIN | {"learning_rate": r.rate}}) for r in lower]  # control
    assert fresh.fresh_tables([*runs, *muon], "gpu-fresh") != fresh.fresh_tables(runs, "gpu-fresh")


def test_without_a_test_text_there_is_no_table():
    assert fresh.best_tables("table2", "gpu-fresh", [r for r in study(0.0) if r.seed == 0]) == []


def test_a_setting_names_norms_and_rate():
    (rows,) = best.at_best([a_run(Row("MLA", latent=128).normed(), 0, 4.0)], "table2", "gpu-fresh")
    assert [fresh.setting_of(own) for own in rows.values()] == ["latent norms, 0.0048"]


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"qk_clip": 100.0}])
def test_what_not_all_rows_were_tried_with_is_no_setting_of_any_row(change):
    """Equal grids: QK-clip and AdamW are comparisons of their own, whatever they reach."""
    found = study(-0.05, 0.01)
    more = [a_run(row, seed, 3.0, rate=1.2e-3) for row in (MHA, TUCKER) for seed in (0, 1)]
    other = [dataclasses.replace(r, config=r.config | {"train": r.train | change}) for r in more]
    assert fresh.best_tables("table2", "gpu-fresh", found + other) == fresh.best_tables("table2", "gpu-fresh", found)
    (table,) = fresh.best_tables("table2", "gpu-fresh", found + more)  # control
    assert cells(table.body, "MHA")[:2] == ["0.0012", "4"]


def test_no_table_of_muon_s_has_runs_of_adamw_and_qk_clip_has_lines_of_its_own():
    found, six = study(-0.05), [a_run(row, 0, 3.0, rate=rate, test=False) for row in TABLE2_JUDGED for rate in (1.2e-3, 2.4e-3)]
    adamw, clipped = (
        [dataclasses.replace(r, config=r.config | {"train": r.train | change}) for r in six]
        for change in ({"optimizer": "adamw"}, {"qk_clip": 100.0})
    )
    assert fresh.fresh_tables(found + adamw, "gpu-fresh") == fresh.fresh_tables(found, "gpu-fresh")
    lines = fresh.rates_table(found + clipped)[0].body
    assert cells(lines, "MHA QK-norm, QK-clip 100")[-1] == "2" and cells(lines, "MHA QK-norm")[-1] == "1"
    assert cells(fresh.rates_table(found + six)[0].body, "MHA QK-norm")[-1] == "3"  # control


def test_seeds_at_a_rate_that_loses_later_are_void():
    """As those of MLA with a shared latent, whose grid was not whole when they ran."""
    row = Row("MLA", latent=128, shared_kv=True).normed()
    found = study(0.05, own=row)
    higher = a_run(row, 0, 3.9, rate=1.92e-2, test=False)
    names = lambda runs: list(best.at_best(runs, "table2", "gpu-fresh")[0])  # noqa: E731
    assert names(found) == ["MHA", "MLA shared d_c=128"] and names([*found, higher]) == ["MHA"]
    lost = dataclasses.replace(higher, metrics=higher.metrics | {"validation_loss": 4.2})
    assert names([*found, lost]) == names(found)  # control


def test_tokens_per_parameter_leave_the_embedding_out():
    d, n = 768, 1980 * 32 * 1024
    blocks = 12 * (12 * d**2 + 4 * d)  # attention 4 d², MLP 8 d², two norms with bias; no other biases
    assert best.tokens_per_parameter(a_run(MHA, 0, 4.0)) == pytest.approx(n / blocks, rel=1e-3)
    assert best.tokens_per_parameter(a_run(MHA, 0, 4.0, narrower=4)) == pytest.approx(12.2, abs=0.2)
    assert best.tokens_per_parameter(a_run(TUCKER, 0, 4.0)) > 1.3 * best.tokens_per_parameter(a_run(MHA, 0, 4.0))  # control


def test_seeds_that_judge_alone_have_no_grid_of_rates():
    found = study(-0.05)
    judged = [r for r in found if r.seed in JUDGES]
    names = lambda runs: [table.name for table in results.tables(runs)["table2"]]  # noqa: E731
    assert names(found) == ["Table 2, fresh text", "Table 2, fresh text, at best", "What norms give"]  # control
    assert names(judged) == ["Table 2, fresh text, at best"]


def narrow_study(gap: float = 0.02) -> list[Record]:
    """As planned: six rows with norms, three rates with seed 0, six other seeds at the best; half a pass and two with three of them."""
    more, found = {"narrower": 4, "preset": "gpu-fresh-narrow"}, []
    for row in TABLE2_JUDGED:
        loss = 4.5 + gap * (row.mechanism != "MHA")
        found += [
            a_run(row, 0, loss + 0.01 * n, rate=rate, test=False, **more) for n, rate in enumerate((9.6e-3, 4.8e-3, 1.92e-2))
        ]
        found += [a_run(row, seed, loss, rate=9.6e-3, **more) for seed in range(1, 7)]
        found += [
            a_run(
                row,
                seed,
                loss + 990 / steps + gap * (steps > 1980) * (row.mechanism != "MHA"),
                rate=9.6e-3,
                steps=steps,
                **more,
            )
            for steps in (990, 3960)
            for seed in (1, 2, 3)
        ]
    return found


def test_a_narrow_study_has_its_tables_and_tells_seeds_and_passes_apart():
    found = narrow_study()
    rates, once, half, twice, pairs = fresh.fresh_tables(found, "gpu-fresh-narrow")
    assert {table.name for table in (rates, once, half, twice, pairs)} == {"Table 2, fresh text, narrow"}  # under one mark
    assert rates.note == "Every row was tried at as many rates: 3." and len(rates.runs) == 18  # seed 0 and one pass alone
    assert "minus each larger one" in pairs.title  # of one pass alone: elsewhere there are too few seeds
    assert cells(once.body, "GQA n_KV=4")[:2] == ["QK-norm, 0.0096", "3"] and cells(once.body, "GQA n_KV=4")[6] == ABOVE
    assert cells(once.body, "GQA n_KV=4")[4].endswith("(6)") and "with a seed that does not count here" in once.title
    assert "four" not in once.title and "4 times narrower" in once.title and "REDUCED SCALE" in once.title
    for table, said in ((half, "32.4M training tokens, no token read twice"), (twice, "tokens, every token read 2 times")):
        assert cells(table.body, "GQA n_KV=4")[4].endswith("(3)") and cells(table.body, "GQA n_KV=4")[6].endswith(
            "these models"
        )
        assert "chosen for one pass" in table.title and said in table.title
    without = [r for r in found if not (r.method == "MHA QK-norm" and r.rate == 4.8e-3)]
    (unequal,) = fresh.rates_table(without, "gpu-fresh-narrow")
    assert "at 2 to 3 rates each" in unequal.note  # control
    missing = [r for r in found if r.method != "MHA QK-norm"]
    assert "at 0 to 3 rates each" in (note := fresh.rates_table(missing, "gpu-fresh-narrow")[0].note)
    assert note.endswith("Not run at any rate: MHA QK-norm.")


def test_the_trend_goes_from_few_tokens_to_many(tmp_path):
    runs = study(-0.05) + study(0.02, narrower=4, preset="gpu-fresh-narrow") + study(-0.01, steps=3960)
    best._beside_embedding.cache_clear()  # which a test without coverage may have filled
    found = best.trend(runs)
    assert list(found) == ["Tucker [8,64,64]"]
    tokens, estimates = zip(*found["Tucker [8,64,64]"])
    assert list(tokens) == sorted(tokens) and tokens[1] == pytest.approx(2 * tokens[0])
    assert [round(e.value, 3) for e in estimates] == [-0.05, -0.01, 0.02]
    assert best.trend(study(-0.05)) == {}  # one budget is no trend
    trend.against_tokens(found, tmp_path / "trend.png")
    assert (tmp_path / "trend.png").stat().st_size > 10_000


def test_the_trend_is_drawn_of_what_is_planned(tmp_path):
    found = best.trend(whole(0.01, 0.002) + narrow_study())
    assert [len(own) for own in found.values()] == [4] * 5
    assert [[e.of_seeds for _, e in own] for own in found.values()] == [
        [True, False, True, False]
    ] * 5  # three seeds: over articles
    trend.against_tokens(found, tmp_path / "trend.png")
    assert (tmp_path / "trend.png").stat().st_size > 10_000


def moved(runs: list[Record]) -> dict[tuple[str, str], list[str]]:
    """By row and what differs, the cells of the table of moves."""
    tables = fresh.moves_tables(runs)
    return {(line[0], line[1]): line[2:] for table in tables for line in ways(table)}


TIMES, BETWEEN = "four times narrower", "between the sizes"


def test_whether_a_difference_moves_is_judged_by_pairs_of_seeds():
    found = moved(whole(0.01, 0.002) + narrow_study(gap=0.02))
    assert {along for _, along in found} == {TIMES, BETWEEN} and len(found) == 10
    few, many, by, word = found["GQA n_KV=4", BETWEEN]
    assert few == "0.76: +0.011" and many == "12: +0.020" and by.startswith("+0.009 [+0.00") and by.endswith("(5)")
    assert word == f"{ABOVE}*"
    few, many, by, word = found["GQA n_KV=4", TIMES]
    assert few == "6.1: +0.020" and many == "24: +0.040" and by == "+0.020 [+0.020, +0.020] (3)" and word == ""  # three seeds
    five = [a_run(r, seed, 4.5 + 0.02 * n, rate=9.6e-3, steps=steps, narrower=4, preset="gpu-fresh-narrow")
            for steps, n in ((990, 1), (3960, 2)) for seed in (4, 5) for r in TABLE2_JUDGED[1:]]  # fmt: skip
    base = [a_run(MHA.normed(), seed, 4.5, rate=9.6e-3, steps=steps, narrower=4, preset="gpu-fresh-narrow")
            for steps in (990, 3960) for seed in (4, 5)]  # fmt: skip
    assert (
        moved([*whole(0.01, 0.002), *narrow_study(), *five, *base])["GQA n_KV=4", TIMES][3] == f"{ABOVE}*"
    )  # five have a word


def test_a_difference_that_does_not_move_is_level_and_what_is_missing_has_no_line():
    assert moved(whole(0.02, 0.002) + narrow_study(gap=0.02))["GQA n_KV=4", BETWEEN][3] == LEVEL
    assert moved(whole(0.02)) == {}  # one budget
    alone = [r for r in narrow_study() if r.steps != 990 or r.seed == 1]
    assert moved(alone)["GQA n_KV=4", TIMES][2:] == ["+0.020 (1)", ""]  # one pair has no interval
    left = {"diverged_at": 7, "attention_parameters": 100, "cache_per_token": 10}
    gone = [
        dataclasses.replace(r, metrics=left) if (r.method, r.steps, r.seed) == ("GQA n_KV=4 QK-norm", 3960, 2) else r
        for r in alone
    ]
    assert ("GQA n_KV=4", TIMES) not in moved(gone) and ("MLA separated d_c=128", TIMES) in moved(gone)
    no_base = [r for r in alone if r.method != "MHA QK-norm"]
    assert moved(no_base) == {}
    other_seeds = [r for r in alone if r.steps != 990] + [
        dataclasses.replace(r, seed=9) if r.method.startswith("GQA") else r for r in alone if r.steps == 990
    ]
    assert ("GQA n_KV=4", TIMES) not in moved(other_seeds)  # no seed of both


SIZES = ("Tucker [8,128,128]", "Tucker [8,128,64]", "Tucker [8,64,64]")


def allocated(triple: str, losses: list[float], seed: int = 0, rate: float = 9.6e-3) -> list[Record]:
    """Runs of the first ways to spend the parameters of a triple, one for each loss."""
    rows = [row.normed() for row in TABLE2_ALLOCATIONS[triple]]
    return [a_run(row, seed, loss, rate=rate, preset="gpu-fresh-allocations", test=seed > 0) for row, loss in zip(rows, losses)]


def paper_s(triple: str, loss: float = 4.0, seeds=range(6), rate: float = 9.6e-3) -> list[Record]:
    (row,) = [row.normed() for row in TABLE2_BEST if row.label == triple]
    return [a_run(row, seed, loss + 0.001 * (seed % 2), rate=rate, test=seed > 0) for seed in seeds]


def judged_way(triple: str, way: int, gap: float, seeds=JUDGES) -> list[Record]:
    """The way of this number was chosen by seed 0, and ends so far above the paper's triple with the seeds that judge."""
    chosen = [3.99 if n == way else 4.01 for n in range(9)]
    judges = [allocated(triple, [4.0 + gap] * 9, seed)[way] for seed in seeds]
    return [*allocated(triple, chosen), *judges, *paper_s(triple)]


def ways(table) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.body.splitlines()[2:]]


def test_allocations_stand_from_the_lowest_loss_up_beside_the_paper_s():
    own = allocated("Tucker [8,64,64]", [4.01, 3.98])
    paper = paper_s("Tucker [8,64,64]", seeds=(0,), rate=4.8e-3) + paper_s("Tucker [8,64,64]", seeds=(0,))
    (table,) = allocations.allocation_tables(own + paper)
    lines = ways(table)
    assert [line[0] for line in lines] == [own[1].method, f"{paper[1].method} (the paper's)", own[0].method]
    assert [line[3] for line in lines] == ["−0.020", "", "+0.010"]
    assert paper[1] in table.runs and paper[0] not in table.runs  # the one at the same rate
    (without,) = allocations.allocation_tables(own + paper[:1])  # control: of another rate
    assert "the paper's)" not in without.body and ways(without)[0][3] == ""
    assert allocations.allocation_tables(paper) == []
    left = {"attention_parameters": 100, "cache_per_token": 10, "diverged_at": 7}
    (last,) = allocations.allocation_tables([own[0], dataclasses.replace(own[1], metrics=left)])
    assert [line[2] for line in ways(last)] == ["4.010", "diverged at step 7"]


def test_the_seed_that_chose_an_allocation_neither_judges_nor_is_averaged_with_those_that_do():
    (table,) = allocations.allocation_tables(judged_way("Tucker [8,64,64]", 1, 0.02))
    first, second, *others = ways(table)
    assert first[0] == "Tucker [8,96,64 / 8,32,64] QK-norm" and first[2:4] == ["3.990", "−0.010"]  # seed 0 alone
    assert first[4].startswith("+0.019 [+0.01") and first[5] == ABOVE  # other seeds alone, on the test text
    assert second[0].endswith("(the paper's)") and second[2] == "4.000" and second[4:] == ["", ""]
    assert all(line[4:] == ["", ""] for line in others) and len(others) == 8
    assert table.note == f"No other way is judged below the paper's by {SEEDS} seeds, so that nothing is advised."


def test_an_allocation_that_lost_after_its_seeds_ran_is_not_judged():
    runs = judged_way("Tucker [8,64,64]", 1, -0.02)
    assert ways(allocations.allocation_tables(runs)[0])[0][5] == BELOW  # control
    lower = [dataclasses.replace(r, metrics=r.metrics | {"validation_loss": 3.9}) if r.id == runs[4].id else r for r in runs]
    (table,) = allocations.allocation_tables(lower)
    assert ways(table)[0][0] == runs[4].method and all(line[4:] == ["", ""] for line in ways(table))
    paper = [r for r in runs if r.preset == "gpu-fresh"]
    best = [dataclasses.replace(r, metrics=r.metrics | {"validation_loss": 3.9}) if r.id == paper[0].id else r for r in runs]
    (table,) = allocations.allocation_tables(best)  # the paper's own is the lowest: nothing is to be judged
    assert ways(table)[0][0].endswith("(the paper's)") and all(line[4:] == ["", ""] for line in ways(table))
    assert allocations.allocation_tables([r for r in runs if r.seed]) == []  # none without the seed that chooses


@pytest.mark.parametrize(
    "chosen, said",
    [
        (
            (0, 0, 5),
            "Of a given number of parameters, give more to the output mode, from the query mode: so it is at the sizes of",
        ),
        (
            (0, 1, 5),
            "At the size of Tucker [8,128,64] alone it is better to give more to the query mode, from the output mode.",
        ),
    ],
)
def test_advice_takes_two_sizes(chosen, said):
    runs = [r for triple, way in zip(SIZES, chosen) for r in judged_way(triple, way, -0.02)]
    *others, last = allocations.allocation_tables(runs)
    assert said in last.note and len(others) == 2 and not any(table.note for table in others)
    assert ("That is too little for advice." in last.note) and ("Of a given" in last.note) == (chosen[0] == chosen[1])
    few = [r for triple, way in zip(SIZES, chosen) for r in judged_way(triple, way, -0.02, seeds=range(1, SEEDS))]
    assert "nothing is advised" in allocations.allocation_tables(few)[-1].note  # control: these models alone
    level = [r for triple, way in zip(SIZES, chosen) for r in judged_way(triple, way, 0.0)]
    assert "nothing is advised" in allocations.allocation_tables(level)[-1].note


def test_the_rows_of_the_allocations_have_the_best_setting_of_their_sizes():
    assert table2.PRESETS["gpu-fresh-allocations"].train.learning_rate == 9.6e-3
    assert all(row.qk_norm == "head" for row in table2.ROWS["gpu-fresh-allocations"])


def test_all_of_them_are_drawn_for_the_pages():
    runs = study(-0.05) + study(0.02, narrower=4, preset="gpu-fresh-narrow") + allocated("Tucker [8,64,64]", [4.0])
    names = [table.name for table in results.tables(runs)["table2"]]
    assert names == [
        "Table 2, fresh text", "Table 2, fresh text, at best", "Table 2, fresh text, trend", "What norms give",
        "Table 2, fresh text, narrow",
        "Table 2, fresh text, narrow", "Table 2, fresh text, allocations",
    ]  # fmt: skip


def test_the_first_page_shows_fresh_text_as_soon_as_seeds_judge_all_rows_there():
    found = whole(-0.05, 0.01)
    shown = headline.headline(found)
    assert (
        cells(shown, "Tucker [8,64,64]")[:2] == ["50", "100"]
        and "best of 3 settings" in shown
        and BELOW in shown
        and "read once" in shown
    )
    assert len(shown.splitlines()) == 6 + len(best.COMPARED)
    assert shown.splitlines()[-1] == " ".join(
        f"Tucker [8,128,128] minus {row}: +0.000 [+0.000, +0.000]." for row in ("GQA n_KV=4", "MLA separated d_c=128")
    )
    assert "arrower" not in shown
    for left_out in ("MHA", "MLA", "Tucker [8,64,64]"):  # control: of one row too few seeds
        few = [r for r in found if not (r.method.startswith(left_out) and r.seed > 2)]
        assert headline.headline(few) == "" and len(best.fullest(few)) == len(best.COMPARED)


def test_beside_it_stands_the_narrower_model_with_as_many_tokens():
    """Not with half as many or twice; and not before seeds judge all of its rows."""
    found, narrower = whole(-0.05, 0.01), narrow_study(0.02)
    shown = headline.headline(found + narrower)
    table = [line for line in shown.splitlines() if line.startswith("|")]
    plain = [line for line in headline.headline(found).splitlines() if line.startswith("|")]
    assert len(table) == len(plain) and all(line.startswith(before) for before, line in zip(plain, table))
    assert cells(shown, "MHA")[-2:] == ["", ""] and "Best of 3 settings, 6 seeds." in shown
    assert "12 tokens for each of MHA's parameters but the embedding's, not 0.76." in shown
    assert cells(shown, "Tucker [8,64,64]")[-2:] == cells(shown, "GQA n_KV=4")[-2:] == ["+0.020 [+0.020, +0.020]", "above"]
    for few in (  # controls
        [r for r in narrower if r.steps != 1980 or not r.seed],  # no pass but half a one, and two
        [r for r in narrower if not (r.method.startswith("MLA") and r.seed > 2)],
    ):
        assert best.judged_narrower(found + few) == {} and "arrower" not in headline.headline(found + few)
    assert best.judged_narrower(narrower) == {}  # beside nothing


def test_the_first_page_draws_the_rows_that_it_shows(tmp_path):
    found = whole(-0.05, 0.01)
    figures.draw_losses(found, tmp_path)
    assert (tmp_path / "best_loss_against_size.png").stat().st_size > 10_000
    figures.draw_losses([r for r in found if r.seed < 3], tmp_path / "few")
    assert not (tmp_path / "few").exists()  # control: too few


def test_the_sentence_on_competitive_says_the_losses_that_were_judged():
    said = lambda found: headline.six_verdicts(COMMITTED_BUT_FRESH + found).splitlines()[2]  # noqa: E731
    own = study(0.041, own=Row("Tucker", ranks=(8, 128, 64)))
    for found, word in ((own, "Fails here."), ([r for r in own if r.seed < 3], "Not resolved.")):
        assert said(found).startswith(f"- **{word}** ") and "(docs/training.md#muon-on-fresh-text) is 1.0 % above" in said(
            found
        )
    before = said([])  # control
    assert before.startswith("- **Not resolved.** ") and "(RESULTS.md#table-2-gpt-2) is 0.5 % above" in before
    left = {"diverged_at": 7, "attention_parameters": 100, "cache_per_token": 10}
    broken = [dataclasses.replace(r, metrics=left) if r.method.startswith("Tucker") else r for r in own]
    assert "competitive" not in headline.six_verdicts(COMMITTED_BUT_FRESH + broken)  # none ended


def llamas(losses: dict[str, float]) -> list[Record]:
    """Table 3 on fresh text: two rates with seed 0, five seeds of the better one."""
    found = []
    for row in TABLE3_BEST:
        loss = losses.get(row.label, 3.5)
        runs = [a_run(row, 0, loss + 0.1 * (rate < 9e-3), rate=rate, narrower=2, test=False) for rate in (4.8e-3, 9.6e-3)]
        runs += [a_run(row, seed, loss, rate=9.6e-3, narrower=2) for seed in JUDGES]
        llama = {"model": "llama", "d_model": 1024, "n_heads": 32, "n_layers": 4, "rope_base": 5e5}
        found += [dataclasses.replace(r, experiment="table3", config=r.config | llama) for r in runs]
    return found


def test_llamas_on_fresh_text_have_their_tables():
    rates, best_of, pairs = results.tables(llamas({}))["table3"]
    assert {table.name for table in (rates, best_of, pairs)} == {"Table 3, fresh text"}
    assert rates.note == "Every row was tried at as many rates: 2."
    assert "Llama 2 times narrower than the paper's with Muon" in best_of.title and "minus each larger one" in pairs.title
    assert cells(best_of.body, "Tucker [32,64,64]")[:2] == ["QK-norm, 0.0096", "2"]


def test_what_is_to_come_has_its_marks_and_says_that_there_is_no_record():
    assert set(pages.texts_of(pages.TO_COME, []).values()) == {pages.NONE_YET}
    found = whole(0.01, 0.002) + narrow_study() + judged_way("Tucker [8,64,64]", 1, 0.02) + llamas({})
    shown = pages.texts_of([name for name in pages.TO_COME if name.startswith("Table")], found)
    assert all(text.startswith("**") and pages.NONE_YET not in text for text in shown.values())
    assert shown["Table 2, fresh text, narrow"].count("each row at its best") == 3
    assert [name for name, text in shown.items() if "difference_against_tokens.png" in text] == ["Table 2, fresh text, trend"]


@pytest.mark.parametrize("above, word, said", [(0.0, "Not resolved.", "0.0 % above"), (0.036, "Fails here.", "1.0 % above")])
def test_the_sentence_on_a_tenth_says_the_losses_that_were_judged(above, word, said):
    own = llamas({"Tucker [32,64,64] QK-norm": 3.5 + above})
    shown = lambda found: headline.six_verdicts(COMMITTED_BUT_FRESH + found).splitlines()[3]  # noqa: E731
    assert shown(own).startswith(
        f"- **{word}**"
    ) and f"[loss](docs/training.md#llama-on-fresh-text) {said} in a small" in shown(own)
    assert "[loss](RESULTS.md#table-3-llama) 2.2 % above" in shown([])  # control
    broken = [r if (r.method, r.seed) != (TABLE3_BEST[-1].label, 3) else dataclasses.replace(r, metrics={
        "diverged_at": 7, "attention_parameters": 100, "cache_per_token": 10}) for r in own]  # fmt: skip
    assert "A tenth" not in headline.six_verdicts(COMMITTED_BUT_FRESH + broken)  # as where a validation run diverged


def made_again(tmp_path, loss: float) -> str:
    """What is said of the first judging run of the Tucker row, made once more and ending at this loss on validation text."""
    append(tmp_path, a_run(TUCKER.normed(), 1, loss, rate=9.6e-3))
    return again.render(study(0.0, spread=0.004), tmp_path)


@pytest.mark.parametrize("loss, word", [(4.003, "within"), (4.005, "outside"), (3.999, "outside")])
def test_a_run_that_was_made_once_more_stands_beside_the_first_one_and_its_row_s_seeds(tmp_path, loss, word):
    line = made_again(tmp_path, loss).splitlines()[-1]
    assert line.startswith("| Tucker [8,64,64] QK-norm, seed 1 | 4.1040 |") and line.endswith(f"| {word} |")
    assert f"| {loss + 0.1:.4f} | " in line and "| 4.1000 to 4.1040 |" in line


def test_a_run_that_is_not_on_record_or_whose_row_has_few_seeds_is_set_beside_nothing(tmp_path):
    assert made_again(tmp_path, 4.0)
    runs = study(0.0)
    assert not again.render([r for r in runs if r.seed != 1], tmp_path)  # not on record
    assert not again.render([r for r in runs if r.seed < SEEDS], tmp_path)  # too few seeds
    assert not again.render(runs, tmp_path / "nothing")


def test_what_was_made_once_more_was_made_at_another_time_by_the_same_command():
    first = {r.id: r for r in load_some(COMMITTED)}
    second = load_some(again.FOLDER)
    for own in second:
        assert own.finished > first[own.id].finished and own.metrics != first[own.id].metrics  # and no copy
        assert "+" not in own.commit
