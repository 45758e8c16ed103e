"""Figures come from records and from nothing else, and can be read."""

import dataclasses
import hashlib
import io
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import a_record, committed_records, write_records
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy import stats

from paper_figures import __main__ as figures_main
from paper_figures import curves, differences, labels, layers, powers, sizes, speed, style
from reproduce.report import judge, pairs
from reproduce.report.query import runs_of, settled
from reproduce.store import records
from tucker_ref import entropy_rank

ROOT = Path(__file__).parent.parent
COMMITTED = committed_records()
PAGE = 800 / 96  # inches: what 800 pixels are on a screen
SMALLEST = 8  # points


def too_small(figure: Figure) -> list[str]:
    """Texts that are below 8 points where the figure is shown on a page."""
    scale = min(1, PAGE / figure.get_figwidth())
    return [t.get_text() for t in figure.findobj(Text) if t.get_text().strip() and scale * t.get_fontsize() < SMALLEST]


def draw(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["paper_figures", *map(str, arguments)])
    return figures_main.main()


@pytest.mark.no_cover  # of which Matplotlib would take half as long again
def test_figures_are_redrawn_from_the_committed_records(tmp_path, monkeypatch):
    drawn, small, save = ({}, {}), {}, Figure.savefig

    def watched(figure, file, **options):
        title = figure.get_suptitle()
        small[title] = too_small(figure)
        save(figure, file, **options)
        drawn[title in drawn[0]][title] = hashlib.sha256(file.getvalue()).digest()

    def drawn_alone(figure, path, **options):
        figure.savefig(io.BytesIO(), pil_kwargs={"compress_level": 0}, **options)
        plt.close(figure)

    monkeypatch.setattr(Figure, "savefig", watched)
    assert draw(monkeypatch, "--out", tmp_path) == 0
    images = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(images) == {p.name for p in (ROOT / "paper_figures" / "images").iterdir()}
    assert all(len(content) > 10_000 for content in images.values())
    assert len(small) == len(drawn[0]) == len(images) and not any(small.values()), small
    monkeypatch.setattr(style, "write", drawn_alone)  # the next test is of how it is written
    assert draw(monkeypatch, "--out", tmp_path) == 0
    assert drawn[0] == drawn[1]  # the same records give the same pixels


def test_the_same_pixels_give_the_same_bytes(tmp_path):
    for name, title in (("a", "one"), ("b", "one"), ("c", "other")):
        figure = plt.figure(figsize=(2, 2))
        figure.suptitle(title)
        style.write(figure, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c  # control: other pixels


def test_small_texts_are_found():
    figure, ax = plt.subplots(figsize=(8, 3))
    ax.set_title("large")
    assert too_small(figure) == []
    ax.text(0, 0, "small", fontsize=7.5)
    assert too_small(figure) == ["small"]
    figure.set_figwidth(12)  # shown on a page, all of it shrinks
    assert "0.0" not in too_small(figure) and {"small"} <= set(too_small(figure))
    ax.xaxis.label.set(text="wide", fontsize=9)
    assert "wide" in too_small(figure)
    plt.close(figure)


@pytest.mark.no_cover
def test_runs_that_barely_began_are_drawn_of_other_records_alone(tmp_path, monkeypatch):
    committed = {p.name for p in (ROOT / "paper_figures" / "images").iterdir()}
    assert not {name for name in committed if "smoke" in name} - {"compression_smoke.png", "decoding_smoke.png"}
    write_records(tmp_path / "records", runs_of(COMMITTED, "table2", "smoke") + runs_of(COMMITTED, "spectra", "smoke"))
    assert draw(monkeypatch, "--records", tmp_path / "records", "--out", tmp_path / "images") == 0
    drawn = {p.name for p in (tmp_path / "images").iterdir()}
    assert {"learning_curves_table2_smoke.png", "spectra_smoke.png"} <= drawn


@pytest.mark.no_cover
def test_a_run_that_diverged_hides_no_other(tmp_path, monkeypatch):
    runs = runs_of(COMMITTED, "table2", "smoke")
    left = {name: runs[0].metrics[name] for name in ("attention_parameters", "cache_per_token", "curve")}
    broken = dataclasses.replace(runs[0], metrics=left | {"diverged_at": 7})
    for name, found, drawn in (("some", [broken, *runs[1:]], True), ("none", [broken], False)):
        write_records(tmp_path / name, found)
        assert draw(monkeypatch, "--records", tmp_path / name, "--out", tmp_path / name) == 0
        assert (tmp_path / name / "learning_curves_table2_smoke.png").exists() == drawn


def test_figures_of_other_records_leave_those_of_the_repository_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records.append(Path("records"), next(r for r in COMMITTED if r.experiment == "decode"))
    assert draw(monkeypatch, "--records", "records") == 0 and "figures are in out/figures" in capsys.readouterr().out
    assert Path("out/figures/tucker_attention.png").exists()
    assert draw(monkeypatch, "--records", "nowhere") == 1 and "nowhere holds no records" in capsys.readouterr().err


def test_every_mechanism_has_one_colour_of_its_own():
    assert len(set(style.COLOURS.values())) == len(style.COLOURS) == 4
    assert style.mechanism("MQA") == "GQA" and style.mechanism("Tucker [8,64,64]") == "Tucker"
    styles = style.lines_of(["MHA", "GQA n_KV=4", "MQA", "Tucker [1,2,3]", "Tucker [1,2,2]"])
    assert styles["GQA n_KV=4"]["color"] == styles["MQA"]["color"] != styles["MHA"]["color"]
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == 5


def contrast(colour: str) -> float:
    """To white, as the Web Content Accessibility Guidelines count it."""
    channels = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)


def test_coloured_words_can_be_read():
    assert all(contrast(ink) > 4.5 for ink in style.INKS.values())
    assert contrast(style.COLOURS["MLA"]) < 4.5  # control: its marks are too light for words


def test_names_of_points_cover_nothing():
    figure, ax = plt.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5, 0.5, "first", "k"), (0.52, 0.51, "second", "k"), (0.99, 0.5, "third", "k"), (0.1, 0.5, "fourth", "k")]
    ax.errorbar(0.13, 0.5, yerr=0.03)
    bar = Bbox(ax.transData.transform([(0.13, 0.47), (0.13, 0.53)]))
    labels.name_points(ax, points)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert {text.get_text() for text in ax.texts} == {name for _, _, name, _ in points}
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(ax.bbox.contains(*box.max) and not bar.overlaps(box) for box in boxes)
    beside = [labels.write(ax, point, labels.PLACES[0]) for point in points]
    boxes = [text.get_window_extent() for text in beside]  # control: the first place for all
    assert boxes[0].overlaps(boxes[1]) and not ax.bbox.contains(*boxes[2].max) and bar.overlaps(boxes[3])
    plt.close(figure)


def test_a_name_without_a_free_place_is_written_all_the_same():
    figure, ax = plt.subplots(figsize=(0.3, 0.3))
    labels.name_points(ax, [(0.5, 0.5, "longer than the axes are wide", "k")])
    assert len(ax.texts) == 1
    plt.close(figure)


def overlaps(places, heights) -> bool:
    low, high = (sorted((p + sign * h / 2, p) for p, h in zip(places, heights)) for sign in (-1, 1))
    return any(a[0] > b[0] + 1e-9 for a, b in zip(high, low[1:]))


def test_names_at_the_ends_of_lines_are_moved_apart_no_further_than_they_must():
    places, heights = [0.5, 0.52, 0.1, 0.51, 0.99], [0.05, 0.05, 0.05, 0.1, 0.05]
    moved = labels.moved_apart(places, heights)
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert overlaps(places, heights) and not overlaps(moved, heights)
    assert moved[2] == pytest.approx(0.1) and moved[4] == pytest.approx(0.99)  # these two were free
    assert np.mean([moved[n] for n in (0, 1, 3)]) == pytest.approx(0.51, abs=0.01)


def with_loss(seed: int, loss: float, **given) -> records.Record:
    return a_record(seed=seed, metrics={"validation_loss": loss}, **given)


def test_differences_are_paired_by_seed():
    base = [with_loss(seed, loss) for seed, loss in enumerate((3.0, 3.5, 3.2))]
    row = [with_loss(seed, loss) for seed, loss in ((2, 3.26), (0, 3.04), (1, 3.53), (7, 9.0))]  # nobody else has seed 7
    ours, theirs = np.array([3.04, 3.53, 3.26]), np.array([3.0, 3.5, 3.2])
    known = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = judge.metric_difference(row, base, "validation_loss", seeds=2)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-3) and found.over == "3 seeds"
    assert found.value == pytest.approx((ours - theirs).mean())
    apart = stats.ttest_ind(ours, theirs).confidence_interval(0.95)
    assert apart.low < 0 < found.low  # control: what the seeds share would hide the difference
    assert judge.metric_difference(row, base, "validation_loss", seeds=4) is None
    alone = pairs.paired_difference(row[1:2], base)
    assert alone.low == alone.high == pytest.approx(0.04) and alone.over == "one seed"
    assert pairs.paired_difference(row[-1:], base) is None


def test_every_row_that_ended_stands_in_the_forest_plot():
    sections = differences.sections_of(COMMITTED)
    rows = {label for lines in sections.values() for label in lines}
    every = settled(COMMITTED, "table2").keys() | settled(COMMITTED, "table3").keys()
    assert rows >= every - {"MHA"} and "MHA" not in rows and len(rows) > len(every)  # and what was trained otherwise
    assert all(list(lines.values()) == sorted(lines.values(), key=lambda e: e.value) for lines in sections.values())
    assert differences.sections_of([r for r in COMMITTED if not r.method.startswith("MHA")]) == {}


def test_of_a_row_s_changed_settings_the_lowest_is_drawn_where_it_helps():
    rows = {label: group for label, group in settled(COMMITTED, "table2").items()}
    tried = differences.changed(COMMITTED, rows["MHA"][0])
    chosen = sizes.lower_than_as_they_are(rows, tried)
    assert chosen.keys() == {"Tucker [8,128,128], factors at a quarter of the rate", "Tucker [12,256,256], normalised latents"}
    assert {r.rate for r in chosen["Tucker [8,128,128], factors at a quarter of the rate"]} == {0.0048}  # 0.0024 ended higher
    assert any("MHA" in method for method, _ in tried)  # control: what ended above the row as it is was tried too


@pytest.mark.parametrize("label", ["GQA n_KV=2", "Tucker [8,64,64]"])
def test_the_spectrum_at_the_start_is_that_of_the_run(label):
    (record,) = [r for r in runs_of(COMMITTED, "spectra", "gpu") if r.method == label]
    state = torch.get_rng_state()
    start = layers.initial(record.config)
    assert torch.equal(state, torch.get_rng_state())
    for side, spectra in zip(("pre", "post"), start):
        for (mode, measured), values in zip(record.metrics["initial"][0][side].items(), spectra):
            ours = entropy_rank(torch.from_numpy(values))
            assert ours == pytest.approx(measured["entropy_rank"], rel=0.01), mode
            trained = record.metrics["trained"][0][side][mode]["entropy_rank"]
            assert trained < 0.97 * ours, mode  # control: training moves each of them further than that


def test_every_case_of_decoding_is_named_once():
    rows = next(r for r in runs_of(COMMITTED, "speed", "gpu") if r.method == "decode").metrics["rows"]
    named = [
        f"{point[2].split(': ')[0]} {case}"
        for point in speed.decode_points(rows)
        for case in point[2].split(": ")[1].split(", ")
    ]
    cases = {(r["side"], r["context"], r["batch"]) for r in rows}
    assert len(named) == len(set(named)) == len(cases) > len(speed.decode_points(rows))


def test_decoding_is_drawn_where_multi_head_attention_and_all_latents_were_timed():
    rows = next(r for r in runs_of(COMMITTED, "speed", "gpu") if r.method == "decode").metrics["rows"]
    cases = [(8192, 16), (131072, 1), (16384, 64)]
    ours = [r for r in rows if (r["context"], r["batch"]) in cases and r["side"] in ("MHA", "latents 128/128", "latents 64/64")]
    first = next(r for r in ours if r["side"] == "MHA")
    more = [{**first, "context": 77}, {**first, "side": "GQA n_KV=8"}, {**first, "side": "MLA"}]  # no latents; other mechanisms
    assert speed.comparable(ours + more) == ours


def test_a_flat_curve_is_drawn_without_a_warning(monkeypatch, tmp_path):
    """All rows lose alike at every step: there is no range to leave a margin in, and matplotlib would warn of limits that coincide."""
    runs = records.load(records.COMMITTED, "table2", "smoke")
    flat = [
        dataclasses.replace(r, metrics=r.metrics | {"curve": [[n, 1.0, 1.0] for n, *_ in r.metrics["curve"]]}) for r in runs
    ]
    seen = []
    monkeypatch.setattr(style, "write", lambda figure, path, **_: (seen.append(figure.axes[1].get_ylim()), plt.close(figure)))
    for some in (flat, runs):
        curves.learning_curves(some, "table2", tmp_path / "c.png")
    assert seen[0][0] < 0 < seen[0][1] and seen[1] != seen[0]


@pytest.mark.parametrize("kept", ["one case without its latents", "no multi-head attention"])
def test_a_case_of_decoding_that_was_not_timed_is_left_out(kept, monkeypatch, tmp_path):
    runs = [r for r in runs_of(COMMITTED, "speed", "gpu") if r.method in ("limits", "decode")]
    (first, *_) = rows = next(r for r in runs if r.method == "decode").metrics["rows"]
    of_first = lambda r: (r["context"], r["batch"]) == (first["context"], first["batch"])  # noqa: E731
    if kept == "no multi-head attention":
        rows = [r for r in rows if r["side"] != "MHA"]
    else:
        rows = [r for r in rows if r["side"] == "MHA" or not of_first(r)]
    titles = []
    monkeypatch.setattr(speed, "save", lambda figure, path, title, caption: titles.append(title) or plt.close(figure))
    some = [dataclasses.replace(r, metrics={"rows": rows}) if r.method == "decode" else r for r in runs]
    speed.decoding_on_gpu(some, tmp_path / "decoding.png")
    speed.decoding_on_gpu(runs, tmp_path / "decoding.png")  # control
    assert titles[1].startswith("Decoding on NVIDIA H200: 8.8 to 26 times as fast from latents")
    assert (titles[0] == "Decoding on NVIDIA H200") == (kept == "no multi-head attention")


def test_every_point_of_the_curves_is_drawn_beside_the_exponent_of_its_law(monkeypatch, tmp_path):
    (run,) = [r for r in runs_of(COMMITTED, "speed", "gpu") if r.method == "curves"]
    seen = []

    def watched(figure, *_):
        lines = [[line for line in ax.lines if line.get_linestyle() == "None"] for ax in figure.axes]
        legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
        seen.append((figure, sum(len(line.get_xdata()) for panel in lines for line in panel), legends))
        plt.close(figure)

    monkeypatch.setattr(powers, "save", watched)
    powers.costs_against_sizes(run, tmp_path / "powers.png")
    figure, points, legends = seen[0]
    assert len(figure.axes) == 5 * 3 and points == 5 * len(run.metrics["rows"])
    assert legends[0] == ["MHA: 2.00", "[8,64,64]: 0.83"] and legends[3][1] == "[8,64,64]: 0.00"
    rows = [r | {"megabytes": None, "parameters": 7} for r in run.metrics["rows"] if r["value"] not in (512, 2048)]
    powers.costs_against_sizes(dataclasses.replace(run, metrics={"rows": rows}), tmp_path / "powers.png")
    figure, points, legends = seen[1]  # control: no memory, and no law through two points
    assert len(figure.axes) == 4 * 3 and points == 4 * len(rows)
    assert legends[0] == [] and legends[1] == ["MHA: 0.00", "[8,64,64]: 0.00"]
