"""The picture of the idea: an attention tensor, and the core and three factors that stand for it. Drawn, not measured."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Polygon, Rectangle

from .style import COLOURS, write

FACES = {"front": 0.95, "top": 0.75, "side": 0.55}  # opacity


def box(ax, x, y, width, height, depth, colour) -> None:
    """A box in oblique projection.

    Args:
        ax: what it is drawn on.
        x, y: the lower left corner of its front.
        width, height, depth: of the box, in the axes' units.
        colour: of all faces, which differ in opacity.
    """
    dx, dy = 0.55 * depth, 0.45 * depth
    corners = {
        "front": [(x, y), (x + width, y), (x + width, y + height), (x, y + height)],
        "top": [(x, y + height), (x + width, y + height), (x + width + dx, y + height + dy), (x + dx, y + height + dy)],
        "side": [(x + width, y), (x + width + dx, y + dy), (x + width + dx, y + height + dy), (x + width, y + height)],
    }
    for face, points in corners.items():
        ax.add_patch(Polygon(points, facecolor=colour, alpha=FACES[face], edgecolor="white", linewidth=1.2))


@plt.rc_context({"font.size": 10})
def draw(path: Path) -> None:
    """Draw the picture.

    Args:
        path: of the PNG file.
    """
    figure, ax = plt.subplots(figsize=(9.6, 4.2))
    dense, core, factor = "#777777", COLOURS["Tucker"], "#005c44"  # what Tucker Attention trains is green

    box(ax, 0.0, 1.0, 2.6, 2.6, 1.6, dense)
    ax.text(1.3, 2.3, "$W$\n$n_H \\times d \\times d$", color="white", ha="center", va="center", fontsize=13)
    ax.text(-0.15, 2.3, "query", rotation=90, ha="right", va="center")
    ax.text(1.3, 0.85, "key", ha="center", va="top")
    ax.text(3.15, 1.1, "head", ha="left", va="center", rotation=38)

    ax.text(4.35, 2.3, "=", fontsize=24, ha="center", va="center")

    ax.add_patch(Rectangle((5.0, 1.0), 0.8, 2.6, facecolor=factor, alpha=0.9))
    ax.text(5.4, 2.3, "$U_2$\n$d \\times r_2$", color="white", ha="center", va="center", fontsize=9.5)
    ax.text(5.4, 0.85, "query\nlatent", ha="center", va="top")

    box(ax, 6.3, 1.9, 0.95, 0.8, 0.7, core)
    ax.text(6.78, 2.3, "$C$", color="white", ha="center", va="center", fontsize=13)
    ax.text(6.78, 1.75, "core\n$r_1 \\times r_2 \\times r_3$", ha="center", va="top")

    ax.add_patch(Rectangle((7.9, 1.9), 2.6, 0.8, facecolor=factor, alpha=0.9))
    ax.text(9.2, 2.3, "$U_3^{\\top}$   $r_3 \\times d$", color="white", ha="center", va="center", fontsize=10)
    ax.text(
        10.7, 2.3, "makes the key latent: one for all\nheads, which the cache keeps,\nas it keeps a value latent", va="center"
    )

    ax.add_patch(Polygon([(7.0, 3.15), (7.85, 3.15), (8.75, 3.9), (7.9, 3.9)], facecolor=factor, alpha=0.9))
    ax.text(7.88, 3.52, "$U_1$", color="white", ha="center", va="center", fontsize=11)
    ax.text(
        8.95, 3.52,
        "$n_H \\times r_1$: the heads share a basis. Of these\nmechanisms only Tucker Attention compresses this mode.",
        va="center",
    )  # fmt: skip

    ax.text(
        0.0, 4.75, "Before the softmax, attention is one third-order tensor. Tucker Attention trains it in this form.",
        fontsize=12, fontweight="bold",
    )  # fmt: skip
    ax.text(
        0.0, -0.25,
        "Logits of head $i$:  $X\\,W_i\\,X^{\\top}$, scaled by $1/\\sqrt{d_H}$. A second tensor of the same form, with a core and factors "
        "of its own, acts after\nthe softmax (head, output, value). Multi-head, grouped-query and latent attention are "
        "special choices of core and factors.\n"
        "In the code $n_H$ is h, and $r_1$, $r_2$, $r_3$ are r, s, t; after the softmax they are u, o, v.",
        va="top",
    )  # fmt: skip
    ax.set(xlim=(-0.6, 13.9), ylim=(-1.4, 5.0), aspect="equal")
    ax.axis("off")
    write(figure, path, bbox_inches="tight")
