"""Text is UTF-8 by name: pages, prepared tokens and what is printed are the same where the locale has another encoding, or none."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here
from test_prepared import DOCUMENTS, tables
from warm import Warm

from reproduce import console
from reproduce.data.prepared import open_prepared, prepare
from reproduce.store import records

ROOT = Path(__file__).parent.parent
PACKAGES = ("tucker_ref", "reproduce", "paper_figures", "tutorials", "tests")
PAGE = """# Schotthöfer et al., “Tucker Attention” — größer

<!-- table1: written by `python -m reproduce report --write README.md` -->
old
<!-- end of table1 -->
"""
SUITE = [
    "tests/test_records.py",
    "tests/test_prepared.py::test_the_tokens_are_those_that_fit_into_memory",
]  # what keeps and reads text


@pytest.fixture(scope="module", params=["C", "ISO-8859-1"])
def locale(request, tmp_path_factory) -> dict[str, str]:
    """An environment in which Python opens a text as ASCII, or as Latin-1, unless it is told how."""
    said = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    said |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if request.param == "C":
        return said | {"LC_ALL": "C"}
    made = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no Latin-1 locale: there is no localedef to make one")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(made / "latin1")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if not (made / "latin1").is_dir():
        pytest.skip(f"no Latin-1 locale can be made here: {done.stderr.strip()}")
    return said | {"LOCPATH": str(made), "LC_ALL": "latin1"}


@pytest.fixture(scope="module")
def python(locale):
    """Runs `python ARGUMENTS` in an interpreter that started there; what it runs is measured elsewhere."""
    with Warm({name: value for name, value in locale.items() if not name.startswith("COVERAGE_PROCESS")}) as warm:
        yield warm.run


def test_the_locale_is_none_of_utf8(python):
    """Control for the tests below: a text that is opened without a name is read otherwise there."""
    program = "import locale, sys; print(locale.getpreferredencoding(False), sys.stdout.encoding)"
    said = python("-c", program).stdout.decode().lower().split()
    assert said in (
        ["ansi_x3.4-1968", "ascii"],
        ["ascii", "ascii"],
        ["iso-8859-1", "iso8859-1"],
        ["iso-8859-1", "iso-8859-1"],
    ), said


def test_a_page_keeps_its_letters(python, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.md").write_text(PAGE, encoding="utf-8")
    arguments = ["report", "--records", records.COMMITTED, "--write"]
    assert run_here(*arguments, tmp_path / "here" / "page.md") == 0
    done = python("-m", "reproduce", *arguments, tmp_path / "there" / "page.md")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "there" / "page.md").read_bytes()
    assert written == (tmp_path / "here" / "page.md").read_bytes() != PAGE.encode() and PAGE.splitlines()[0].encode() in written


def test_tables_are_printed_whole(python, tmp_path, capsysbinary):
    for record in records.load(records.COMMITTED, "table1"):
        records.append(tmp_path, record)
    assert run_here("report", "--records", tmp_path) == 0
    printed = capsysbinary.readouterr().out
    done = python("-m", "reproduce", "report", "--records", tmp_path)
    assert done.returncode == 0 and done.stdout == printed, done.stderr
    assert "²".encode() in printed  # control: there are letters to lose


def test_prepared_tokens_stand_for_as_many_bytes(python, tmp_path):
    text, bpe = tmp_path / "held_out.txt", tables(tmp_path)
    prepare("letters", tmp_path / "out", str(tmp_path / "text"), str(bpe), str(text))
    data = open_prepared(str(tmp_path / "out"))
    program = "import sys; from reproduce.data.prepared import open_prepared as o; d = o(sys.argv[1]); "
    program += "print(d.token_bytes.tolist(), d.token_bytes[d.train].sum(), sep='|')"
    said = python("-c", program, tmp_path / "out").stdout.decode().strip()
    assert said == f"{data.token_bytes.tolist()}|{data.token_bytes[data.train].sum()}"
    assert data.token_bytes[np.asarray(data.train)].sum() == sum(len(d.encode()) for d in DOCUMENTS)
    arguments = ["prepare", "letters", "--files", tmp_path / "text", "--bpe", bpe, "--validation", text, "--out"]
    assert python("-m", "reproduce", *arguments, tmp_path / "there").returncode == 0
    for file in (tmp_path / "out").glob("*.*"):
        if file.name != "tokens.json":  # which names the place
            assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()
    again = python("-m", "reproduce", *arguments, tmp_path / "out")
    assert again.returncode == 0 and b"is finished" in again.stdout


def test_a_part_of_the_tests_passes_there(python):
    done = python(
        "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:nbval", "--noconftest", "--no-cov", *SUITE
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]


def unnamed(source: str) -> list[int]:
    """The lines of calls that open text, or a pipe of it, without naming an encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        texts = name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
        own = isinstance(call.func, ast.Name) and name == "open"  # Image.open and os.open are others
        mode = given.get("mode") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "'r'")
        pipe = given.get("text") == "True" or given.get("universal_newlines") == "True"
        if "encoding" not in given and (texts or (own and "b" not in mode) or pipe):
            found.append(call.lineno)
    return found


def test_whatever_opens_text_names_its_encoding():
    """Ruff's PLW1514 sees a path only where it is made; this sees every call."""
    places = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    assert len(places) > 200
    found = [f"{p.relative_to(ROOT)}:{line}" for p in places for line in unnamed(p.read_text(encoding="utf-8"))]
    cells = {p: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (ROOT / "tutorials").rglob("*.ipynb")}
    for path, content in cells.items():
        code = ["".join(cell["source"]) for cell in content if cell["cell_type"] == "code"]
        found += [path.name for source in code if unnamed(re.sub(r"^( *)%", r"\1pass  # ", source, flags=re.MULTILINE))]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "p.write_text('é')",
        "open(p)",
        "open(p, 'w')",
        "run(c, text=True)",
        "run(c, universal_newlines=True)",
    ],
)
def test_what_names_none_is_found(source):
    assert unnamed(f"x = 1\n{source}") == [2]
    assert not unnamed(f"{source[:-1]}, encoding='utf-8')".replace("(, ", "("))


def test_the_linter_asks_for_an_encoding():
    """And with its preview rules switched on for that, for nothing else that is new."""
    command = ["ruff", "check", "--stdin-filename", "reproduce/x.py", "--output-format", "concise", "-"]
    done = subprocess.run(
        [sys.executable, "-m", *command], input='with open("x"):\n    pass\n', capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert done.returncode == 1 and "unspecified-encoding" in done.stdout and "Found 1 error" in done.stdout


def test_streams_that_cannot_be_told_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw, or after `>&-`
    console.speak_utf8()
    assert sys.stdout is None
