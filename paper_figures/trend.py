"""How far each row is from multi-head attention, the more tokens there are for each parameter."""

from pathlib import Path

import numpy as np

from reproduce.report.judge import MARGIN, Estimate

from .labels import name_ends
from .style import COLOURS, INKS, MARKERS, describe, lines_of, logarithmic, mechanism, panels, save


def against_tokens(points: dict[str, list[tuple[float, Estimate]]], path: Path) -> None:
    """One line for each row, over both sizes of the model and all budgets.

    Args:
        points: as `reproduce.report.best.trend` gives them, at least one row.
        path: of the file.
    """
    figure, ax = panels(1, 1, 4.2)
    ax.axhspan(-MARGIN, MARGIN, color="#bbbbbb", alpha=0.4, linewidth=0)
    ax.axhline(0, color=COLOURS["MHA"], linewidth=0.8)
    ends = []
    for n, (label, own) in enumerate(points.items()):
        kind, shift = mechanism(label), 1 + 0.015 * (n - len(points) / 2)  # of one budget side by side
        tokens = np.array([x for x, _ in own]) * shift
        ax.plot(tokens, [e.value for _, e in own], **lines_of(list(points))[label] | {"linewidth": 1.1})
        for x, (_, e) in zip(tokens, own):
            ax.plot((x, x), (e.low, e.high), color=COLOURS[kind], linewidth=1.2)
            ax.plot(x, e.value, MARKERS[kind], color=COLOURS[kind], markerfacecolor=COLOURS[kind] if e.of_seeds else "white")
        ends.append((tokens[-1], own[-1][1].value, label, INKS[kind]))
    ax.set(xscale="log", xlabel="training tokens for each parameter of the multi-head model (but the embedding's)")
    ax.set_ylabel("test loss minus that of MHA (nats per token)")
    logarithmic(ax.xaxis)
    title = "Test loss beside multi-head attention, against tokens per parameter"
    caption = (
        "GPT-2 with Muon on fresh text, REDUCED BUDGET; left: the paper's shape, right: four times narrower. Bars: 95 % "
        f"intervals between seeds; hollow: too few seeds, intervals over articles. Grey: within {MARGIN:g} nats."
    )
    describe(figure, title, caption)
    name_ends(ax, ends)
    save(figure, path, title, caption)
