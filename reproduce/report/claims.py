"""What the paper claims, what was measured, and the verdict: the page CLAIMS.md, with the rules that judge it.

Values and sentences are those that readers of the paper quote; its tables were not available to us first-hand.
"""

from ..store.records import Record
from .findings import FINDINGS as SENTENCES
from .findings import beside
from .judge import ABOVE, BELOW, CONFIDENCE, FAILED, LEVEL, MARGIN, REPRODUCED, SEEDS, UNRESOLVED, VERDICTS
from .ledger import FINDINGS, OURS, RULES, SIZES, STATEMENTS, Claim
from .markdown import markdown
from .query import BUDGETS
from .statements import all_statements


def all_claims(records: list[Record]) -> list[Claim]:
    """Exact statements, sizes, and findings.

    Args:
        records: all that there are.
    """
    return [*all_statements(records), *SENTENCES]


def verdicts(records: list[Record]) -> list[tuple[Claim, str, str]]:
    """Every claim with what was measured and the verdict.

    Args:
        records: all that there are.
    """
    return [(claim, *claim.finding(records)) for claim in all_claims(records)]


# The page.


def render(records: list[Record]) -> str:
    """What stands in CLAIMS.md: findings, exact statements, the rules, what each rule says to every row on record, and sizes.

    Args:
        records: all that there are.
    """
    parts = [
        counts(records),
        "## Findings",
        table(records, FINDINGS),
        "## Exact statements",
        table(records, STATEMENTS),
        "## Exact statements of ours",
        table(records, OURS),
        "## The rules",
        HOW,
        "\n".join(f"- **{name}**. {text}" for name, text in RULES.items()),
        "## What each rule says to every row on record",
        TRIED,
        power_table(records),
        words_table(records),
        "## Sizes",
        table(records, SIZES),
    ]
    return "\n\n".join(part for part in parts if part)


HOW = (
    f"A difference in loss is an estimate with a {100 * CONFIDENCE:g} % interval. Two runs of one seed read the same text in the same "
    f"order, so they are paired. From {SEEDS} such pairs on the interval is Student's, between seeds. With fewer it is taken over the "
    "articles of the test text: its width is how much the difference changes when one article after another is left out. It then holds for "
    "the models that were trained, and is marked *these models*: with another seed they may differ by more. Such an interval is shown, but "
    "the claim stays *not resolved*. Where one of two rows has not read the test text yet, the interval shown is between seeds of the "
    "preset `gpu` on the validation text, and says so: it decides nothing either.\n\n"
    f"*Below* and *above* mean that the interval excludes zero. *Level* means that it lies within {MARGIN:g} nats on both sides, "
    "about what eight pairs of seeds of these runs can resolve. Anything else is *not resolved*. Of two rows that do not differ at "
    "all one is called *below* or *above* the other in about 5 % of trials; a test simulates it. Words and verdicts are each by "
    "themselves: none is stricter for how many others there are.\n\n"
    "A row is judged at the setting with the lowest validation loss, and under its table stands how many there were; of images, at that "
    f"with the best held-out top-5. That choice is made on one seed, which then does not judge: {SEEDS} others are asked for. The result "
    "is read from the test text, once. A validation loss by which a rate was chosen never judges. Where a run of a row diverged at its "
    "setting, claims about this row are not reproduced, however many seeds there are. Claims that set another row beside it are not "
    "resolved."
)


TRIED = (
    "A rule that no row can fail shows nothing. So each rule is tried here on other rows too. Where a rule asks for more than is on "
    "record, it is tried on what there is: the seeds that were run, and their validation loss. These are no verdicts.\n\n"
    "*Tried on*: what the rule was given. *Would fail*, *leaves open*, *lets pass*: the rows or changes that it would call not reproduced, "
    "not resolved, reproduced. A control is the same check with one thing wrong on purpose; *as it is* means nothing wrong."
)


def table(records: list[Record], *kinds: str) -> str:
    """A line for each claim of some kinds.

    Args:
        records: all that there are.
        kinds: of STATEMENTS, SIZES, FINDINGS and OURS.
    """
    rows = [[c.where, c.says, measured, verdict, c.rule] for c, measured, verdict in verdicts(records) if c.kind in kinds]
    said = "we say" if kinds == (OURS,) else "the paper says"
    return markdown(["place", said, "measured", "verdict", "rule"], rows, words=True)


def counts(records: list[Record]) -> str:
    """How many claims of each kind have which verdict.

    Args:
        records: all that there are.
    """
    judged, rows = verdicts(records), []
    for kind in (STATEMENTS, OURS, SIZES, FINDINGS):
        found = [verdict for claim, _, verdict in judged if claim.kind == kind]
        rows.append([kind, str(len(found)), *(str(found.count(verdict)) for verdict in VERDICTS)])
    return markdown(["claims", "how many", *VERDICTS], rows)


def power_table(records: list[Record]) -> str:
    """For each claim of a rule of its own, which rows on record the rule fails, leaves open and lets pass.

    Args:
        records: all that there are.
    """
    tried: dict[tuple[str, str], dict[str, str]] = {}
    why: dict[tuple[str, str], str] = {}
    for claim in all_claims(records):
        tried.setdefault((claim.rule, claim.trial), {}).update(claim.on_every_row(records))
        why[claim.rule, claim.trial] = claim.none_can
    rows = [
        [rule, trial, _names(said, FAILED) or why[rule, trial], _names(said, UNRESOLVED), _names(said, REPRODUCED)]
        for (rule, trial), said in tried.items()
        if said
    ]
    return markdown(["rule", "tried on", "would fail", "leaves open", "lets pass"], rows, words=True)


def words_table(records: list[Record]) -> str:
    """Which word each row of Tables 2 and 3 would have beside the table's base, from the seeds that were run; empty without runs.

    Args:
        records: all that there are.
    """
    words = (BELOW, LEVEL, ABOVE, UNRESOLVED)
    rows = []
    for experiment, budget in BUDGETS.items():
        pairs = beside(records, experiment, budget.base)
        said = {row: estimate.word if (estimate := pair.difference) else UNRESOLVED for row, pair in pairs.items()}
        if said:
            rows.append([f"{budget.title}, beside {budget.base}", *(_names(said, word) for word in words)])
    return markdown(["rows", *words], rows, words=True) if rows else ""


def _names(said: dict[str, str], verdict: str) -> str:
    """The rows with this verdict; of more than ten how many there are."""
    rows = [row for row, its in said.items() if its == verdict]
    return f"{len(rows)} of {len(said)}" if len(rows) > 10 else "; ".join(rows)
