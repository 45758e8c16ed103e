"""What else the parameters of a Tucker row could be spent on, which way is judged, and what may be advised.

The rule stood before the runs. One seed tries every way at each size, and validation text chooses one of them, or the paper's own triple.
The one that was chosen is judged by other seeds on a test text, beside the paper's own at the same seeds. A way that was chosen and judged
below at DECIDES sizes is advice; below at one size, it is said of that size alone.
"""

import math
from dataclasses import dataclass

from ..experiments.table2 import PRESETS
from ..models.rows import ALLOCATION_GIVES, TABLE2_ALLOCATIONS
from ..store.records import Record
from .cells import above_cell, difference_cells, loss_cell
from .judge import BELOW, SEEDS, on_test_text
from .markdown import Table, markdown
from .query import budget_of, grouped, mean_loss, of_one_budget, settings_on_fresh_text
from .words import scale_in_words, table_name, text_in_words

PRESET = "gpu-fresh-allocations"
CHOOSE = PRESETS[PRESET].seeds
DECIDES = 2  # of the three sizes


@dataclass(frozen=True)
class Study:
    """How else the parameters of one Tucker row were spent.

    Args:
        triple: the label of the row.
        own: runs of other ways.
        paper: those of the paper's own triple that differ in nothing else.
    """

    triple: str
    own: list[Record]
    paper: list[Record]

    @property
    def paper_row(self) -> str:
        """As records have it."""
        return f"{self.triple} QK-norm"

    @property
    def tried(self) -> dict[str, list[Record]]:
        """The seed that chooses, by row from the lowest loss to the highest, the paper's among them."""
        groups = grouped([r for r in (*self.paper, *self.own) if r.seed in CHOOSE], lambda r: r.method)
        return dict(sorted(groups.items(), key=lambda item: math.inf if (loss := mean_loss(item[1])) is None else loss))

    @property
    def chosen(self) -> str:
        """The row with the lowest loss, which alone is judged."""
        return next(iter(self.tried))

    @property
    def gives(self) -> str:
        """To what the chosen row gives, and from what; empty where it is the paper's."""
        labels = [row.normed().label for row in TABLE2_ALLOCATIONS[self.triple]]
        return ALLOCATION_GIVES[labels.index(self.chosen)] if self.chosen != self.paper_row else ""

    def judges(self, row: str) -> list[Record]:
        """Runs of the other seeds that judge a row."""
        runs = [r for r in (*self.paper, *self.own) if r.method == row and r.seed not in CHOOSE]
        return [r for r in runs if on_test_text(r) or r.diverged_at is not None]

    @property
    def verdict(self) -> list[str]:
        """By how much the chosen row is above the paper's, and the word for it; empty where that is the paper's, or none judged it."""
        return difference_cells(self.judges(self.chosen), self.judges(self.paper_row)) if self.gives else ["", ""]


def allocation_tables(records: list[Record]) -> list[Table]:
    """For each Tucker row of Table 2: as many parameters spent otherwise, from the lowest loss to the highest; then what is advised.

    Args:
        records: all that there are.
    """
    found, studies = of_one_budget(settings_on_fresh_text(records, "table2", PRESET)), []
    for triple, rows in TABLE2_ALLOCATIONS.items():
        labels = {row.normed().label for row in rows}
        own = [r for r in found if r.method in labels]
        if any(r.seed in CHOOSE for r in own):
            studies.append(Study(triple, own, _as_the_paper(records, triple, own)))
    notes = [""] * (len(studies) - 1) + [advice(studies)]
    return [_table(study, note) for study, note in zip(studies, notes)]


def _as_the_paper(records: list[Record], triple: str, like: list[Record]) -> list[Record]:
    """The runs of the paper's own triple for both tensors that differ in nothing else."""
    trained, budget, seeds = like[0].train, budget_of(like[0]), {r.seed for r in like}
    found = [r for r in settings_on_fresh_text(records, "table2", "gpu-fresh") if r.method == f"{triple} QK-norm"]
    return [r for r in found if (r.train, budget_of(r)) == (trained, budget) and r.seed in seeds]


def advice(studies: list[Study]) -> str:
    """What may be said of a given number of parameters, by the rule of this module.

    Args:
        studies: of each size.
    """
    said = []
    for gives, below in grouped([study for study in studies if study.verdict[1] == BELOW], lambda study: study.gives).items():
        sizes = " and ".join(study.triple for study in below)
        if len(below) >= DECIDES:
            said.append(f"Of a given number of parameters, give more to {gives}: so it is at the sizes of {sizes}.")
        else:
            said.append(f"At the size of {sizes} alone it is better to give more to {gives}. That is too little for advice.")
    return " ".join(said) or f"No other way is judged below the paper's by {SEEDS} seeds, so that nothing is advised."


def _table(study: Study, note: str) -> Table:
    tried, lines = study.tried, []
    base = tried.get(study.paper_row, [])
    for row, runs in tried.items():
        name = f"{row} (the paper's)" if row == study.paper_row else row
        judged = study.verdict if row == study.chosen else ["", ""]
        lines.append([name, f"{runs[0].attention_parameters / 1e6:.2f}M", loss_cell(runs), above_cell(runs, base), *judged])
    chose = [r for runs in tried.values() for r in runs]
    title = (
        f"**The parameters of {study.triple} spent otherwise: {scale_in_words('table2', chose)}, {text_in_words(chose)}, one seed.** "
        f"Rate {chose[0].rate:g}, with QK-norm. Ranks before and after the softmax, where they differ. Nats per token. Validation loss "
        "chooses one row, which other seeds judge on a test text."
    )
    header = ["row", "attention", "validation loss", "minus the paper's", "test loss minus the paper's", "that is"]
    judges = [r for row in dict.fromkeys((study.chosen, study.paper_row)) for r in study.judges(row)]
    return Table(table_name("table2", PRESET), title, markdown(header, lines), [*chose, *judges], note)
