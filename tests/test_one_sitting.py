"""The notebook of one sitting, the slides made of it, and the timetables that a lecturer is to keep."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_tutorials import (
    FOLDER,
    MARK,
    ROOT,
    code_cells,
    faults_of_marks,
    faults_of_outputs,
    faults_of_pace,
    faults_of_words,
    modules_imported,
    source,
    words,
)

NAME = "tucker_in_one_sitting"
NOTEBOOK = json.loads((FOLDER / f"{NAME}.ipynb").read_text(encoding="utf-8"))
TEACHING = (FOLDER / "teaching.md").read_text(encoding="utf-8")
MOST_CODE = 60  # lines that are not empty, of the whole notebook
IMPORTS = {"numpy", "torch", "matplotlib"}
WORDS_A_MINUTE, MINUTES_A_CELL = 100, 2  # as teaching.md says


def faults_of_the_sitting(notebook: dict) -> list[str]:
    """What does not fit into one sitting, or does not stand on the page; beside the faults of pace that lessons have."""
    cells, found = code_cells(notebook), []
    lines = [line for cell in cells for line in source(cell).splitlines() if line.strip()]
    if len(lines) > MOST_CODE:
        found.append(f"{len(lines)} lines of code")
    foreign = {name.split(".")[0] for cell in cells for name in modules_imported(cell)} - IMPORTS
    found += [f"imports {name}" for name in sorted(foreign)]
    if "".join(map(source, notebook["cells"])).count("**Predict.**") != 1:
        found.append("it asks for one prediction")
    drawn_in_sight = copy.deepcopy(notebook)  # lessons leave this to tutorials/pictures.py
    for cell in code_cells(drawn_in_sight):
        cell["source"] = source(cell).replace("import matplotlib.pyplot as plt", "import torch")
    return found + faults_of_pace(drawn_in_sight)


def test_it_fits_into_one_sitting_and_says_what_the_lessons_say():
    assert faults_of_the_sitting(NOTEBOOK) == faults_of_words(NOTEBOOK) == []
    assert faults_of_outputs(NOTEBOOK) == faults_of_marks(NOTEBOOK) == []
    assert sum(MARK in cell["metadata"].get("tags", []) for cell in code_cells(NOTEBOOK)) >= 5  # nbval compares these


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda text: text + "\nx = 1" * MOST_CODE, "lines of code"),
        (lambda text: text + "\nimport tucker_ref", "imports tucker_ref"),
        (lambda text: text + "\n# " + "x" * 100, "a line of 102"),
    ],
)
def test_controls_of_the_sitting(change, told):
    broken = copy.deepcopy(NOTEBOOK)
    code_cells(broken)[-1]["source"] = change(source(code_cells(broken)[-1]))
    assert any(told in fault for fault in faults_of_the_sitting(broken))
    unasked = json.loads(json.dumps(NOTEBOOK).replace("**Predict.**", "Well."))
    assert faults_of_the_sitting(unasked) == ["it asks for one prediction"]


def test_a_student_starts_here():
    readme, index = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", FOLDER / "index.md"))
    door = next(line for line in readme.splitlines() if line.startswith("- **Student:**"))
    assert re.findall(r"\]\((.*?)\)", door)[0] == f"tutorials/{NAME}.ipynb"
    start = index.split("## Start here")[1]
    assert re.findall(r"\]\((.*?)\)", start)[0] == f"{NAME}.ipynb"
    assert index.index(f"\n{NAME}\n") < index.index("\n00_tensors_and_tucker\n")  # the book


# Slides


def recipe(target: str) -> str:
    """The one command of a target of the Makefile, with its variables filled in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n\t\t", "")
    (command,) = re.findall(rf"^{target}: install\n\t(.*)\n$", text, re.MULTILINE)
    return re.sub(r"\$\((\w+)\)", lambda found: re.search(rf"^{found[1]} \??:?= (.*)$", text, re.MULTILINE)[1], command)


def slides_of(path: Path, out: Path, command: str) -> list[str]:
    """The HTML of each slide; a stack of slides is one `section` around others."""
    command = command.replace(".venv/bin/jupyter", f"'{sys.executable}' -m jupyter")
    command = command.replace(f"tutorials/{NAME}.ipynb", f"'{path}'").replace("out/slides", f"'{out}'")
    subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True)
    page = (out / f"{NAME}.slides.html").read_text(encoding="utf-8")
    return re.findall(r"<section>(?!\s*<section)(.*?)</section>", page, re.DOTALL)


def fetched(page: str) -> list[str]:
    """The addresses that a browser asks when it opens the page."""
    return re.findall(r"""(?:<(?:script|link|img)[^>]*(?:src|href)=|\bimport\b[^"']*)["'](https?:[^"']*)""", page)


def test_what_slides_fetch_is_what_teaching_says():
    assert "reveal.js with its styles, and MathJax with its fonts" in TEACHING
    for control in (
        "<script defer src='https://a.org/jquery.js'>",
        "import mermaid from 'https://a.org/m.mjs'",
        '<link href="https://a.org">',
    ):
        assert len(fetched(control)) == 1
    assert fetched("<a href='https://a.org'>a</a> <img src='data:image/png;base64,AAAA'> <script src='reveal.js'>") == []


def strange_links(page: str) -> list[str]:
    """Links in the text of slides that lead to no lesson's page in the book, whose names are those of the notebooks."""
    links = re.findall(r'<a href="([^"]*)"', page)
    lessons = {f"../book/{path.stem}.html" for path in FOLDER.glob("*.ipynb")}
    return [link for link in links if link not in lessons] if links else ["none at all"]


def test_links_of_slides_that_lead_nowhere_are_seen():
    assert strange_links('<a href="../book/03_sharing_heads.html">03</a> <a class="anchor-link" href="#The-answer">¶</a>') == []
    for page in ("", '<a href="03_sharing_heads.ipynb">03</a>', '<a href="../book/03_no_lesson.html">03</a>'):
        assert len(strange_links(page)) == 1


def test_each_text_cell_begins_a_slide_with_the_code_below_it(tmp_path):
    kinds = [(cell["cell_type"], cell["metadata"]["slideshow"]["slide_type"]) for cell in NOTEBOOK["cells"]]
    assert {kind for which, kind in kinds if which == "code"} == {"-"}
    assert {kind for which, kind in kinds if which == "markdown"} <= {"slide", "subslide"}
    texts = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
    slides = slides_of(FOLDER / f"{NAME}.ipynb", tmp_path, recipe("slides"))
    assert len(slides) == len(texts) == 12
    assert sum("data:image/png" in slide for slide in slides) == 2  # pictures are in the page, not beside it
    page = (tmp_path / f"{NAME}.slides.html").read_text(encoding="utf-8")
    assert {re.search(r"reveal\.js@|mathjax/", address)[0] for address in fetched(page)} == {"reveal.js@", "mathjax/"}
    assert strange_links(page) == []
    assert "/dist/theme/white.css" in page  # its fonts lie beside it; most other themes fetch theirs from a third host
    joined = copy.deepcopy(NOTEBOOK)  # control
    joined["cells"][2]["metadata"] = {}
    (tmp_path / f"{NAME}.ipynb").write_text(json.dumps(joined), encoding="utf-8")
    assert len(slides_of(tmp_path / f"{NAME}.ipynb", tmp_path, recipe("slides"))) == 11


# Timetables


def minutes_needed(notebook: dict) -> dict[str, float]:
    """Section ("0" before the first; else the first word of its heading, without The): minutes, as teaching.md reckons them."""
    section, needed = "0", {"0": 0.0}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            heading = re.search(r"^## (?:The )?(\w+)", source(cell), re.MULTILINE)
            section = heading[1] if heading else section
            needed[section] = needed.get(section, 0) + words(source(cell)) / WORDS_A_MINUTE
        elif ".check_" not in source(cell) and cell["id"] != "install":  # exercises have minutes of their own
            needed[section] += MINUTES_A_CELL
    return needed


def rows_of(plan: str) -> list[tuple[str, int, int, str, str]]:
    """Lecture, first and last minute, notebook, sections."""
    rows = re.findall(r"^\| (?:(\d+) · )?(\d+)-(\d+) \| (.*?) \|(.*?)\|", plan, re.MULTILINE)
    return [(lecture, int(start), int(end), what, sections.strip()) for lecture, start, end, what, sections in rows]


def faults_of_plan(plan: str, length: int, lectures: int) -> list[str]:
    """Gaps and overlaps, lectures that end too early or late, and rows that hold less than they ask for."""
    found, rows = [], rows_of(plan)
    numbers = sorted({lecture for lecture, *_ in rows}, key=lambda number: int(number or 1))
    if len(numbers) != lectures:
        found.append(f"{len(numbers)} lectures")
    for number in numbers:
        spans = [(start, end) for lecture, start, end, *_ in rows if lecture == number]
        if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), length]:
            found.append(f"lecture {number}: {spans}")
    for _, start, end, what, sections in rows:
        link = re.search(r"\((\w+)\.ipynb\)", what)
        if link is None:
            continue
        needed = minutes_needed(json.loads((FOLDER / f"{link[1]}.ipynb").read_text(encoding="utf-8")))
        wanted = needed if sections == "all" else sections.split(", ")
        if set(wanted) - set(needed):
            found.append(f"{link[1]} has no section {sorted(set(wanted) - set(needed))}")
        elif sum(needed[section] for section in wanted) > end - start:
            found.append(f"{link[1]} {sections}: {sum(needed[section] for section in wanted):.0f} minutes in {end - start}")
    return found


PLANS = {"One hour": (60, 1), "Three lectures": (90, 3), "Two weeks": (90, 10)}


@pytest.mark.parametrize("title", PLANS)
def test_a_lecturer_can_keep_the_timetable(title):
    (plan,) = re.findall(rf"^## {title}.*?(?=^## )", TEACHING, re.MULTILINE | re.DOTALL)
    assert faults_of_plan(plan, *PLANS[title]) == []
    assert len(rows_of(plan)) == plan.count("\n| ") - 1  # all rows are read; the header is not one


def test_controls_of_the_timetable():
    both = "| 0-80 | [03](03_sharing_heads.ipynb) | all |\n| 80-90 | questions | |"
    assert faults_of_plan(both, 90, 1) == []
    for wrong, told in (
        (both.replace("80", "20"), "27 minutes in 20"),
        (both.replace("80-", "85-"), "lecture : "),
        (both.replace("-90", "-95"), "lecture : "),
        (both.replace("all", "1, 99"), "has no section ['99']"),
        ("| 1 · 0-90 | a | |\n| 2 · 0-90 | b | |", "2 lectures"),
    ):
        assert any(told in fault for fault in faults_of_plan(wrong, 90, 1)), wrong
    assert WORDS_A_MINUTE == 100 and "A hundred words of text take a minute" in TEACHING
    assert MINUTES_A_CELL == 2 and "A code cell takes two" in TEACHING
