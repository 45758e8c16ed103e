"""`python -m paper_figures`: redraw every figure for which there are records."""

import argparse
import sys
from functools import partial
from pathlib import Path

from reproduce.report.query import BUDGETS, alike, by_command, diverged, highest_rate, largest, runs_of, settled, unbroken
from reproduce.store import records

from . import diagram, figures, style

IMAGES = Path(__file__).parent / "images"


def main() -> int:
    """Redraw every figure as the command line says.

    Returns:
        0, or 1 after a message where records are damaged or nothing can be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures",
        description="Redraw every figure from records, offline, in seconds. Where there are runs on several data or budgets, "
        "those of which there are most are drawn.",
    )
    parser.add_argument("--records", type=Path, default=records.COMMITTED, help="folder of records (default: those committed)")
    parser.add_argument(
        "--out", type=Path, help="where the images go (default: those of this repository; of other records, out/figures)"
    )
    options = parser.parse_args()
    out = options.out or (IMAGES if options.records == records.COMMITTED else Path("out/figures"))
    style.use()
    try:
        draw_all(options.records, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"figures are in {out}")
    return 0


def draw_all(folder: Path, out: Path) -> None:
    """Draw every figure for which there are records.

    Args:
        folder: of the records.
        out: of the images, made if need be.

    Raises:
        ValueError: where there is no record, or one is damaged.
    """
    everything = records.load_some(folder)
    out.mkdir(parents=True, exist_ok=True)
    diagram.draw(out / "tucker_attention.png")
    of = partial(runs_of, everything)

    gpt2, llama = of("table2", "sizes"), of("table3", "sizes")
    if gpt2:
        figures.cache_against_context(gpt2, out / "cache_against_context.png")
    if gpt2 and llama:
        figures.attention_parameters(gpt2, llama, out / "attention_parameters.png")
    for experiment in BUDGETS:
        if runs := largest(alike(unbroken(of(experiment, "smoke")))):
            figures.loss_curves(runs, experiment, out / f"loss_curves_{experiment}_smoke.png")
    if panels := figures.sweep_panels(unbroken(everything)):
        figures.learning_rates(panels, 1.15, out / "learning_rates_gpt2.png")
    if panels := figures.full_budget_panels(unbroken(everything)):
        figures.learning_rates(panels, 1.05, out / "learning_rates_full_gpt2.png")
    if runs := highest_rate(everything):
        figures.breaking_down(runs, out / "breaking_down_gpt2.png")
    for experiment in BUDGETS:
        if any(not diverged(group) for group in settled(everything, experiment).values()):
            figures.loss_against_size(everything, experiment, out / f"loss_against_size_{experiment}.png")
    for preset in ("smoke", "gpu"):
        if runs := largest(alike(of("spectra", preset))):
            figures.singular_values(runs, out / f"spectra_{preset}.png")
        runs = largest(alike(unbroken(of("figure3", preset))))
        if any(r.is_trained for r in runs):
            figures.accuracy_against_parameters(runs, out / f"accuracy_against_parameters_{preset}.png")
    if runs := of("compress", "smoke"):
        figures.compression(runs, out / "compression_smoke.png")
    if runs := of("compress_speed", "paper") or of("compress_speed", "smoke"):
        figures.compression_cost(runs, out / "compression_cost.png")
    if runs := largest(by_command(of("decode", "smoke"))):
        figures.decoding(runs, out / "decoding_smoke.png")
    speed = {r.method: r for r in of("speed", "gpu") or of("speed", "smoke")}
    if "contexts" in speed:
        figures.time_against_context([speed["contexts"]], out / "time_against_context.png")
    if {"limits", "layers", "decode"} <= speed.keys():
        figures.roofline(list(speed.values()), out / "roofline.png")


if __name__ == "__main__":
    sys.exit(main())
