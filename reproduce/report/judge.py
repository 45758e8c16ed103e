"""How a difference between two rows becomes a word, and a claim a verdict.

A difference is an estimate with a 95 % interval. Between seeds it is Student's interval of the paired differences: two rows of one
seed read the same text in the same order, so what a seed makes easy or hard for both falls out. With fewer than SEEDS seeds it
is taken over the articles of the held-out text instead, which says nothing about other seeds: "these models". It has a word, and
leaves every claim open. Its error comes from leaving out one article at a time, which needs no random numbers and takes articles as
long as they are.

Accuracies have two chances at once: which seeds were run, and which images were there to be judged by. Where a record says which images
were right, the interval knows of both.

A claim allows a range. Only an interval that lies within it reproduces the claim, and only one that lies outside refutes it.
A wide interval does neither, so noise helps nobody.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from ..models.rows import row_of
from ..store.bits import unpacked
from ..store.records import Record
from .query import diverged, grouped

CONFIDENCE = 0.95
MARGIN = 0.01  # nats per token: what lies within it on both sides is level
POINT = 0.01  # of accuracy
SEEDS = 5  # fewer give no interval between seeds
CLEAR_DECAY = 0.9  # effective rank over size
ARTICLES = 20  # fewer give none over articles
BELOW, ABOVE, LEVEL = "below", "above", "level"
REPRODUCED, FAILED, UNRESOLVED, UNTESTED = "reproduced", "not reproduced", "not resolved", "not tested at this scale"
VERDICTS = (REPRODUCED, FAILED, UNRESOLVED, UNTESTED)
NORMS = ("qk_norm", "latent_norm")  # what keeps logits small is a setting of a row, as its rate is


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its interval.

    Args:
        value: the mean.
        low, high: where the interval begins and ends.
        over: what it is taken over, in words.
        of_seeds: whether other seeds would give about the same; else it is of these models alone, and judges no claim.
    """

    value: float
    low: float
    high: float
    over: str
    of_seeds: bool = True

    @property
    def word(self) -> str:
        """As `word_within` has it, of a loss."""
        return self.word_within(MARGIN)

    def word_within(self, margin: float) -> str:
        """ "below" or "above" where zero is excluded, "level" within the margin, else "not resolved"."""
        if self.low > 0 or self.high < 0:
            return ABOVE if self.low > 0 else BELOW
        return LEVEL if self.low >= -margin and self.high <= margin else UNRESOLVED

    def verdict(self, low: float, high: float) -> str:
        """Of a claim that allows differences from low to high."""
        if not self.of_seeds:
            return UNRESOLVED
        if low <= self.low and self.high <= high:
            return REPRODUCED
        return FAILED if self.high < low or self.low > high else UNRESOLVED


def together(verdicts: Iterable[str], every: bool = True) -> str:
    """The verdict of a claim about several rows.

    Args:
        verdicts: of each of them.
        every: whether the claim speaks of all of them; otherwise one that holds is enough.

    Returns:
        What settles it, else what leaves it open.
    """
    found, order = set(verdicts), (FAILED, UNTESTED, UNRESOLVED, REPRODUCED)
    if not every:
        order = (REPRODUCED, UNRESOLVED, UNTESTED, FAILED)
    return next((verdict for verdict in order if verdict in found), UNTESTED)


# Spectra.


def decays(shares: Sequence[float]) -> str:
    """The verdict on one unfolding.

    Args:
        shares: its effective ranks over its size, by both measures.
    """
    below = [share <= CLEAR_DECAY for share in shares]
    return REPRODUCED if all(below) else UNRESOLVED if any(below) else FAILED


# Intervals.


def between_seeds(differences: Sequence[float], tries: int = 1, *, seeds: int = SEEDS) -> Estimate | None:
    """Student's interval of the mean of paired differences.

    Args:
        differences: one per seed.
        tries: of how many rows the best may count; each then gets a wider interval (Bonferroni).
        seeds: how many there must be.

    Returns:
        None where there are fewer.
    """
    n = len(differences)
    if n < seeds:
        return None
    return _interval(np.mean(differences), np.std(differences, ddof=1) / n**0.5, n, tries, f"{n} seeds")


def over_articles(row: np.ndarray, base: np.ndarray, *, articles: int = ARTICLES) -> Estimate | None:
    """The difference in nats per token on one text, with the chance of which articles the text holds.

    Args:
        row: (articles, 2), nats and tokens of each article.
        base: the same of the row beside it.
        articles: how many there must be.

    Returns:
        None where there are fewer.

    Raises:
        ValueError: if the two are not of the same articles.
    """
    if row.shape != base.shape or (row[:, 1] != base[:, 1]).any():
        raise ValueError("losses per article are of different texts: they cannot be paired")
    n = len(row)
    if n < articles:
        return None
    nats, tokens = row[:, 0] - base[:, 0], row[:, 1]
    without = (nats.sum() - nats) / (tokens.sum() - tokens)  # the difference, one article left out at a time
    error = ((n - 1) / n * ((without - without.mean()) ** 2).sum()) ** 0.5
    return replace(_interval(nats.sum() / tokens.sum(), error, n, 1, f"{n} articles, these models"), of_seeds=False)


def over_windows(row: dict, base: dict, *, windows: int = ARTICLES) -> Estimate | None:
    """The difference in nats per token on one text that was read in windows of one length, as `over_articles` has it.

    Args:
        row: what a record says of its losses on the text: `tokens`, and `windows`, the nats of each.
        base: the same of the row beside it.
        windows: how many there must be.

    Returns:
        None where there are fewer, or a record does not say.
    """
    if not ("windows" in row and "windows" in base):
        return None
    each = [np.array([[nats, test["tokens"] / len(test["windows"])] for nats in test["windows"]]) for test in (row, base)]
    return over_articles(*each, articles=windows)


def over_seeds_and_images(values: np.ndarray, tries: int = 1, *, seeds: int = SEEDS) -> Estimate | None:
    """The mean over seeds and images, with the chance of both.

    The half width is the root of the sum of two squares: of Student's interval between seeds, and of that between images. What is
    neither the seed's nor the image's alone is in both, so that the whole is rather too wide.

    Args:
        values: (seeds, images), such as 1 where a row is right and another one is not, -1 the other way round.
        tries, seeds: as in `between_seeds`.

    Returns:
        None where there are fewer seeds.
    """
    n, images = values.shape
    if n < seeds:
        return None
    squares = [_half(means, tries) ** 2 for means in (values.mean(axis=1), values.mean(axis=0))]
    mean, half = float(values.mean()), float(sum(squares) ** 0.5)
    return Estimate(mean, mean - half, mean + half, f"{n} seeds and {images:,} images")


def away_from_zero(differences: dict[tuple, Sequence[float]]) -> set[tuple]:
    """Those mean differences that are told from zero when all of them are judged together (Holm 1979).

    The clearest one must be so among all, the next one among the others, and so on until one is not.

    Args:
        differences: what is compared -> one per seed, at least two.
    """
    chances = {}
    for compared, values in differences.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
        chances[compared] = 2 * stdtr(len(values) - 1, -abs(mean) / error) if error else float(mean == 0)
    told: set[tuple] = set()
    for compared in sorted(chances, key=chances.__getitem__):
        if chances[compared] > (1 - CONFIDENCE) / (len(chances) - len(told)):
            break
        told.add(compared)
    return told


def over_layers(differences: Sequence[float]) -> Estimate:
    """Student's interval of a mean over the layers of two models.  It says nothing about other seeds, and judges no claim.

    Args:
        differences: one per layer, at least two.
    """
    n = len(differences)
    error = np.std(differences, ddof=1) / n**0.5
    return replace(_interval(np.mean(differences), error, n, 1, f"{n} layers, these models"), of_seeds=False)


def _half(values: np.ndarray, tries: int) -> float:
    """Half the width of Student's interval of a mean."""
    return _quantile(len(values), tries) * values.std(ddof=1) / len(values) ** 0.5


def _quantile(n: int, tries: int) -> float:
    return stdtrit(n - 1, 1 - (1 - CONFIDENCE) / 2 / tries)


def _interval(mean: float, error: float, n: int, tries: int, over: str) -> Estimate:
    half = _quantile(n, tries) * error
    return Estimate(float(mean), float(mean - half), float(mean + half), over)


# Which runs are compared.


@dataclass(frozen=True)
class Best:
    """A row at the best of its settings.

    Args:
        runs: of this setting, that judge.
        settings: how many were tried.
        chooser: its run of the seed that chose it.
    """

    runs: list[Record]
    settings: int
    chooser: Record


def at_their_best(runs: list[Record]) -> dict[str, Best]:
    """Each row at the setting that is best on held-out data: its rate, its norms, what else was changed in its training.

    Settings are compared on one seed, that of which most of them were run. Where there was something to choose it does not judge: the
    luck that made it best on held-out data is in what it reaches on test data too. It is shown where no other seed was run, and counts
    where it diverged.

    Args:
        runs: of one budget.
    """
    best = {}
    for label, group in grouped(runs, _bare_label).items():
        settings = grouped(group, lambda r: json.dumps(r.config, sort_keys=True))
        seeds = [r.seed for r in group]
        chooses = max(sorted(set(seeds)), key=seeds.count)
        chooser = min((r for r in group if r.seed == chooses), key=lambda r: r.on_held_out)
        chosen = [r for r in group if r.config == chooser.config]
        others = [r for r in chosen if r.seed != chooses]
        broken_off = [r for r in chosen if r.seed == chooses and r.diverged_at is not None]
        judges = [*broken_off, *others] if others and len(settings) > 1 else chosen
        best[label] = Best(judges, len(settings), chooser)
    return best


def _bare_label(record: Record) -> str:
    """The row's name without its norms."""
    return row_of({name: value for name, value in record.config["row"].items() if name not in NORMS}).label


# What was found.


def on_test_text(record: Record) -> dict | None:
    """What it reached on the test text: the first that it names; others show how it transfers."""
    return next(iter(record.metrics.get("test", {}).values()), None)


def test_losses(runs: list[Record]) -> list[float]:
    """What those that read a test text reached on the first of them.

    Args:
        runs: of one row.
    """
    return [found["loss"] for r in runs if (found := on_test_text(r))]


def _test_text(record: Record) -> tuple[str, int]:
    """The name of its test text, and how many tokens it read of it."""
    name, found = next(iter(record.metrics["test"].items()))
    return name, found["tokens"]


def differences_by_seed(row: list[Record], base: list[Record]) -> dict[int | None, float]:
    """By how many nats per token a row's test loss is above another row's with the same seed.

    Args:
        row, base: as in `loss_difference`.

    Returns:
        By seed, of those with which both read a test text to its end.

    Raises:
        ValueError: as `loss_difference` does.
    """
    return {a.seed: on_test_text(a)["loss"] - on_test_text(b)["loss"] for a, b in _test_pairs(row, base)}


def _test_pairs(row: list[Record], base: list[Record]) -> list[tuple[Record, Record]]:
    """The pairs of which both read a test text, which must be the same one."""
    pairs = [(a, b) for a, b in _pairs(row, base) if on_test_text(a) and on_test_text(b)]
    if len(texts := {_test_text(r) for pair in pairs for r in pair}) > 1:
        said = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in sorted(texts))
        raise ValueError(f"losses are of different test texts: {said}; they cannot be paired")
    return pairs


def loss_difference(row: list[Record], base: list[Record]) -> Estimate | None:
    """By how many nats per token a row's test loss is above another row's: between seeds where there are enough, else over articles.

    Args:
        row: its runs.
        base: the other's.

    Returns:
        None where no seed of both read a test text to its end, or too little was read.

    Raises:
        ValueError: if they read different test texts.
    """
    pairs = _test_pairs(row, base)
    if estimate := between_seeds([on_test_text(a)["loss"] - on_test_text(b)["loss"] for a, b in pairs]):
        return estimate
    if not pairs:
        return None
    name, _ = _test_text(pairs[0][0])
    return article_difference(row, base, name)


def article_difference(row: list[Record], base: list[Record], name: str) -> Estimate | None:
    """By how many nats per token a row's loss on a test text is above another row's, with the chance of which articles the text holds.

    Losses of an article are means over seeds, so that the estimate is of these models.

    Args:
        row, base: as in `loss_difference`.
        name: of the text.

    Returns:
        None where no seed of both read it to its end, or it has too few articles.
    """
    pairs = [pair for pair in _pairs(row, base) if all(name in r.metrics.get("test", {}) for r in pair)]
    means = [np.mean([np.array(r.metrics["test"][name]["articles"], float) for r in side], axis=0) for side in zip(*pairs)]
    return over_articles(*means) if pairs else None


def metric_difference(
    row: list[Record], base: list[Record], metric: str, tries: int = 1, *, seeds: int = SEEDS
) -> Estimate | None:
    """By how much a row's metric is above another row's, between seeds.

    Args:
        row, base: as in `loss_difference`.
        metric: which.
        tries, seeds: as in `between_seeds`.
    """
    return between_seeds([a.metrics[metric] - b.metrics[metric] for a, b in _pairs(row, base)], tries, seeds=seeds)


def accuracy_difference(
    row: list[Record], base: list[Record], name: str, tries: int = 1, *, converted: bool = False
) -> Estimate | None:
    """A row's accuracy minus another row's, over seeds and, where the records say which images were right, over images.

    Args:
        row, base: as in `loss_difference`.
        name: "top1" or "top5".
        tries: as in `between_seeds`.
        converted: of the models before they were fine-tuned.

    Returns:
        None where there are too few seeds.
    """
    pairs = [[hits_of(r, name, converted) for r in pair] for pair in _pairs(row, base)]
    if any(hits is None for pair in pairs for hits in pair):
        return None if converted else metric_difference(row, base, name, tries)
    return over_seeds_and_images(np.array([a.astype(float) - b for a, b in pairs]), tries) if pairs else None


def accuracy(runs: list[Record], name: str, *, converted: bool = False) -> Estimate | None:
    """A row's accuracy with its interval over seeds and images.

    Args:
        runs: of one setting.
        name, converted: as in `accuracy_difference`.

    Returns:
        None where fewer than two ended, or a record does not say which images were right.
    """
    hits = [hits_of(r, name, converted) for r in runs if converted or r.diverged_at is None]
    if not hits or any(own is None for own in hits):
        return None
    return over_seeds_and_images(np.array(hits, float), seeds=2)


def hits_of(record: Record, name: str, converted: bool = False) -> np.ndarray | None:
    """Which test images a model is right about.

    Args:
        record: of its run.
        name, converted: as in `accuracy_difference`.

    Returns:
        (images,) bool; None where the record does not say.
    """
    metrics = record.metrics["converted"] if converted else record.metrics
    return unpacked(metrics["hits"][name], record.data["test_images"]) if "hits" in metrics else None


def _pairs(row: list[Record], base: list[Record]) -> list[tuple[Record, Record]]:
    """Runs of both rows that read the same data in the same order; a run that diverged has no partner."""
    others = {r.seed: r for r in base if r.diverged_at is None}
    return [(r, others[r.seed]) for r in row if r.diverged_at is None and r.seed in others]


def broken(row: list[Record], base: list[Record]) -> str | None:
    """The verdict where runs diverged: a row whose run broke off has lost; beside a base that did there is nothing to be said.

    Args:
        row, base: as in `loss_difference`.

    Returns:
        None where none did.
    """
    if diverged(base):
        return UNRESOLVED
    return FAILED if diverged(row) else None
