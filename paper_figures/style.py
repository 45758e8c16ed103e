"""One look for all figures: fonts, grid, one colour per mechanism, a title above and what was run below."""

import textwrap
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files only, on machines without a screen too
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from reproduce.store.files import write_atomically

COLOURS = {"MHA": "#222222", "GQA": "#0072B2", "MLA": "#E69F00", "Tucker": "#009E73"}  # Okabe & Ito's, for all readers' eyes
INKS = COLOURS | {"MLA": "#946300", "Tucker": "#00704F"}  # the same for words, which need more contrast to white
MARKERS = {"MHA": "s", "GQA": "o", "MLA": "^", "Tucker": "D"}
LINES = ("-", "--", ":", "-.")  # rows of one mechanism share the colour and differ in the line
GREY = "#777777"  # what is no mechanism: limits, references
SMALL = 8.5  # points, of names beside points and of captions: nothing is smaller
WIDTH = 8.0  # inches: 800 pixels of a page show a figure at about its size, so that points are points


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


def use(**more) -> None:
    """Set matplotlib's defaults, and `more` of them."""
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
            **more,
        }
    )


# A page's figures: exactly as wide as it, and sharp where a screen has two dots to a pixel.
ON_A_PAGE = {
    "savefig.dpi": 200,
    "savefig.bbox": None,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "legend.fontsize": SMALL,
    "lines.linewidth": 1.6,
}


def panels(rows: int, columns: int, height: float, **options):
    """plt.subplots as wide as a page; height: in inches."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def save(figure: Figure, path: Path, title: str, caption: str) -> None:
    """Put the title above, the caption below, and write the file: the same records give the same bytes.

    Args:
        figure: made by `panels`.
        path: of the PNG file.
        title: what is seen.
        caption: what was run: scale, tokens, seeds, and what the marks mean.
    """
    describe(figure, title, caption)
    write(figure, path)


def describe(figure: Figure, title: str, caption: str) -> None:
    """Title and caption of a figure, broken into lines.  Who places names by hand calls it before; `save` then changes nothing."""
    figure.suptitle(textwrap.fill(title, 86, break_on_hyphens=False), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(
        textwrap.fill(caption, 122, break_on_hyphens=False), x=0.01, ha="left", fontsize=SMALL, color="#444444", linespacing=1.3
    )


def write(figure: Figure, path: Path, **options) -> None:
    """Write a PNG file of 256 colours, a third as large as one of all, and close the figure; options: of `savefig`."""
    drawn = BytesIO()
    figure.savefig(drawn, pil_kwargs={"compress_level": 0}, **options)  # it is compressed once, below
    plt.close(figure)
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: image.save(file, "png", optimize=True))


def logarithmic(axis, subs: tuple[int, ...] = (1, 2, 5), words=lambda x: f"{x:,g}") -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, written out.

    Args:
        axis: ax.xaxis or ax.yaxis, whose scale is logarithmic.
        subs: other multiples.
        words: value -> its tick's text.
    """
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: words(x)))
    axis.set_minor_locator(LogLocator(subs=()))


def in_thousands(x: float) -> str:
    """ "500k", "2M"."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k"
