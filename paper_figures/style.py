"""One look for all figures: fonts, grid, and one colour per mechanism (Okabe & Ito's palette, safe for colour-blind readers)."""

import matplotlib

matplotlib.use("Agg")  # draws to files only, on machines without a screen too
import matplotlib.pyplot as plt

COLOURS = {"MHA": "#222222", "GQA": "#0072B2", "MLA": "#E69F00", "Tucker": "#009E73"}
MARKERS = {"MHA": "s", "GQA": "o", "MLA": "^", "Tucker": "D"}
LINES = ("-", "--", ":", "-.")  # rows of one mechanism share the colour and differ in the line


def mechanism(label: str) -> str:
    """The mechanism of a row label; MQA is GQA with one group.

    Args:
        label: such as "Tucker [8,64,64]".

    Returns:
        A key of COLOURS.
    """
    first = label.split()[0].rstrip(",")
    return "GQA" if first == "MQA" else first


def lines_of(labels: list[str]) -> dict[str, dict]:
    """Colour and line style for each row label.

    Args:
        labels: in the order in which line styles are given out.

    Returns:
        Arguments of matplotlib's `plot` by label.
    """
    seen: dict[str, int] = {}
    styles = {}
    for label in labels:
        kind = mechanism(label)
        styles[label] = {"color": COLOURS[kind], "linestyle": LINES[seen.get(kind, 0) % len(LINES)]}
        seen[kind] = seen.get(kind, 0) + 1
    return styles


def use() -> None:
    """Set matplotlib's defaults."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 100,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "savefig.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "legend.handlelength": 3.2,
            "lines.linewidth": 1.8,
        }
    )
