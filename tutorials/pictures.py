"""The pictures of the lessons, one call each: what they show is computed in the lesson, how it is drawn stands here."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text

from paper_figures import style
from paper_figures.diagram import box

DPI = 150
SMALLEST = 8  # points


def panels(rows: int, columns: int, size: tuple[float, float], grid: bool = True, **options):
    """plt.subplots at the resolution of all these pictures; images want no grid."""
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained", **options)
    for ax in [] if grid else np.ravel(axes):
        ax.grid(False)
    return figure, axes


def legible(figure: Figure) -> Figure:
    """The figure, if every text in it can be read on a page."""
    small = [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_fontsize() < SMALLEST]
    if small or figure.dpi < DPI:
        raise ValueError(f"{figure.dpi} dots per inch and texts below {SMALLEST} points: {small}; at least {DPI} and none")
    return figure


def photographs(versions: dict[str, np.ndarray]) -> Figure:
    """00: versions of one photograph side by side, (row, column, colour) or (row, column), each under its name."""
    figure, axes = panels(1, len(versions), (3.2 * len(versions), 2.7), grid=False)
    for ax, (name, version) in zip(axes, versions.items()):
        ax.imshow(version.clip(0, 1), cmap="gray", aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=10)
        ax.set(xticks=[], yticks=[], xlabel="column", ylabel="row" if ax is axes[0] else "")
    return legible(figure)


def unfoldings(picture: np.ndarray, unfolded: list[np.ndarray]) -> Figure:
    """00: a photograph (rows, columns, 3) and its three unfoldings; of the third, the columns of one row of the picture."""
    rows, columns, _ = picture.shape
    figure, axes = panels(1, 4, (11, 2.6), grid=False, width_ratios=[1.3, 2, 1.7, 2])
    axes[0].imshow(picture, interpolation="nearest")
    axes[0].set(title=f"Tensor {picture.shape}", xlabel="column", ylabel="row")
    middle = slice(rows // 2 * columns, (rows // 2 + 1) * columns)  # one row of the picture, all its columns
    shown = [unfolded[0], unfolded[1], unfolded[2][:, middle]]
    for mode, (ax, matrix, name) in enumerate(zip(axes[1:], shown, ("row", "column", "colour")), start=1):
        ax.imshow(matrix, cmap="gray", aspect="auto", interpolation="nearest")
        ax.set(title=f"Mode {mode}: {unfolded[mode - 1].shape}", ylabel=name, xlabel="the other two")
    axes[3].set(
        xlabel=f"{columns} of its columns: picture row {rows // 2}", yticks=range(3), yticklabels=["red", "green", "blue"]
    )
    return legible(figure)


def core_times_factors(
    shape: tuple, ranks: tuple, names: tuple = ("first", "second", "third"), tensor: str = "T", sign: str = "="
) -> Figure:
    """00, 01, 05, 08: a tensor, and the core and three factors that stand for it; lengths are square roots of the sizes.

    names: of the three modes.  tensor: its letter.  sign: between the two.
    """
    figure, ax = panels(1, 1, (9, 3.4))
    unit = max(1.4, np.sqrt(max(shape)) / 5.5)
    (depth, height, width), (r_depth, r_height, r_width) = np.sqrt(shape) / unit, np.sqrt(ranks) / unit
    dense, core, factor = "#777777", style.COLOURS["Tucker"], "#005c44"
    label = dict(ha="center", va="center")

    box(ax, 0, -height / 2, width, height, depth, dense)
    ax.text(width / 2, 0, f"${tensor}$", color="white", fontsize=13, **label)
    ax.text(-0.1, 0, f"{names[1]}: {shape[1]}", rotation=90, ha="right", va="center")
    ax.text(width / 2, -height / 2 - 0.1, f"{names[2]}: {shape[2]}", ha="center", va="top")
    ax.text(width + 0.3 * depth + 0.1, -height / 2 + 0.05 * depth, f"{names[0]}: {shape[0]}", ha="left", va="center")

    x = width + 0.55 * depth + 1.9
    ax.text(x - 0.6, 0, sign, fontsize=22, **label)
    ax.add_patch(Rectangle((x, -height / 2), r_height, height, facecolor=factor))
    ax.text(x + r_height / 2, 0, "$U_2$", color="white", **label)
    ax.text(x + r_height / 2, -height / 2 - 0.1, f"{shape[1]} × {ranks[1]}", ha="center", va="top")

    x += r_height + 0.5
    box(ax, x, -r_height / 2, r_width, r_height, r_depth, core)
    ax.text(x + r_width / 2, 0, "$C$", color="white", fontsize=13, **label)
    ax.text(x + r_width / 2, -r_height / 2 - 0.1, f"core\n{ranks[0]} × {ranks[1]} × {ranks[2]}", ha="center", va="top")
    x_1, y_1 = x + 0.55 * r_depth, r_height / 2 + 0.45 * r_depth + 0.25  # U_1 lies behind the core, along the first mode
    lean = np.array([0.55, 0.45]) * depth
    corners = [(x_1, y_1), (x_1 + r_depth, y_1), (x_1 + r_depth + lean[0], y_1 + lean[1]), (x_1 + lean[0], y_1 + lean[1])]
    ax.add_patch(Polygon(corners, facecolor=factor))
    size_1, narrow = f"{shape[0]} × {ranks[0]}", r_depth < 0.8  # too narrow for a letter
    if not narrow:
        ax.text(x_1 + (r_depth + lean[0]) / 2, y_1 + lean[1] / 2, "$U_1$", color="white", **label)
    beside = x_1 + r_depth + lean[0] + 0.15, y_1 + lean[1] / 2
    ax.text(*beside, f"$U_1$: {size_1}" if narrow else size_1, ha="left", va="center")

    x += r_width + 0.55 * r_depth + 0.6
    ax.add_patch(Rectangle((x, -r_width / 2), width, r_width, facecolor=factor))
    ax.text(x + width / 2, 0, "$U_3^\\top$", color="white", **label)
    ax.text(x + width / 2, -r_width / 2 - 0.1, f"{ranks[2]} × {shape[2]}", ha="center", va="top")
    top = max(height / 2 + 0.45 * depth, y_1 + lean[1])
    ax.set(xlim=(-0.7, x + width + 0.6), ylim=(-height / 2 - 0.8, top + 0.1), aspect="equal")
    ax.axis("off")
    return legible(figure)


def falling(spectra: dict[str, list[np.ndarray]], modes: tuple[str, str, str]) -> Figure:
    """00, 03, 04: singular values of the three unfoldings, a curve for each tensor; where one ends, its rank ends."""
    figure, axes = panels(1, 3, (10, 2.9), sharey=True)
    lines = dict(style.lines_of(list(spectra))) if "MHA" in spectra else {}
    for name, values in spectra.items():
        look = lines.get(name, {"color": style.COLOURS["Tucker"], "linestyle": ":" if name == "shuffled" else "-"})
        for ax, sigma in zip(axes, values):
            sigma = sigma[sigma > 1e-10 * sigma[0]]
            ax.plot(range(1, len(sigma) + 1), sigma / sigma[0], marker=".", label=name, **look)
    for number, (ax, mode) in enumerate(zip(axes, modes), start=1):
        ax.set(title=f"Mode {number}: {mode}", xlabel="number of the singular value", ylim=0)
    axes[0].set_ylabel("relative to the largest")
    axes[0].legend()
    return legible(figure)


def who_looks_where(word: str, heads: dict[str, list[tuple[int, int]]]) -> Figure:
    """01: for each head a line from every letter of the word, above, to the letters that it looks at, below.

    heads: pairs (query, source) by the head's name.
    """
    figure, axes = panels(1, len(heads), (3.6 * len(heads), 2.3))
    for ax, (name, pairs) in zip(axes, heads.items()):
        for query, source in pairs:
            ax.plot([query, source], [0.92, 0.08], color=style.COLOURS["GQA"], linewidth=1, alpha=0.7)
        for place, letter in enumerate(word):
            ax.text(place, 1.0, letter, ha="center", va="bottom", fontsize=12)
            ax.text(place, 0.0, letter, ha="center", va="top", fontsize=12)
        ax.set(title=name, xlim=(-0.7, len(word) - 0.3), ylim=(-0.25, 1.25))
        ax.axis("off")
    return legible(figure)


def tucker_of_heads(
    core: np.ndarray, factors: list[np.ndarray], heads: list[str], features: list[str], latents: list[str]
) -> Figure:
    """01: core (r, s, t) and factors (h, r), (d, s), (d, t) of heads whose features have names.

    latents: names of the query latents; the first t of them are the key latents' as well.
    """
    patterns = len(core)
    figure, axes = panels(1, 3 + patterns, (11, 4.2), grid=False, width_ratios=[1.0, 1.5, 1.5, *[1.7] * patterns])
    titles = ["$U_1$: heads", "$U_2$: queries", "$U_3$: keys", *(f"$C$, pattern {n}" for n in range(patterns))]
    rows, columns = [heads, features, features], ["pattern", "query latent", "key latent"]
    for ax, table, title in zip(axes, [*factors, *core], titles):
        ax.imshow(table, cmap="Greens", vmin=0, vmax=1.2)
        for (i, j), value in np.ndenumerate(table):
            if value:
                ax.text(j, i, f"{value:g}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(table.shape[1]), range(patterns) if ax is axes[0] else latents[: table.shape[1]])
    for ax, names, column in zip(axes, rows, columns):
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_xlabel(column)
    for ax in axes[3:]:
        ax.set(xlabel="key latent", ylabel="query latent" if ax is axes[3] else "")
        ax.set_yticks(range(len(latents)), latents)
    return legible(figure)


def heads_by_hand(tables: np.ndarray, attention: np.ndarray, names: list[str], letters: str, word: str) -> Figure:
    """01: tables (h, d, d) above, and the attention (h, n, m) that each makes below."""
    figure, axes = panels(2, len(names), (10, 6.8), grid=False)
    features, edge = [*letters, *map(str, range(len(word)))], len(letters) - 0.5
    for head, (name, (above, below)) in enumerate(zip(names, axes.T)):
        above.imshow(tables[head], cmap="Blues")
        above.axhline(edge, color="#999999", linewidth=0.8)  # letters before, positions after
        above.axvline(edge, color="#999999", linewidth=0.8)
        above.set(title=f"Head {head}: {name}", xlabel="feature of the key", ylabel="feature of the query")
        above.set_xticks(range(len(features)), features, fontsize=8)
        above.set_yticks(range(len(features)), features, fontsize=8)
        below.imshow(attention[head], cmap="Oranges", vmin=0, vmax=1)
        below.set(title="Attention it makes", xlabel="source token m", ylabel="query token n")
        below.set_xticks(range(len(word)), word)
        below.set_yticks(range(len(word)), word)
    return legible(figure)


def _flow(ax, boxes: dict[str, tuple], arrows: list[tuple[str, str]], highlighted: set[str], colour: str) -> None:
    """Boxes with words in them, (x, y, words) by name, and arrows between them; some are highlighted in the colour."""
    patches = {}
    for name, (x, y, words) in boxes.items():
        face = colour if name in highlighted else "#eeeeee"
        patch = dict(boxstyle="round,pad=0.45", facecolor=face, edgecolor="#888888")
        patches[name] = ax.text(x, y, words, ha="center", va="center", fontsize=9, bbox=patch).get_bbox_patch()
    for start, end in arrows:
        (x_0, y_0, _), (x_1, y_1, _) = boxes[start], boxes[end]
        between = dict(arrowstyle="->", color="#555555", patchA=patches[start], patchB=patches[end], shrinkA=2, shrinkB=2)
        ax.annotate("", (x_1, y_1), (x_0, y_0), arrowprops=between, zorder=4)  # after the boxes, whose edges it meets
    ax.axis("off")


def dataflow_of_mha(d: int, heads: int, k: int) -> Figure:
    """02: the layer: tokens, four matrices, and the softmax between them; coloured what the two tensors hold."""
    figure, ax = panels(1, 1, (10, 3.2))
    boxes = {
        "x": (0, 1, f"tokens\n{d} numbers each"),
        "q": (2.3, 2, "queries\n$X W^Q$"),
        "k": (2.3, 1, "keys\n$X W^K$"),
        "v": (2.3, 0, "values\n$X W^V$"),
        "a": (4.6, 1.5, f"softmax\n{heads} heads, width {k}"),
        "z": (6.9, 1, "mixed\nvalues"),
        "y": (9.2, 1, "outputs\ntimes $W^O$"),
    }
    arrows = [("x", "q"), ("x", "k"), ("x", "v"), ("q", "a"), ("k", "a"), ("a", "z"), ("v", "z"), ("z", "y")]
    _flow(ax, boxes, arrows, {"q", "k"}, "#cfe3f2")
    _flow(ax, {name: boxes[name] for name in ("v", "y")}, [], {"v", "y"}, "#f6e3bd")
    ax.text(3.45, 2.45, "first tensor: before the softmax", color=style.COLOURS["GQA"], ha="center", va="bottom")
    ax.text(5.75, -0.45, "second tensor: after it", color="#9a6a00", ha="center", va="top")
    ax.set(xlim=(-0.9, 10), ylim=(-0.8, 2.8))
    return legible(figure)


def effective_sources(widths: list[int], shared: dict[str, list[float]], sources: int) -> Figure:
    """02: how many sources share the attention at each head width, a curve for each scale."""
    figure, ax = panels(1, 1, (6, 2.8))
    for (name, values), line in zip(shared.items(), ("-", ":")):
        ax.semilogx(widths, values, line, base=2, color=style.COLOURS["MHA"], label=name)
    ax.set(
        title=f"How many of {sources} sources share the attention",
        xlabel="head width $d_H$",
        ylabel="$e^{\\mathrm{entropy}}$",
        ylim=0,
    )
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.minorticks_off()
    ax.legend()
    return legible(figure)


def masks(tables: dict[str, np.ndarray]) -> Figure:
    """02: which source (column) each query (row) may look at: dark is allowed."""
    figure, axes = panels(1, len(tables), (8.5, 2.8), grid=False)
    for ax, (name, table) in zip(axes, tables.items()):
        ax.imshow(table, cmap="Greys", vmin=0, vmax=1.3)
        n, m = table.shape
        ax.set(title=name, xlabel="source m", ylabel="query n", xticks=range(m))
        ax.set_yticks(range(n), range(m - n, m))  # the last n of m tokens
    return legible(figure)


def routing(core: np.ndarray, width: int) -> Figure:
    """02: slices of a core (head, query channel, key channel) of zeros and ones; black is one, lines part heads."""
    figure, axes = panels(1, len(core), (2.5 * len(core), 2.7), grid=False, sharey=True)
    for head, (ax, table) in enumerate(zip(axes, core)):
        ax.imshow(table, cmap="Greys", vmin=0, vmax=1)
        ax.set(title=f"Head {head}", xlabel="key channel")
        ax.set_xticks(range(0, table.shape[1] + 1, width))
        ax.set_yticks(range(0, table.shape[0] + 1, width))
        for line in range(width, table.shape[0], width):
            ax.axhline(line - 0.5, color="#bbbbbb", linewidth=0.6)
        for line in range(width, table.shape[1], width):
            ax.axvline(line - 0.5, color="#bbbbbb", linewidth=0.6)
    axes[0].set_ylabel("query channel")
    return legible(figure)


def kv_cache(heads: int, kinds: dict[str, int], tokens: str = "the cat sat on") -> Figure:
    """02, 03: what the cache holds when the next token is written: a key and a value for each token and key/value head.

    kinds: key/value heads by the name of the mechanism.  tokens: those written so far.
    """
    words = tokens.split()
    figure, axes = panels(1, len(kinds), (5.2 if len(kinds) == 1 else 3.6 * len(kinds), 3.6), squeeze=False)
    for ax, (name, groups) in zip(axes[0], kinds.items()):
        colour = style.COLOURS[style.mechanism(name)]
        for n in range(len(words)):
            ax.text(n + 0.5, heads + 0.25, words[n], ha="center", va="bottom")
            for group in range(groups):
                for half, letter, alpha, ink in ((0.0, "k", 1.0, "white"), (0.5, "v", 0.35, "black")):
                    place = (n + half + 0.03, heads - 1 - group + 0.08)
                    ax.add_patch(Rectangle(place, 0.44, 0.84, facecolor=colour, alpha=alpha))
                    ax.text(place[0] + 0.22, place[1] + 0.42, f"${letter}_{group}$", ha="center", va="center", color=ink)
        ax.text(len(words) + 0.75, heads + 0.25, "new", ha="center", va="bottom", fontweight="bold")
        for head in range(heads):
            y = heads - 1 - head + 0.5
            ax.text(
                len(words) + 0.75, y, f"$q_{head}$", ha="center", va="center", bbox=dict(boxstyle="round", facecolor="#eeeeee")
            )
            group = head * groups // heads
            ax.annotate(
                "",
                (len(words) + 0.05, heads - group - 0.5),
                (len(words) + 0.5, y),
                arrowprops=dict(arrowstyle="->", color="#555555"),
            )
        ax.set(title=f"{name}: {2 * groups} vectors a token", xlim=(-0.1, len(words) + 1.2), ylim=(-0.1, heads + 0.9))
        ax.axis("off")
    return legible(figure)


def where_arithmetic_goes(tokens: np.ndarray, parts: dict[str, np.ndarray], meet: int) -> Figure:
    """02: operations of a layer by the number of tokens, a curve for each part; a grey line where two of them meet."""
    figure, ax = panels(1, 1, (6.4, 3))
    for (name, values), line in zip(parts.items(), ("--", ":", "-")):
        ax.loglog(tokens, values, line, base=2, color=style.COLOURS["MHA"], label=name)
    ax.axvline(meet, color="#bbbbbb", linewidth=1)
    ax.set(title="One layer of GPT-2's shape: where the arithmetic goes", xlabel="tokens N", ylabel="operations")
    ax.set_xticks(tokens, [f"{int(n):,}" for n in tokens])
    ax.tick_params(axis="x", labelsize=8)
    ax.minorticks_off()
    ax.legend()
    return legible(figure)


def shares(heads: list[int], parts: dict[str, list[float]]) -> Figure:
    """03: cache and parameters as shares of multi-head attention's, by the number of key/value heads."""
    figure, ax = panels(1, 1, (6.4, 2.9))
    for (name, values), line in zip(parts.items(), ("-", ":")):
        ax.plot(heads, values, line, marker="o", color=style.COLOURS["GQA"], label=name)
    ax.set(title="GQA at GPT-2's shape", xlabel="key/value heads", ylabel="share of MHA's", ylim=(0, 1.05), xticks=heads)
    ax.legend()
    return legible(figure)


def dataflow_of_mla(d: int, heads: int, k: int, q_rank: int, kv_rank: int, absorbed: bool = False) -> Figure:
    """04: multi-head latent attention, as written or absorbed; coloured is what the cache keeps, each box with its width."""
    figure, ax = panels(1, 1, (10, 3.4))
    boxes = {
        "x": (0, 1, f"token $x$\n{d}"),
        "lq": (2.1, 2, f"query latent\n{q_rank}"),
        "l": (2.1, 0.5, f"latent $c$: cached\n{kv_rank}"),
        "q": (4.6, 2, f"{heads} queries\nof {kv_rank if absorbed else k}"),
        "a": (6.9, 1.25, "softmax"),
        "z": (8.4, 0.5, f"{heads} mixtures\nof {kv_rank if absorbed else k}"),
        "y": (10.2, 0.5, f"output\n{d}"),
    }
    arrows = [("x", "lq"), ("x", "l"), ("lq", "q"), ("q", "a"), ("a", "z"), ("z", "y")]
    if absorbed:
        arrows += [("l", "a"), ("l", "z")]
        labels = {(1.0, 1.75): "$W^{DQ}$", (1.0, 0.45): "$W^{DKV}$", (3.4, 2.22): "$W^{UQ} W^{UK\\top}$"}
        labels[(9.35, 0.75)] = "$W^{UV}W^O$"
    else:
        boxes |= {"k": (4.6, 1, f"{heads} keys\nof {k}"), "v": (4.6, 0, f"{heads} values\nof {k}")}
        arrows += [("l", "k"), ("l", "v"), ("k", "a"), ("v", "z")]
        labels = {(1.0, 1.75): "$W^{DQ}$", (1.0, 0.45): "$W^{DKV}$", (3.4, 2.22): "$W^{UQ}$"}
        labels |= {(3.55, 1.0): "$W^{UK}$", (3.55, 0.0): "$W^{UV}$", (9.35, 0.75): "$W^O$"}
    _flow(ax, boxes, arrows, {"l"}, style.COLOURS["MLA"])
    for (x, y), words in labels.items():
        ax.text(x, y, words, ha="center", va="center", fontsize=10)
    ax.set(xlim=(-0.6, 10.8), ylim=(-0.4, 2.5), title="Absorbed: no key, no value" if absorbed else "As written")
    return legible(figure)


def one_more_token(cached: np.ndarray, counts: dict[str, np.ndarray]) -> Figure:
    """04: multiply-adds of one layer for one more token, by the number of tokens in the cache."""
    figure, ax = panels(1, 1, (6.4, 3))
    for (name, values), line in zip(counts.items(), ("-", "--", ":")):
        ax.loglog(cached, values, line, base=2, color=style.COLOURS["MLA"], label=name)
    ax.set(title="One more token: multiply-adds of one layer", xlabel="tokens in the cache", ylabel="multiply-adds")
    ax.set_xticks(cached, [f"{int(n):,}" for n in cached])
    ax.minorticks_off()
    ax.legend()
    return legible(figure)


def sizes(series: dict[str, list[tuple[int, int]]]) -> Figure:
    """04: (parameters, cached numbers a token) of layers, one line a series; down and left is good."""
    figure, ax = panels(1, 1, (6.6, 3.4))
    for (name, points), look in zip(series.items(), style.lines_of(list(series)).values()):
        marker = style.MARKERS[style.mechanism(name)]
        ax.plot([p / 1e6 for p, _ in points], [c for _, c in points], label=name, marker=marker, **look)
    ax.set(title="One layer of GPT-2's shape", xlabel="parameters, millions", ylabel="cached numbers a token", ylim=0)
    ax.legend()
    return legible(figure)


def dataflow_of_tucker(d: int, heads: int, ranks: tuple[int, int, int], post_ranks: tuple[int, int, int]) -> Figure:
    """05: the six lines of Tucker Attention; coloured is what the cache keeps, each box with its width."""
    (_, s, t), (_, o, v) = ranks, post_ranks
    figure, ax = panels(1, 1, (10, 3.2))
    boxes = {
        "x": (0, 1, f"token $x$\n{d}"),
        "p": (2, 2, f"query latent\n{s}"),
        "k": (2, 1, f"one key: cached\n{t}"),
        "v": (2, 0, f"one value: cached\n{v}"),
        "q": (4.5, 2, f"{heads} queries\nof {t}"),
        "a": (6.3, 1.25, "softmax"),
        "z": (7.7, 0.5, f"{heads} mixtures\nof {v}"),
        "o": (10.1, 0.5, f"output latent\n{o}"),
        "y": (12, 0.5, f"output\n{d}"),
    }
    arrows = [("x", "p"), ("x", "k"), ("x", "v"), ("p", "q"), ("q", "a"), ("k", "a")]
    arrows += [("a", "z"), ("v", "z"), ("z", "o"), ("o", "y")]
    _flow(ax, boxes, arrows, {"k", "v"}, style.COLOURS["Tucker"])
    labels = {(0.85, 1.72): "$U_2$", (0.9, 1.13): "$U_3$", (0.85, 0.28): "$\\widetilde U_3$"}
    labels |= {(3.3, 2.25): "$T_h = C \\times_1 U_1$", (8.95, 0.72): "$\\widetilde T_h$", (11.1, 0.72): "$\\widetilde U_2$"}
    for (x, y), words in labels.items():
        ax.text(x, y, words, ha="center", va="center", fontsize=10)
    ax.set(xlim=(-0.6, 12.6), ylim=(-0.4, 2.5))
    return legible(figure)


def head_ranks(errors: dict[str, list[float]], loads: dict[str, np.ndarray]) -> Figure:
    """05: the error at each head rank, a curve for each tensor; beside it |U1| of each (h, r), columns times singular values."""
    figure, axes = panels(1, 1 + len(loads), (10, 3.4), width_ratios=[1.3, *[1] * len(loads)])
    for (name, values), line in zip(errors.items(), ("-", "--")):
        axes[0].plot(range(1, len(values) + 1), values, line, marker=".", color=style.COLOURS["Tucker"], label=name)
    axes[0].set(title="What cutting heads costs", xlabel="head rank $r_1$", ylabel="relative error", ylim=0)
    axes[0].set_xticks(range(2, len(values) + 1, 2))
    axes[0].legend()
    for ax, (name, load) in zip(axes[1:], loads.items()):
        ax.imshow(np.abs(load), cmap="Greens", vmin=0)
        ax.set(title=f"$U_1$ of {name}", xlabel="head pattern", ylabel="head")
        ax.set(xticks=range(0, load.shape[1], 2), yticks=range(0, load.shape[0], 2))
        ax.grid(False)
    return legible(figure)


def to_scale(layers: dict[str, dict[str, tuple[int, int]]]) -> Figure:
    """05: the weights of two layers as rectangles, all on one scale; (rows, columns) of each by its name."""
    figure, ax = panels(1, 1, (9, 5.2))
    for floor, (layer, weights) in zip((1500, 0), layers.items()):
        at, colour = 0.0, style.COLOURS[style.mechanism(layer)]
        ax.text(0, floor + 60 + max(rows for rows, _ in weights.values()), layer, fontweight="bold", va="bottom")
        for name, (rows, columns) in weights.items():
            width = max(columns, 420)  # room for its name
            ax.add_patch(Rectangle((at + (width - columns) / 2, floor), columns, rows, facecolor=colour))
            ax.text(at + width / 2, floor - 40, f"{name}\n{rows:,} × {columns}", ha="center", va="top", fontsize=8)
            at += width + 40
    ax.set(xlim=(-50, 3800), ylim=(-260, 2450), aspect="equal")
    ax.axis("off")
    return legible(figure)


def clock_hands(frequencies: list[float], hands: np.ndarray, counts: list[int]) -> Figure:
    """06: hands (pair, position, 2) of every pair, drawn at ten positions from 0 to counts[pair]."""
    figure, axes = panels(1, len(counts), (10, 2.9), sharey=True)
    for ax, frequency, hand, count in zip(axes, frequencies, hands, counts):
        places = np.linspace(0, count, 10).round().astype(int)
        for shade, n in zip(np.linspace(0.25, 1, 10), places):
            ax.plot([0, hand[n, 0]], [0, hand[n, 1]], color=style.COLOURS["Tucker"], alpha=shade)
            side = "right" if hand[n, 0] < -0.2 else "left" if hand[n, 0] > 0.2 else "center"
            ax.text(1.1 * hand[n, 0], 1.13 * hand[n, 1], f"{n:,}", fontsize=8, ha=side, va="center")
        ax.set(xlim=(-1.7, 1.7), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[], xlabel="first channel")
        ax.set_title(
            f"frequency {frequency:g}\nevery {count // 9:,} tokens" if count > 9 else f"frequency {frequency:g}\nevery token"
        )
    axes[0].set_ylabel("second channel")
    return legible(figure)


def schedules(kinds: dict[str, np.ndarray], stretched: dict[str, np.ndarray]) -> Figure:
    """06: frequencies of every pair, one row of panels for the schedules and one for a stretched context."""
    figure, axes = panels(1, len(kinds) + 1, (11, 2.9), sharey=True, width_ratios=[1] * len(kinds) + [1.6])
    for ax, (name, frequencies) in zip(axes, kinds.items()):
        pairs, turning = np.arange(len(frequencies)), frequencies > 0
        ax.plot(pairs[turning], frequencies[turning], "o", markersize=4, color=style.COLOURS["Tucker"])
        ax.plot(pairs[~turning], np.full((~turning).sum(), 1e-7), "v", markersize=4, color="#777777", label="0: stands still")
        ax.set(title=name, xlabel="pair", xlim=(-1.5, 32.5), xticks=(0, 16, 32))
        if not turning.all():
            ax.legend(loc="center left", bbox_to_anchor=(-0.05, 0.25), handlelength=1)
    for (name, frequencies), line in zip(stretched.items(), ("-", "--")):
        axes[-1].plot(frequencies, line, color=style.COLOURS["Tucker"], label=name)
    axes[-1].set(title="A stretched context", xlabel="pair")
    axes[-1].legend()
    axes[0].set(yscale="log", ylim=(4e-8, 2), ylabel="radians per token")
    return legible(figure)


def by_distance(tables: dict[str, np.ndarray]) -> Figure:
    """06: logits (n, m) of one token with itself, at all pairs of positions."""
    figure, axes = panels(1, len(tables), (7.5, 3.4), grid=False)
    largest = max(np.abs(table).max() for table in tables.values())
    for ax, (name, table) in zip(axes, tables.items()):
        image = ax.imshow(table, cmap="PRGn", vmin=-largest, vmax=largest)
        ax.set(title=name[0].upper() + name[1:], xlabel="position of the key", ylabel="position of the query")
    figure.colorbar(image, ax=axes, label="logit")
    return legible(figure)


def exact_where(errors: np.ndarray, layers: list[str], schedules: tuple[str, ...]) -> Figure:
    """06: relative errors (layer, schedule); green is exact."""
    figure, ax = panels(1, 1, (7, 3), grid=False)
    ax.imshow(errors < 1e-12, cmap="Greens", vmin=0, vmax=2, aspect="auto")
    for (i, j), error in np.ndenumerate(errors):
        ax.text(j, i, "exact" if error < 1e-12 else f"{error:.2f}", ha="center", va="center")
    ax.set_xticks(range(len(schedules)), schedules)
    ax.set_yticks(range(len(layers)), layers)
    ax.set(title="Relative error by layer and by schedule")
    return legible(figure)


def growth(n: np.ndarray, logits: np.ndarray, rest: np.ndarray) -> Figure:
    """07: bytes that one layer would store, by the number of tokens: logits, and queries, keys, values and outputs."""
    figure, ax = panels(1, 1, (6.4, 3))
    ax.loglog(n, logits / 1e6, color=style.COLOURS["MHA"], label="logits")
    ax.loglog(n, rest / 1e6, "--", color="#888888", label="queries, keys, values, outputs")
    ax.set(xlabel="tokens", ylabel="MB ($10^6$ bytes)", title="What one layer of GPT-2's shape would store")
    ax.legend()
    return legible(figure)


def running(logits: np.ndarray, seen: list[tuple[float, float]]) -> Figure:
    """07: logits with their running maximum above, the running sum below; seen: (maximum, sum) after each tile."""
    figure, axes = panels(2, 1, (7, 3.8), sharex=True)
    width = len(logits) // len(seen)
    axes[0].plot(logits, ".", color="#777777", markersize=4)
    for tile, (largest, total) in enumerate(seen):
        axes[0].plot([width * tile, width * (tile + 1)], [largest, largest], color=style.COLOURS["Tucker"])
        axes[1].bar(width * (tile + 0.5), total, width=0.75 * width, color=style.COLOURS["Tucker"])
    axes[0].set(ylabel="logit", title="One pass: running maximum and running sum")
    axes[1].set(xlabel=f"source token, in tiles of {width}", ylabel="sum so far", xticks=range(0, len(logits) + 1, 2 * width))
    return legible(figure)


def causal_tiles(kind: np.ndarray, queries: int, sources: int) -> Figure:
    """07: tiles (query tile, source tile) under a causal mask: 0 skip, 1 mask, 2 whole."""
    figure, ax = panels(1, 1, (6.4, 2.8), grid=False)
    rows, columns = kind.shape[0] * queries, kind.shape[1] * sources
    ax.imshow(kind, cmap="Greens", vmin=-0.3, vmax=3, extent=(0, columns, rows, 0), aspect="auto")
    for (i, j), one in np.ndenumerate(kind):
        place = sources * (j + 0.5), queries * (i + 0.5)
        ax.text(*place, ("skip", "mask", "whole")[one], ha="center", va="center", fontsize=8)
    ax.plot([0, columns], [0, rows], color="black", linewidth=1)
    ax.set(xticks=range(0, columns + 1, sources), yticks=range(0, rows + 1, queries))
    ax.set(xlabel="source token", ylabel="query token", title="Three kinds of tiles under a causal mask")
    return legible(figure)


def caches(megabytes: dict[str, float], title: str) -> Figure:
    """07: one bar a row, with its number; the axis is cut for nobody, small bars are read by their numbers."""
    figure, ax = panels(1, 1, (7, 3.6))
    bars = ax.barh(list(megabytes), megabytes.values(), color=[style.COLOURS[style.mechanism(name)] for name in megabytes])
    whole = next(iter(megabytes.values()))
    ax.bar_label(bars, [f"{size:.2f} MB, {size / whole:.0%}" for size in megabytes.values()], padding=4, fontsize=9)
    shared = [bar for bar, name in zip(bars, megabytes) if "shared" in name]
    for bar in shared:
        bar.set(hatch="////", edgecolor="white", linewidth=0)
    ax.legend([shared[-1]], ["keys and values share a latent"], loc="lower right")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="MB ($10^6$ bytes)", xlim=(0, 1.25 * whole), title=title)
    return legible(figure)


def bounded(ranks: list[int], lower: list[float], errors: list[float], upper: list[float]) -> Figure:
    """08: the error of a compressed layer at each rank, between the bounds that its spectra give."""
    figure, ax = panels(1, 1, (6, 2.8))
    ax.fill_between(ranks, lower, upper, color="#cccccc", label="between the bounds")
    ax.semilogy(ranks, errors, "o-", color=style.COLOURS["Tucker"], label="compressed layer")
    ax.set(xlabel="query and key rank", ylabel="relative error of $W$", title="The spectra bound the error")
    ax.legend()
    return legible(figure)


def six_spectra(fresh: list[list[np.ndarray]], trained: list[list[np.ndarray]], titles: list[list[str]]) -> Figure:
    """08: singular values of three modes (columns) of both tensors (rows), each over its largest; grey fresh, green trained."""
    figure, axes = panels(2, 3, (10, 5), sharey=True, subplot_kw={"ylim": (1e-4, 2)})
    for row, old, new, names in zip(axes, fresh, trained, titles):
        for ax, a, b, name in zip(row, old, new, names):
            ax.semilogy(range(1, len(a) + 1), a / a[0], color="#aaaaaa", label="fresh")
            ax.semilogy(range(1, len(b) + 1), b / b[0], color=style.COLOURS["Tucker"], label="trained")
            ax.set_title(name)
    for ax in axes[1]:
        ax.set_xlabel("number of the singular value")
    axes[0, 0].set_ylabel("before the softmax")
    axes[1, 0].set_ylabel("after the softmax")
    axes[0, 0].legend(loc="lower left")
    return legible(figure)


def compressed(series: dict[str, list[tuple[int, int, float]]], untouched: tuple[int, int, float]) -> Figure:
    """08: (parameters, cached numbers, accuracy) of every layer, one line a series; `untouched`: of the layer before."""
    figure, axes = panels(1, 2, (10.5, 3.8), sharey=True)
    for name, points in series.items():
        kind, shared = style.mechanism(name), name.endswith("shared")
        look = dict(color=style.COLOURS[kind], marker=style.MARKERS[kind], linestyle="--" if shared else "-", label=name)
        for ax, column in zip(axes, (0, 1)):
            ax.plot([p[column] for p in points], [p[2] for p in points], markerfacecolor="white" if shared else None, **look)
    for ax, label, column in zip(axes, ("attention parameters", "cached numbers per token"), (0, 1)):
        sizes = [p[column] for points in series.values() for p in points] + [untouched[column]]
        ax.plot(untouched[column], untouched[2], style.MARKERS["MHA"], color=style.COLOURS["MHA"], label="MHA, untouched")
        ax.axhline(untouched[2], color=style.COLOURS["MHA"], linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ticks = [2**n for n in range(16) if 0.9 * min(sizes) < 2**n < 1.1 * max(sizes)]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=f"{label}, each line twice the last", ylim=(0.3, 1))
    axes[0].set(ylabel="accuracy", title="By parameters")
    axes[1].set(title="By cache")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return legible(figure)


def head_price(tried: dict[str, list[tuple]]) -> Figure:
    """08, 10: the least error of a tensor at each size, a curve for each head rank r1.

    tried: (numbers stored, error, ranks) by the tensor's name.
    """
    figure, axes = panels(1, len(tried), (10, 3.9), sharey=True)
    for ax, (name, points) in zip(axes, tried.items()):
        heads = sorted({ranks[0] for *_, ranks in points}, reverse=True)
        for r1, colour, marker in zip(heads, plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(heads))), "Dos^v"):
            curve: list[tuple] = []
            for size, error, _ in sorted(point for point in points if point[2][0] == r1):
                curve += [(size, error)] if not curve or error < 0.99 * curve[-1][1] else []  # better than all smaller ones
            ax.loglog(*zip(*curve), color=colour, marker=marker, markersize=4, label=f"$r_1$ = {r1}")
        ax.set(title=f"{name} the softmax".capitalize(), xlabel="numbers stored")
        ax.set_xticks([500, 1000, 2000, 4000], ["500", "1,000", "2,000", "4,000"])
        ax.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
        ax.minorticks_off()
    axes[0].set_ylabel("relative error on inputs")
    axes[0].legend(loc="lower left")
    return legible(figure)


def patterns_of_heads(loads: dict[str, np.ndarray], kept: int | None = None) -> Figure:
    """08, 09: what each head (row) takes of each head pattern (column), its sign left out; dashed: a cut behind `kept` of them.

    loads: head factors (h, r) by their name, each column times its singular value.
    """
    figure, axes = panels(1, len(loads), (4.6 * len(loads), 3.9), grid=False)
    for ax, (name, load) in zip(axes, loads.items()):
        image = ax.imshow(np.abs(load), cmap="Greens", vmin=0)
        if kept is not None:
            ax.axvline(kept - 0.5, color="black", linestyle="--", linewidth=1)
        cut = "" if kept is None else f"; dashed: cut after {kept}"
        ax.set(title=name, xlabel="head pattern" + cut, ylabel="head")
        ax.set(xticks=range(load.shape[1]), yticks=range(len(load)))
        figure.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)
    return legible(figure)


def explorer(points: dict[str, tuple[int, int, float]]) -> Figure:
    """08: (parameters, cache bytes, error) of every layer, the last of them in its own size, with its numbers as titles."""
    figure, axes = panels(1, 2, (8.5, 3.6), sharey=True)
    for name, point in points.items():
        kind = style.mechanism(name)
        size, place = {"Tucker": (11, (9, 7)), "MLA": (6, (-12, 7))}.get(kind, (6, (7, 3)))
        for ax, number in zip(axes, point):
            ax.plot(number, point[2], style.MARKERS[kind], color=style.COLOURS[kind], markersize=size, clip_on=False)
            ax.annotate(name, (number, point[2]), xytext=place, textcoords="offset points", fontsize=8)
    parameters, cache, error = point
    axes[0].set(title=f"{parameters:,} parameters", xlabel="parameters", xlim=(0, max(12_000, parameters)))
    axes[1].set(title=f"{cache} bytes a token", xlabel="cache bytes a token, BF16", xlim=(0, 220))
    axes[0].set_yscale("function", functions=(np.sqrt, np.square))  # room for small errors
    axes[0].set(ylim=(0, max(1, error)), yticks=(0, 0.01, 0.05, 0.1, 0.2, 0.5, 1))
    axes[0].set_ylabel("error of outputs (root scale)")
    return legible(figure)


def budgets(rows: dict[str, tuple[int, int]]) -> Figure:
    """09: (parameters, cached numbers a token) of one layer of each row, as two rows of bars."""
    figure, axes = panels(1, 2, (10, 2.7), sharey=True)
    colours = [style.COLOURS[style.mechanism(name)] for name in rows]
    for ax, column, title in zip(axes, (0, 1), ("Parameters of a layer", "Cached numbers a token")):
        sizes = [pair[column] for pair in rows.values()]
        bars = ax.barh(list(rows), sizes, color=colours)
        ax.bar_label(bars, [f"{size:,}" for size in sizes], padding=4, fontsize=9)
        ax.set(title=title, xlim=(0, 1.2 * max(sizes)))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.locator_params(axis="x", nbins=5)
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return legible(figure)


def learning(rates: list[float], curves: dict[tuple[str, int], list[tuple]]) -> Figure:
    """09: the learning rate of each step, and training losses by row and seed: (step, loss, ...) of every noted step."""
    figure, axes = panels(1, 2, (10, 3.4), width_ratios=(1, 2.2))
    axes[0].plot([1000 * rate for rate in rates], color=style.GREY)
    axes[0].set(xlabel="step", ylabel="learning rate × 1000", title="Warm-up and cosine")
    looks = style.lines_of(list(dict.fromkeys(name for name, _ in curves)))
    for (name, seed), curve in curves.items():
        steps, losses = zip(*(point[:2] for point in curve))
        axes[1].plot(steps, losses, linewidth=1.3, label=name if seed == 0 else None, **looks[name])
    axes[1].set(xlabel="step", ylabel="training loss (nats/token)", title="Two curves a row, one a seed")
    axes[1].legend()
    return legible(figure)


def against_budgets(sizes: dict[str, tuple[int, int]], losses: dict[str, list[float]]) -> Figure:
    """09: losses of all seeds of each row by its (parameters, cached numbers); rows of one cache are drawn a little apart."""
    figure, axes = panels(1, 2, (10, 3.4), sharey=True)
    looks = style.lines_of(list(sizes))
    caches = [cache for _, cache in sizes.values()]
    for number, (name, (parameters, cache)) in enumerate(sizes.items()):
        look = dict(marker=style.MARKERS[style.mechanism(name)], markersize=8, **looks[name])
        apart = 9 * (number - len(sizes) / 2) if caches.count(cache) > 1 else 0
        for ax, x in zip(axes, (parameters / 1000, cache + apart)):
            ax.plot([x] * len(losses[name]), losses[name], label=name, **look)
    axes[0].set(xlabel="parameters of a layer, thousands", ylabel="validation loss (nats/token)", title="By parameters", xlim=0)
    axes[1].set(xlabel="cached numbers a token (those at 32 drawn apart)", title="By cache", xlim=(0, 1.1 * max(caches)))
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return legible(figure)


def rates(losses: dict[tuple[str, float, bool], float]) -> Figure:
    """09: losses by row, learning rate and whether the start was Xavier's: one line a row, Xavier's as open marks."""
    figure, ax = panels(1, 1, (8.5, 3.6))
    every = sorted({rate for _, rate, _ in losses})
    for size, name in zip((10, 6), dict.fromkeys(name for name, _, _ in losses)):  # open marks may meet: the larger one first
        look = dict(color=style.COLOURS[style.mechanism(name)], marker=style.MARKERS[style.mechanism(name)])
        matched, xavier = ([r for r in every if (name, r, start) in losses] for start in (False, True))
        ax.semilogx(matched, [losses[name, r, False] for r in matched], label=f"{name}, starts matched", **look)
        open_marks = dict(linestyle="", markersize=size, markerfacecolor="none", label=f"{name}, Xavier")
        ax.plot(xavier, [losses[name, r, True] for r in xavier], **open_marks, **look)
    ax.set_xticks(every, [f"{1000 * rate:g}" for rate in every])
    ax.minorticks_off()
    ax.set(xlabel="learning rate × 1000", ylabel="validation loss (nats/token)")
    ax.set_title("The gap depends on the rate and on the start")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return legible(figure)


def head_sweep(losses: dict[int, list[float]], beside: float) -> Figure:
    """09: losses of all seeds by the number of head patterns r1, at equal parameters and cache; dotted: another layer's mean."""
    figure, ax = panels(1, 1, (6, 3))
    for r1, values in losses.items():
        ax.plot([r1] * len(values), values, style.MARKERS["Tucker"] + "-", color=style.COLOURS["Tucker"])
    ax.axhline(beside, color=style.COLOURS["MHA"], linestyle=":", linewidth=1)
    ax.annotate(
        "MHA, mean", (1, beside), (-4, -4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top"
    )
    ax.set(xlabel="head patterns $r_1$ of 6 heads; a line joins the seeds", ylabel="validation loss (nats/token)")
    ax.set(xticks=list(losses), title="As many parameters, the same cache")
    return legible(figure)


def starts(stds: dict[str, tuple[float, float]]) -> Figure:
    """05: standard deviations of the first logits and outputs, one bar a layer."""
    figure, axes = panels(1, 2, (8, 2.4), sharey=True)
    for ax, which, what in zip(axes, range(2), ("logits", "outputs")):
        values = [pair[which] for pair in stds.values()]
        colours = [style.COLOURS[style.mechanism(name)] for name in stds]
        bars = ax.barh(list(stds), values, color=colours)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, fontsize=9)
        ax.set(title=f"Fresh {what}", xlabel="standard deviation", xlim=(0, 1.25 * max(values)))
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return legible(figure)


def loss_against_size(rows: dict[str, tuple[int, list[float]]]) -> Figure:
    """10: (attention parameters, validation losses of its seeds) of each row; a line joins the seeds, a mark is their mean."""
    figure, ax = panels(1, 1, (9, 4))
    for name, (parameters, losses) in rows.items():
        kind, x = style.mechanism(name), parameters / 1e6
        ax.plot([x] * len(losses), losses, color=style.COLOURS[kind], linewidth=1.2)
        ax.plot(x, np.mean(losses), style.MARKERS[kind], color=style.COLOURS[kind], markersize=7)
        beside = any(
            1 < size / parameters < 2 and abs(np.mean(other) - np.mean(losses)) < 0.01 for size, other in rows.values()
        )
        place = dict(xytext=(-7, 3), ha="right") if beside else dict(xytext=(7, 3))
        ax.annotate(name, (x, np.mean(losses)), textcoords="offset points", fontsize=9, color=style.INKS[kind], **place)
    ax.set_xscale("log", base=2)
    ax.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    ax.minorticks_off()
    ax.set(
        xlim=(2.5, 48), xlabel="attention parameters, millions; each line twice the last", ylabel="validation loss (nats/token)"
    )
    return legible(figure)


def differences(intervals: dict[str, tuple[float, float, float]], base: str, unit: str) -> Figure:
    """10: a mean difference to the base with its interval, a line each: (mean, low, high) by name."""
    figure, ax = panels(1, 1, (9, 0.42 * len(intervals) + 1))
    for y, (name, (mean, low, high)) in enumerate(intervals.items()):
        colour = style.COLOURS[style.mechanism(name)]
        ax.plot([low, high], [y, y], color=colour)
        ax.plot(mean, y, style.MARKERS[style.mechanism(name)], color=colour)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(intervals)), list(intervals))
    ax.invert_yaxis()
    ax.set(xlabel=f"{unit}, minus {base}'s; lines: 95 % intervals")
    return legible(figure)


def mode_shares(shares: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """10: effective rank over size of every mode of every model, by singular values (filled) and by their squares (open)."""
    figure, ax = panels(1, 1, (10.5, 3.8))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(shares)))
    for number, ((name, modes), colour) in enumerate(zip(shares.items(), colours)):
        x = np.arange(len(modes)) + 0.14 * (number - (len(shares) - 1) / 2)
        look = dict(linestyle="", markersize=7, marker="osDv^"[number % 5], color=colour)
        ax.plot(x, [both[0] for both in modes.values()], label=name, **look)
        ax.plot(x, [both[1] for both in modes.values()], markerfacecolor="white", **look)
    ax.set_xticks(range(len(modes)), list(modes))
    ax.grid(axis="x", visible=False)
    ax.set(ylim=(0, 1.05), ylabel="effective rank / size", title="Filled: of singular values; open: of their squares")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1)
    return legible(figure)


def heads_or_latents(rows: dict[str, tuple[int, int, float]], untouched: float) -> Figure:
    """10: (head rank, parameters, top-1) of converted and fine-tuned layers, a line for each head rank; dotted: multi-head."""
    figure, ax = panels(1, 1, (8, 3.6))
    heads = sorted({r1 for r1, _, _ in rows.values()}, reverse=True)
    for r1, colour, marker in zip(heads, plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(heads))), "Dos"):
        points = sorted((size / 1e6, top1) for r, size, top1 in rows.values() if r == r1)
        ax.plot(*zip(*points), color=colour, marker=marker, label=f"$r_1$ = {r1} of 12")
    ax.axhline(untouched, color=style.COLOURS["MHA"], linestyle=":", linewidth=1, label="MHA")
    ax.set_xscale("log", base=2)
    ax.set_xticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
    ax.minorticks_off()
    ax.set(xlabel="attention parameters, millions; each line twice the last", ylabel="top-1, fine-tuned")
    ax.legend(loc="lower right")
    return legible(figure)


def by_rate(losses: dict[str, dict[float, float]]) -> Figure:
    """10: losses of each row by learning rate, the rows as they are beside those with norms; what is far above has its number."""
    figure, axes = panels(1, 2, (10.5, 5), sharex=True, sharey=True)
    every = sorted({rate for line in losses.values() for rate in line})
    lowest = min(loss for line in losses.values() for loss in line.values())
    highest = lowest + 0.25  # what broke down would press all others together
    for ax, title in zip(axes, ("As they are", "With norms")):
        chosen = [name for name in losses if name.endswith("norms") or name.endswith("-norm")]
        chosen = chosen if ax is axes[1] else [name for name in losses if name not in chosen]
        above = []
        for name, look in style.lines_of(chosen).items():
            look["marker"] = style.MARKERS[style.mechanism(name)]
            ax.semilogx(list(losses[name]), list(losses[name].values()), label=name, **look)
            for rate, loss in losses[name].items():
                if loss > highest:
                    place = {"xytext": (0, 12 * above.count(rate)), "textcoords": "offset points"}
                    ax.annotate(f"{loss:.1f} ↑", (rate, highest), ha="center", va="bottom", color=look["color"], **place)
                    above.append(rate)
        ax.set_xticks(every, [f"{1000 * rate:g}" for rate in every])
        ax.minorticks_off()
        ax.set(xlabel="learning rate × 1000", ylim=(lowest - 0.02, highest))
        ax.set_title(title, pad=18)  # above what leaves the panel
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9)  # below: lines go everywhere
    axes[0].set_ylabel("validation loss (nats/token)")
    return legible(figure)


def breaking(runs: dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]]) -> Figure:
    """10: (step, largest logit) and (step, training loss) of runs by name; the first of them, which breaks, in black."""
    figure, axes = panels(1, 2, (10.5, 3.6))
    colours = ["#222222", *plt.get_cmap("viridis")(np.linspace(0.1, 0.85, max(1, len(runs) - 1)))]
    for (name, (logits, losses)), colour, line in zip(runs.items(), colours, ("-", "--", "-.", ":", "-")):
        axes[0].semilogy(*zip(*logits), line, color=colour, label=name)
        axes[1].plot(*zip(*losses), line, color=colour, label=name)
    style.logarithmic(axes[0].yaxis, (1,))
    axes[0].set(title="Largest attention logit", xlabel="step")
    axes[1].set(title="Training loss (nats/token)", xlabel="step")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return legible(figure)
