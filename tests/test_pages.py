"""README and the pages of results: as the records have them, short, readable, and with no number that no record holds."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
from helpers import committed_records, nudged, run_here

from reproduce.models.public import agreement
from reproduce.report import claims, headline, pages, query
from reproduce.report.judge import FAILED, REPRODUCED, UNRESOLVED, UNTESTED
from reproduce.report.markdown import aligned, markdown
from reproduce.report.query import BUDGETS
from reproduce.store import records

ROOT = Path(__file__).parent.parent
COMMITTED = committed_records()
PAGES = [pages.FIRST, *pages.BESIDE]
README = (ROOT / pages.FIRST).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# As the records have them


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every part that a page asks for."""
    return pages.texts_of({name for page in PAGES for name in pages.parts_of(text_of(page))}, COMMITTED)


@pytest.mark.no_cover
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_exactly_what_the_records_say(page, texts):
    """Where it fails: python -m reproduce report --write README.md"""
    assert text_of(page) == pages.filled(text_of(page), texts)
    assert all(texts[name] for name in pages.parts_of(text_of(page))), "a part that no record fills"


def test_every_table_and_every_part_stands_in_one_page(texts):
    shown = [name for page in PAGES for name in pages.parts_of(text_of(page))]
    assert len(shown) == len(set(shown))
    to_come = set(pages.TO_COME)
    assert set(shown) == {table.name for table in pages.all_tables(COMMITTED)} | to_come | set(pages.PARTS) - {"results"}


def rows_of(text: str) -> list[str]:
    """The lines of its tables without their headers."""
    lines = text.splitlines()
    return [line for line, below in zip(lines, [*lines[1:], ""]) if line.startswith("| ") and not below.startswith("|--")]


@pytest.mark.no_cover
def test_changed_records_change_every_row_of_every_part(texts):
    """Control for the tests above: the numbers are read, not remembered."""

    def changed() -> dict[str, str]:
        longer = [dataclasses.replace(r, metrics=nudged(r.metrics), wall_seconds=1.1 * r.wall_seconds) for r in COMMITTED]
        return pages.texts_of(texts, longer)

    after = [changed(), changed()]  # a rounded ratio may stay by chance, but not twice
    same = {name: set(rows_of(texts[name])).intersection(*(rows_of(other[name]) for other in after)) for name in texts}
    same = {name: {row for row in rows if set(re.sub(r"^\| [^|]+", "", row)) - set("| notruye")} for name, rows in same.items()}
    assert sum(len(rows_of(text)) for text in texts.values()) > 400
    allowed = {"on record", "claims"}  # settings and hours; a few verdicts hang on no number
    assert {name: rows for name, rows in same.items() if rows and name not in allowed} == {}


def test_a_part_without_records_says_so():
    (name,) = pages.parts_of(marked("Table 2, sweep"))
    assert pages.texts_of([name], []) == {name: ""}
    assert pages.NONE in pages.filled(marked(name), {name: ""})


def marked(name: str, between: str = "old") -> str:
    begin, end = (mark.format(name) for mark in pages.MARK)
    return f"{begin}\n{between}\n{end}\n"


def test_writing_the_first_page_writes_those_beside_it(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, part in (
        ("README.md", "headline"),
        ("CLAIMS.md", "claims"),
        ("docs/speed.md", "Speed, models"),
        ("NEWS.md", "checks"),
    ):
        (tmp_path / name).write_text(marked(part), encoding="utf-8")
    (tmp_path / "docs" / "scale.md").write_text("nothing between marks", encoding="utf-8")
    assert run_here("report", "--write", tmp_path / "README.md") == 0
    for name in ("README.md", "CLAIMS.md", "docs/speed.md"):
        assert "\nold\n" not in (tmp_path / name).read_text(encoding="utf-8")
    assert "\nold\n" in (tmp_path / "NEWS.md").read_text(encoding="utf-8")  # not one of the pages
    assert (tmp_path / "docs" / "scale.md").read_text(encoding="utf-8") == "nothing between marks"
    (tmp_path / "CLAIMS.md").write_text(marked("claims"), encoding="utf-8")
    assert run_here("report", "--write", tmp_path / "docs" / "speed.md") == 0
    assert "\nold\n" in (tmp_path / "CLAIMS.md").read_text(encoding="utf-8")  # control: another page alone


def test_where_no_page_is_named_it_is_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(marked("verdicts"), encoding="utf-8")
    assert run_here("report", "--write") == 0 and "**Holds.**" in Path("README.md").read_text(encoding="utf-8")


@pytest.mark.no_cover
def test_only_what_is_between_marks_is_replaced(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{marked('results')}after\n", encoding="utf-8")
    assert run_here("report", "--write", page) == 0
    text = page.read_text(encoding="utf-8")
    assert (
        text.startswith("before\n<!-- results") and text.endswith("<!-- end of results -->\nafter\n") and "### Table 1" in text
    )
    for wrong in ("no marks", marked("results").replace("end of results", "end of claims")):
        page.write_text(wrong, encoding="utf-8")
        assert run_here("report", "--write", page) == 1 and "lacks the marks" in capsys.readouterr().err
        assert page.read_text(encoding="utf-8") == wrong


@pytest.mark.no_cover
def test_claims_are_written_where_a_page_has_the_marks_of_the_report(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(marked("results"), encoding="utf-8")
    assert run_here("claims", "--write", page) == 0
    assert page.read_text(encoding="utf-8") == marked("results", f"\n{claims.render(COMMITTED)}\n")


def test_where_no_page_is_named_claims_go_to_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in (("README.md", "verdicts"), ("CLAIMS.md", "claims")):
        Path(name).write_text(marked(part), encoding="utf-8")
    assert run_here("claims", "--write") == 0
    assert Path("CLAIMS.md").read_text(encoding="utf-8") == marked("claims", f"\n{claims.render(COMMITTED)}\n")
    assert Path("README.md").read_text(encoding="utf-8") == marked("verdicts")  # control


def test_claims_have_a_place_of_their_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(marked("claims") + marked("results"), encoding="utf-8")
    assert run_here("claims", "--write", page) == 0
    assert page.read_text(encoding="utf-8") == marked("claims", f"\n{claims.render(COMMITTED)}\n") + marked("results")


def test_tables_are_aligned_for_a_terminal_and_lean_in_a_page():
    lean = markdown(["row", "loss"], [["MHA", "3.8"], ["Tucker [8,64,64]", "12.75"]])
    assert lean.splitlines()[0] == "| row | loss |" and lean.splitlines()[1] == "|---|---:|"
    wide = aligned(f"above\n\n{lean}\n\nbelow").splitlines()
    assert [line for line in wide if line.startswith("|")] == [
        "| row              |  loss |",
        "|------------------|------:|",
        "| MHA              |   3.8 |",
        "| Tucker [8,64,64] | 12.75 |",
    ]
    assert wide[0] == "above" and wide[-1] == "below" and aligned(aligned(lean)) == aligned(lean)
    assert aligned(markdown(["a", "bc"], [["1", "2"]], words=True)).splitlines()[2] == "| 1 | 2  |"


def test_a_name_that_holds_bars_or_lines_stays_in_its_cell():
    """A model's name comes from a folder: its numbers must not move into other columns."""
    for name, shown in (("a|b", r"a\|b"), ("a\nb", "a b"), (r"a\|b", r"a\\|b"), ("|", r"\|")):
        lean = markdown(["model", "loss", "size"], [[name, "3.8", "12"]])
        assert lean.splitlines()[2:] == [f"| {shown} | 3.8 | 12 |"]
        wide = aligned(f"{lean}\n\nbelow").splitlines()
        assert wide[2].split() == ["|", *shown.split(), "|", "3.8", "|", "12", "|"] and aligned(aligned(lean)) == aligned(lean)
    assert "12" not in aligned("| model | loss |\n|---|---:|\n| a|b | 12 |")  # control: unmarked, a bar costs the last number


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "experiment, words",
    [
        ("exactness", "exact special cases"),
        ("table2", "competitive"),
        ("table3", "A tenth of GQA"),
        ("figure3", "A tenth of GQA"),
        ("speed", "less time"),
        ("spectra", "All [unfoldings]"),
    ],
)
def test_a_verdict_without_records_has_no_line(experiment, words):
    kept = [r for r in COMMITTED if r.experiment != experiment or r.preset == "sizes"]
    lines = headline.six_verdicts(kept).splitlines()
    assert len(lines) == 5 and not any(words in line for line in lines) and words in headline.six_verdicts(COMMITTED)


def test_without_runs_the_first_page_says_nothing():
    assert headline.six_verdicts([]) == headline.headline([]) == ""


def test_a_special_case_that_is_not_exact_and_a_size_that_differs_are_said():
    def said(record):
        if record.experiment == "exactness":
            cells = [cell | {"errors": {"output": 1e-3}} for cell in record.metrics["cells"]]
            return dataclasses.replace(record, metrics=record.metrics | {"cells": cells})
        if record.preset == "sizes":
            doubled = [
                row | {"paper": {name: 2 * value for name, value in row["paper"].items()}} for row in record.metrics["rows"]
            ]
            return dataclasses.replace(record, metrics={"rows": doubled})
        return record

    exact, sizes, *_ = headline.six_verdicts([said(r) for r in COMMITTED]).splitlines()
    assert exact.startswith("- **Fails here.** MHA, GQA and MLA") and exact.endswith(" of at most 1e-03.")
    assert sizes.startswith(
        "- **Partly.** All 11 formulas fit the code. Of 21 [quoted sizes]"
    )  # Table 1 has no number of the paper
    assert "[21 differ](ERRATA.md) by over 0.5 %." in sizes


BULLETS = {  # of the first page: which claims of the ledger each is about
    "exact special cases": lambda c: c.rule == "exact" and c.where not in ("Def. 3.1, Lemma B.5", "Sec. 3.3"),
    "quoted sizes": lambda c: c.rule in ("formula", "size") or "10-20 %" in c.says,
    "competitive": lambda c: c.says == "[8,128,64]: competitive with MHA",
    "A tenth of GQA": lambda c: "comparable to GQA" in c.says or "than GQA" in c.says,
    "less time": lambda c: c.rule == "time",
    "All [unfoldings]": lambda c: c.rule == "decay",
}


def words_and_verdicts(found) -> list[tuple[str, set[str]]]:
    """The word of each bullet, and what the ledger says to its claims."""
    lines, judged = headline.six_verdicts(found).splitlines(), claims.verdicts(found)
    picked = [
        (re.match(r"- \*\*(.*?)\*\*", line)[1], next(is_its for words, is_its in BULLETS.items() if words in line))
        for line in lines
    ]
    return [(word, {verdict for claim, _, verdict in judged if is_its(claim)}) for word, is_its in picked]


def with_metrics(change) -> list[records.Record]:
    found = copy.deepcopy(COMMITTED)
    for r in found:
        change(r)
    return found


def as_printed(r):
    for row in r.metrics["rows"] if (r.experiment, r.preset) in (("table2", "sizes"), ("table3", "sizes")) else ():
        if r.experiment == "table2":
            row["paper"] = {"attention_mb": query.attention_mb(row, r.config), "cache_mb": query.cache_mb(row, r.config)}
        else:
            row["paper"] = {"size": row["parameters"] * 16 / 1e6}


def all_as_said(r):
    """The quoted sizes, and shares of a tenth beside GQA in Table 3."""
    if (r.experiment, r.preset) == ("table3", "sizes"):
        (gqa,) = [row["parameters"] for row in r.metrics["rows"] if row["label"] == "GQA n_KV=8"]
        for row in r.metrics["rows"]:
            row["parameters"] = gqa // 10 if row["label"].startswith("Tucker") else row["parameters"]
    as_printed(r)


def blind(r):
    for cell in r.metrics["cells"] if r.experiment == "exactness" else ():
        cell["controls"] = dict.fromkeys(cell["controls"], 1e-6)


def slow(r):
    for row in r.metrics["rows"] if (r.experiment, r.method) == ("speed", "models") else ():
        row["milliseconds"] = 100.0


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "change, which, word",
    [
        (all_as_said, 1, "Holds."),
        (as_printed, 1, "Partly."),
        (blind, 0, "Not resolved."),
        (slow, 4, "Fails here."),
        (id, 1, "Partly."),
    ],
)
def test_the_word_of_each_bullet_is_the_ledger_s(change, which, word):
    one = {REPRODUCED: "Holds.", FAILED: "Fails here.", UNRESOLVED: "Not resolved.", UNTESTED: "Not tested."}
    found = words_and_verdicts(with_metrics(change))
    assert len(found) == 6 and found[which][0] == word
    for said, verdicts in found:
        assert said == (one[verdicts.pop()] if len(verdicts) == 1 else "Partly."), verdicts


def test_the_first_page_says_what_is_not_so():
    text = headline.six_verdicts(COMMITTED)
    assert "Of 21 [quoted sizes](CLAIMS.md#sizes) [2 differ](ERRATA.md) by over 0.5 %." in text
    assert "7.5 % of GQA's, not “about 10-20 %”." in text
    assert "verdict" not in headline.headline(COMMITTED)  # three seeds have intervals and no word
    assert headline.said_of([FAILED, UNRESOLVED]) == "Fails here." and headline.said_of([REPRODUCED, FAILED]) == "Partly."

    def a_tenth(r):
        for row in r.metrics["rows"] if (r.experiment, r.preset) == ("table3", "sizes") else ():
            row["parameters"] = 10 if row["label"] == "GQA n_KV=8" else 1

    assert "All 21 [quoted sizes](CLAIMS.md#sizes) agree within 0.5 %." in headline.six_verdicts(with_metrics(as_printed))
    tenths = headline.six_verdicts(with_metrics(a_tenth))
    assert "of GQA's, not" not in tenths
    assert (
        len(headline.six_verdicts([r for r in COMMITTED if (r.experiment, r.preset) != ("table3", "sizes")]).splitlines()) == 6
    )


# Short


SECTIONS = (  # of README, in this order, with the most lines that each may have
    ("Tucker Attention, step by step", 15),
    ("What came out", 25),
    ("What holds and what does not", 15),
    ("Two commands", 20),
    ("The library", 18),
    ("The notebooks", 18),
    ("The ladder", 25),
    ("Compress a model of yours", 12),
    ("Speed", 18),
    ("On a GPU", 15),
    ("Limits", 12),
    ("Pages", 10),
    ("Citing and licence", 15),
)


def without_code(page: str) -> str:
    """Code blocks blank, line by line."""
    return re.sub(r"^```.*?^```", lambda found: "\n" * found.group().count("\n"), page, flags=re.DOTALL | re.MULTILINE)


def faults_of_length(page: str) -> list[str]:
    """What makes a first page too long to be read."""
    found, lines = [], page.splitlines()
    starts = [n for n, line in enumerate(without_code(page).splitlines()) if line.startswith("#")]
    sections = [(lines[a].lstrip("# "), b - a) for a, b in zip(starts, [*starts[1:], len(lines)])]
    if [title for title, _ in sections] != [title for title, _ in SECTIONS]:
        found.append(f"sections are {[title for title, _ in sections]}")
    found += [f"{title}: {count} lines" for (title, count), (_, most) in zip(sections, SECTIONS) if count > most]
    if len(lines) > 200 or len(page.encode()) > 14_000:
        found.append(f"{len(lines)} lines, {len(page.encode()):,} bytes")
    prose = re.sub(r"\]\([^)]*\)", "]", without_code(page))  # a link counts as what is read of it
    found += [f"a line of {len(line)} characters: {line[:40]}" for line in prose.splitlines() if len(line) >= 140]
    if len(re.findall(r"!\[", page)) > 2:
        found.append("more than two figures")
    return found


def test_the_readme_is_two_screens():
    assert faults_of_length(README) == []
    assert len(rows_of(pages.filled(marked("headline"), {"headline": headline.headline(COMMITTED)}))) <= 8
    assert len(headline.six_verdicts(COMMITTED).splitlines()) == 6


def test_the_verdict_on_spectra_says_whether_more_decays_in_models_of_others(monkeypatch):
    assert "4 of 6 do (GPT-2). In others' models no more." in headline.six_verdicts(COMMITTED)
    monkeypatch.setattr(headline, "decayed", lambda records: {"one": ["reproduced"] * 5, "another": ["reproduced"]})
    assert "4 of 6 do (GPT-2). In others' models up to 5." in headline.six_verdicts(COMMITTED)
    monkeypatch.setattr(headline, "decayed", lambda records: {})
    assert "4 of 6 do (GPT-2). Effective" in headline.six_verdicts(COMMITTED)


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda page: page.replace("## Limits", "## What it cannot do"), "sections are"),
        (lambda page: page.replace("## Limits\n", "## Limits\n" + "\n" * 12), r"^Limits: \d\d lines"),
        (lambda page: page + "\n" * 200, r"^\d{3} lines, "),
        (lambda page: page.replace("## Limits\n", "## Limits\n" + "é" * 1_400), r"^\d+ lines, 1\d,"),
        (lambda page: page.replace("## Limits\n", "## Limits\n" + "long " * 28), "a line of 140 characters"),
        (lambda page: page.replace("## Limits\n", "## Limits\n![a third figure](a.png)"), "more than two figures"),
    ],
)
def test_controls_of_the_length(change, fault):
    assert any(re.search(fault, found) for found in faults_of_length(change(README)))


def test_the_tables_fit_in_three_hundred_lines():
    assert len(text_of("RESULTS.md").splitlines()) <= 300


@pytest.mark.parametrize("page", PAGES)
def test_no_cell_is_padded(page):
    assert padded(text_of(page)) == []


def padded(page: str) -> list[str]:
    """Lines of tables with more than one space beside a cell."""
    return [line for line in without_code(page).splitlines() if re.search(r"^\|.*(?:\|  +[^| ]|[^| ]  +\||-{4,})", line)]


def test_control_of_the_padding():
    assert len(padded(aligned(markdown(["row", "loss"], [["MHA", "3.8"], ["Tucker", "12.125"]])))) == 3


# Readable


NAMES = (  # what has digits and is no number to remember
    r"\[\d+(?:,\d+)+\]",  # ranks
    r"\b(?:Tables?|Figures?|Fig\.|Eqs?\.|Theorems?|Def\.|Cor\.|Sec\.|Lemma) [\dA-Z][\d.]*(?:(?:-|, | and )[\dA-Z.]*\d)*",
    r"\bB\.\d\b",
    r"\b(?:Python|torch|Qwen|Gemma|OLMo|n_KV|d_c|Llama)[ =]\d[\d.]*(?:\+cu\d+|\+cpu)?",
    r"\(\d+\)",  # how many seeds
)
NUMBER = re.compile(r"(?<![\w.,/-])[-−+±]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")
MOST = 3


def prose_of(page: str) -> list[str]:
    """Paragraphs, bullets and titles as a reader has them: without code, comments, tables, images and the targets of links."""
    text = re.sub(r"<!--.*?-->", "", without_code(page), flags=re.DOTALL)
    text = re.sub(r"^\|.*$|^!\[.*$|^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", re.sub(r"\]\([^)]*\)", "]", text))
    for name in NAMES:
        text = re.sub(name, "", text)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", text) if part.strip()]


def sentences(page: str) -> list[str]:
    return [sentence for part in prose_of(page) for sentence in re.split(r"(?<=[.!?])[*”]*\s+", part)]


def crowded(page: str) -> list[str]:
    """Sentences with more numbers than a reader keeps."""
    return [sentence for sentence in sentences(page) if len(NUMBER.findall(sentence)) > MOST]


LISTS = ("docs/provenance.md",)  # nothing but lists of commits


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LISTS])
def test_no_sentence_has_more_than_three_numbers(page):
    assert crowded(text_of(page)) == []


def test_control_of_the_numbers():
    assert (
        crowded(
            "It ends at 3.857, 0.1 % below 3.862.\nTucker [8,128,64] has 18 % in Table 2, `1 2 3 4` and [this](a1-2-3-4.md)."
        )
        == []
    )
    assert len(crowded("From 1 to 2.5, from 1,000 to −4.")) == 1
    assert len(crowded("- of 3 seeds, 12 layers,\n  768 channels and 5 %")) == 1


GPT2 = BUDGETS["table2"]
ARITHMETIC = {  # numbers of hand-written prose that stand in no table, and where they come from
    "README.md": {"0.01", "18 %", "2026", "10", "20", "3.11", f"{GPT2.preset.train.steps:,}", f"{GPT2.paper_steps:,}"},
    "RESULTS.md": {"95 %"},
    "CLAIMS.md": {"29", "2026"},  # since when the rules stand
    "docs/training.md": {"37 %", "0.8", "2015"},  # 1/e; 100M tokens over 124M parameters; the dump
    "docs/adamw.md": {"0.01"},  # the margin
    "docs/scale.md": {"500M"},  # a setting
    "docs/compression.md": {f"{agreement.FARTHEST:,}", "1e-2"},  # where and how nearly layers are compared
}


def own_numbers(page: str) -> set[str]:
    """Decimals, per cents and what is above twelve in the prose that stands between no marks."""
    own = "\n".join(prose_of(pages.MARKS.sub("", page)))
    numbers = re.findall(rf"({NUMBER.pattern}|(?<![\w.])\d+M)( %)?", own)
    found = {(number + unit).lstrip("+-−±") for number, unit in numbers}
    return {n for n in found if "." in n or "%" in n or not n.isdigit() or int(n) > 12}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LISTS])
def test_every_number_of_the_prose_stands_in_a_part_that_is_read_from_records(page):
    """Or in a command. Where it fails after new runs, the sentence may no longer be true."""
    text = text_of(page)
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]*`", text, re.DOTALL | re.MULTILINE))
    known = "\n".join(part for _, part in pages.MARKS.findall(text)) + code
    unknown = {n for n in own_numbers(text) if not re.search(rf"(?<![\d.,]){re.escape(n)}(?!\d)", known)}
    assert unknown - ARITHMETIC.get(page, set()) == set()


def test_control_of_the_prose_s_numbers():
    page = f"It ends at 3.857, 28 % of 1,536 or 37.\n\n{marked('headline', 'loss 3.85')}"
    assert own_numbers(page) == {"3.857", "28 %", "1,536", "37"}


@pytest.mark.no_cover
def test_the_python_of_the_pages_runs():
    for page in PAGES[1:]:
        names: dict = {}
        for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
            exec(block, names)
        if page == "docs/compression.md":
            assert names["ranks"][2] + names["post_ranks"][2] <= 256 and names["small"](names["inputs"]).shape == (16, 256, 768)


def test_the_index_names_every_page():
    index = README[README.index("## Pages") :]
    for page in (*pages.BESIDE, "DEVIATIONS.md", "ERRATA.md"):
        assert f"]({page})" in index, page


def test_every_figure_stands_in_a_page():
    linked = set(re.findall(r"images/([\w.]+)\)", "".join(map(text_of, PAGES))))
    there = {path.name for path in (ROOT / "paper_figures" / "images").iterdir()}
    assert there == linked, "a figure that no page shows, or a page that shows one that is not there"


# Pictures


PICTURE = re.compile(r"!\[([^\]]*)\]\(|<img\b([^>]*)>")
ILLUSTRATED = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tutorials/**/*.md", "tutorials/**/*.ipynb")
    for path in ROOT.glob(pattern)
)


def unsaid(text: str) -> list[str]:
    """Pictures that do not say in a few words what is seen on them."""
    said = {m[0]: m[1] if m[2] is None else "".join(re.findall(r'\balt=\\?"([^"\\]*)', m[2])) for m in PICTURE.finditer(text)}
    return [picture for picture, words in said.items() if len(words.split()) < 4]


def test_every_picture_says_what_is_seen_on_it():
    assert sum(len(PICTURE.findall(text_of(page))) for page in ILLUSTRATED) > 20  # control: pictures are found
    assert {page: found for page in ILLUSTRATED if (found := unsaid(text_of(page)))} == {}


@pytest.mark.parametrize("picture", ["![](a.png)", "![figure](a.png)", '<img src="a.png">', '<img alt="" src="a.png">'])
def test_a_picture_without_words_is_noticed(picture):
    assert len(unsaid(f"{README}\n{picture}")) == 1
    assert unsaid(f'{README}\n![Loss against the cache](a.png) <img src="a.png" alt="Loss against the cache">') == []  # control
