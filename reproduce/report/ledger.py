"""What a claim of the paper is, and the rules that judge claims.

Every rule is a function of the records and of one row. So the page of claims can say what a rule does to the row that a claim is
about, and to every other row that is on record: a rule that nothing fails shows nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..store.records import Record
from .judge import CLEAR_DECAY, MARGIN, SEEDS, UNTESTED, together

SIZE_TOLERANCE = 0.005
CLASSES = 100  # of ten, five guesses by chance hold the right one every second time
TENTH = (0.08, 0.12)  # shares of parameters that are "almost 10x fewer"
ALIKE = 0.95  # of the parameters: nearly as large
FASTER = (-0.25, -0.15)  # "up to 20 %"
TIMING = 0.03  # how well a change of a time is known, as a share: repeats of one command are not on record
STATEMENTS, SIZES, FINDINGS, OURS = "exact statements", "sizes", "findings", "exact statements of ours"
EXACT, MISSES = 1e-12, 1e-3  # relative errors in float64: of what is equal at most, of a control at least
FLOAT32, BFLOAT16 = 1e-5, 2e-2  # of what is equal at most, in these
Finding = tuple[str, str]  # what was measured, and the verdict
NO_RUN: Finding = ("no run at a scale that could tell", UNTESTED)

RULES = {
    "exact": f"Outputs and gradients of both sides are compared in float64, and once more with one thing wrong, as controls. Reproduced "
    f"where all differ by at most {EXACT:.0e} and every control by at least {MISSES:g}. Not reproduced where one differs by more, not "
    f"resolved where a control does not miss. The flash kernel may differ by {FLOAT32:.0e} in float32 and {BFLOAT16:g} in bfloat16.",
    "ranks": "Reproduced where no rank is above the theorem's, and layers with wide heads and latents have the theorem's. Without such "
    "layers it is not tested.",
    "growth": "Reproduced where parameters over r d + r1 r² differ by at most a factor of 3 between all layers on record. So must what is "
    "added when d alone grows, over r d, and when r1 alone grows, over r1 r².",
    "size": f"Reproduced within {100 * SIZE_TOLERANCE:g} % of the paper's number: wide enough for a last digit that was cut or "
    "rounded, narrow enough to see two digits exchanged.",
    "formula": "Reproduced where the module and its cache hold exactly as many numbers as the formula says.",
    "share": "Reproduced where the share of parameters rounds to the paper's number, or lies in its range.",
    "loss": f"Reproduced where the whole interval of the difference is at most {MARGIN:g} nats, not reproduced where the whole "
    f"interval is above that, else not resolved. With fewer than {SEEDS} seeds on the test text always not resolved: an interval over "
    "articles knows nothing of other seeds.",
    "1-3 %": "Reproduced where the whole interval is within 1 to 3 % of the other row's loss, not reproduced where the whole interval is "
    "outside of that, else not resolved. A lower loss is better, but not what the paper says. "
    f"With fewer than {SEEDS} seeds on the test text always not resolved. So a row that is 2 % above holds this sentence "
    "and fails the one that calls it comparable: both are the paper's.",
    "accuracy": f"Top-5 accuracy on images of at least {CLASSES} classes. Reproduced where the whole interval is above minus one "
    f"point, not reproduced where it is below that, else not resolved. With fewer classes, or fewer than {SEEDS} seeds, always not "
    "resolved. Of several studies the one with the most classes judges of which every row has its seeds. "
    f"A row that is tried has {100 * TENTH[0]:g} to {100 * TENTH[1]:g} % of the other's parameters. Where training images were "
    "held out, their top-5 chooses every rate, and which of these rows is judged; of equals the lower loss, then the lower rate. All by "
    "the runs of one seed that then does not judge. That was settled before any seed that judges ran, with runs of the seed that chooses "
    "on record. "
    "The interval knows of other seeds and of other images. Otherwise every such row is tried, and the best counts; each interval is "
    "wider by so much that all hold together (Bonferroni). Against every rate of the other row it must then hold.",
    "heads": "Judged as accuracy is, and by the same images: a Tucker row with fewer heads than the model, beside the largest row with all "
    f"heads that has no more parameters. It must have at least {100 * ALIKE:g} % of them. What was saved at the heads went elsewhere: if "
    "the head mode has room, the row is not behind. It has to hold at every size. Reproduced where every whole interval is above minus one "
    "point, not reproduced where one is below that, else not resolved.",
    "decay": f"Effective rank of each of the six unfoldings over their size, by the entropy of the singular values and of their squares, "
    f"mean over layers. A mode decays where both are at most {CLEAR_DECAY:g}, and does not where both are more; else it depends on the "
    "measure. Reproduced where all six decay, not reproduced where one does not, else not resolved. Of the paper's figure we know these "
    "words, and no value. The sentence is about a trained GPT-2: that with multi-head attention at Table 2's budget judges it. Spectra of "
    "others' models came on record later: what the rule says to them is shown, and judges nothing.",
    "time": "Each Tucker row is judged by itself, and one that holds is enough. It holds where it saves "
    f"{-100 * FASTER[1]:g} to {-100 * FASTER[0]:g} % of a training step. "
    f"Times of one record, and so of one device, are compared. Repeats are not on record, so a saving is taken as known to "
    f"{100 * TIMING:g} points on both sides: closer to a limit it is not resolved. Which row the paper compares with is not known to us: "
    "it must hold beside MHA and beside GQA-8 on every device, and fail everywhere to be not reproduced.",
}


@dataclass(frozen=True)
class Claim:
    """A sentence or number of the paper, and how records judge it.

    Args:
        where: its place in the paper.
        says: its value or sentence.
        rule: a key of RULES.
        judge: (records, row) -> what was measured of this row, and the verdict that the rule gives it.
        rows: records -> the rows that the claim is about.
        trial: what the rule is tried on beside the claim's own rows, in words; claims that share it are tried together.
        kind: STATEMENTS, SIZES, FINDINGS or OURS.
        every: whether it speaks of all of these rows; otherwise one that holds is enough.
        others: records -> all rows that the rule can be tried on; by default those of the claim alone.
        tried: as `judge`, where it needs more than is on record: the same rule on what there is.
        none_can: why no row on record fails the rule.
        beside: records -> what else they say of it, which judges nothing; empty where that is nothing.
    """

    where: str
    says: str
    rule: str
    judge: Callable[[list[Record], str], Finding]
    rows: Callable[[list[Record]], Sequence[str]]
    trial: str
    kind: str = FINDINGS
    every: bool = True
    others: Callable[[list[Record]], Sequence[str]] | None = None
    tried: Callable[[list[Record], str], Finding] | None = None
    none_can: str = "none"
    beside: Callable[[list[Record]], str] = lambda records: ""

    def finding(self, records: list[Record]) -> Finding:
        """What was measured of all its rows, and the verdict."""
        found = {row: self.judge(records, row) for row in self.rows(records)}
        said = [f"{short(row)} {measured}" if len(found) > 1 else measured for row, (measured, _) in found.items()]
        measured = ". ".join(filter(None, ("; ".join(said) or NO_RUN[0], self.beside(records))))
        return measured, together((verdict for _, verdict in found.values()), self.every)

    def on_every_row(self, records: list[Record]) -> dict[str, str]:
        """What the rule says to every row that it can be tried on."""
        judge = self.tried or self.judge
        return {row: judge(records, row)[1] for row in (self.others or self.rows)(records)}


def short(row: str) -> str:
    """ "[8,64,64]" for "Tucker [8,64,64]"."""
    return row.removeprefix("Tucker ")
