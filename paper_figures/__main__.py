"""`python -m paper_figures`: redraw every figure for which there are records."""

from reproduce import console

if __name__ == "__main__":
    console.leave_at_once()  # on Ctrl-C: what follows takes seconds

import argparse
import sys
from functools import partial
from pathlib import Path

from reproduce.models.rows import TABLE2, TABLE3
from reproduce.report.best import judged_at_best
from reproduce.report.best import trend as trend_of
from reproduce.report.query import BUDGETS, alike, by_command, diverged, highest_rate, largest, runs_of, settled, unbroken
from reproduce.report.unfoldings import by_optimizer, models_of, short_name_of
from reproduce.store import records
from reproduce.store.records import Record

from . import breaking, curves, diagram, differences, layers, powers, rates, room, sizes, speed, style, trend, vision

IMAGES = Path(__file__).parent / "images"
CHOSEN = "gpu-tiny-imagenet"  # the preset of Figure 3 whose rates are chosen on held-out images
ROWS = {"table2": TABLE2, "table3": TABLE3}


@console.at_the_terminal
def main() -> int:
    """Redraw every figure as the command line says.

    Returns:
        0, or 1 after a message where records are damaged or nothing can be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures",
        description="Redraw every figure from records, offline, in a minute. Where there are runs on several data or budgets, "
        "those of which there are most are drawn. Of the committed records, runs at the preset smoke are not: a model that has "
        "barely begun to train says nothing of the paper.",
    )
    parser.add_argument(
        "--records", type=console.path, default=records.COMMITTED, help="folder of records (default: those committed)"
    )
    parser.add_argument(
        "--out",
        type=console.path,
        help="where the images go (default: those of this repository; of other records, out/figures)",
    )
    options = parser.parse_args()
    committed = options.records == records.COMMITTED
    out = options.out or (IMAGES if committed else Path("out/figures"))
    style.use(**style.ON_A_PAGE)
    everything = records.load_some(options.records)
    out.mkdir(parents=True, exist_ok=True)
    diagram.draw(out / "tucker_attention.png")
    draw_counts(everything, out)
    draw_losses(everything, out)
    draw_trained(everything, out, ("gpu",) if committed else ("smoke", "gpu"))
    draw_room(everything, out)
    draw_times(everything, out)
    print(f"figures are in {out}")
    return 0


def draw_counts(everything: list[Record], out: Path) -> None:
    """What needs no training: sizes."""
    gpt2, llama = runs_of(everything, "table2", "sizes"), runs_of(everything, "table3", "sizes")
    if gpt2:
        sizes.cache_against_context(gpt2, out / "cache_against_context.png")
    if gpt2 and llama:
        sizes.attention_parameters(gpt2, llama, out / "attention_parameters.png")


def draw_losses(everything: list[Record], out: Path) -> None:
    """What the rows of Tables 2 and 3 reach on a GPU, and at which rates."""
    for experiment in BUDGETS:
        ended = {label: group for label, group in settled(everything, experiment).items() if not diverged(group)}
        if ended:
            sizes.loss_against_size(everything, experiment, "parameters", out / f"loss_against_size_{experiment}.png")
            sizes.loss_against_size(everything, experiment, "cache", out / f"loss_against_cache_{experiment}.png")
        if runs := [r for row in ROWS[experiment] for r in ended.get(row.label, ())]:
            curves.learning_curves(runs, experiment, out / f"learning_curves_{experiment}.png")
    if sections := differences.sections_of(everything):
        differences.differences(sections, out / "differences_to_mha.png")
    if best := judged_at_best(everything):
        sizes.best_against_size(best, out / "best_loss_against_size.png")
    if points := trend_of(everything):
        trend.against_tokens(points, out / "difference_against_tokens.png")
    if ways := rates.sweep_ways(unbroken(everything)):
        rates.learning_rates(ways, 1.15, out / "learning_rates_gpt2.png")
    if ways := rates.full_budget_ways(unbroken(everything)):
        rates.learning_rates(ways, 1.05, out / "learning_rates_full_gpt2.png")
    if runs := highest_rate(everything):
        breaking.breaking_down(runs, out / "breaking_down_gpt2.png")
        breaking.what_grows(runs[0], out / "breaking_down_parts_gpt2.png")


def draw_trained(everything: list[Record], out: Path, presets: tuple[str, ...]) -> None:
    """What trained models hold and lose, at each of the presets."""
    of = partial(runs_of, everything)
    for preset in presets:
        if runs := largest(alike(of("spectra", preset))):
            layers.singular_values(runs, out / f"spectra_{preset}.png")
        runs = largest(alike(unbroken(of("figure3", preset))))
        if any(r.is_trained for r in runs):
            vision.accuracy_against_parameters(runs, out / f"accuracy_against_parameters_{preset}.png")
    runs = largest(alike([r for r in of("figure3", CHOSEN) if "start" not in r.config], any_rate=True))
    if len({r.seed for r in runs if r.is_trained and r.diverged_at is None}) > 1:  # the seed that chose rates judges nothing
        vision.chosen_accuracy_against_parameters(runs, out / f"accuracy_against_parameters_{CHOSEN}.png")
    for experiment in BUDGETS if "smoke" in presets else ():
        if runs := largest(alike(unbroken(of(experiment, "smoke")))):
            curves.learning_curves(runs, experiment, out / f"learning_curves_{experiment}_smoke.png")
    if runs := [r for r in of("compress", "smoke") if "loss" in r.metrics["before"]]:
        layers.compression(runs, out / "compression_smoke.png")


def draw_room(everything: list[Record], out: Path) -> None:
    """What models that others trained have room for, beside one of ours."""
    models = {name.removesuffix(" tokens"): runs for name, runs in models_of(everything).items()}
    if runs_of(everything, "spectra", "models"):
        room.median_spectra(models, out / "spectra_models.png")
        room.head_mode_loss(models, out / "head_mode_loss.png")
    if ours := {short_name_of(runs[0]): runs for runs in by_optimizer(everything).values()}:
        room.median_spectra(
            ours, out / "spectra_optimizers.png", "Singular values of GPT-2's attention, with AdamW and with Muon"
        )
        room.head_mode_loss(
            ours, out / "head_mode_loss_optimizers.png", "What fewer heads of GPT-2 lose, with AdamW and with Muon"
        )


def draw_times(everything: list[Record], out: Path) -> None:
    """Time and memory."""
    of = partial(runs_of, everything)
    if runs := of("compress_speed", "paper") or of("compress_speed", "smoke"):
        layers.compression_cost(runs, out / "compression_cost.png")
    if runs := largest(by_command(of("decode", "smoke"))):
        speed.decoding(runs, out / "decoding_smoke.png")
    sections = {r.method: r for r in of("speed", "gpu") or of("speed", "smoke")}
    if "contexts" in sections:
        speed.time_against_context(sections["contexts"], out / "time_against_context.png")
    if "curves" in sections:
        powers.costs_against_sizes(sections["curves"], out / "costs_against_sizes.png")
    if {"limits", "decode"} <= sections.keys():
        speed.decoding_on_gpu(list(sections.values()), out / "decoding_gpu.png")
    if {"limits", "layers", "decode"} <= sections.keys():
        speed.roofline(list(sections.values()), out / "roofline.png")


if __name__ == "__main__":
    sys.exit(main())
