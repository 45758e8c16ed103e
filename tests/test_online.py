"""The notebooks where there is no clone: the cell that installs what is missing, and the badges, both as pyproject.toml has the address."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tutorials.book import online

ADDRESS = "https://github.com/owner/name"  # made up: nothing is asked there
PATHS = [path.relative_to(online.ROOT) for pattern in online.NOTEBOOKS for path in sorted(online.ROOT.glob(pattern))]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path) -> Path:
    """What `online` reads and writes, in a folder of its own."""
    for path in (*PATHS, Path("README.md"), Path("pyproject.toml")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(online.ROOT / path, tmp_path / path)
    return tmp_path


def texts_of(root: Path) -> dict[Path, str]:
    return {path: (root / path).read_text(encoding="utf-8") for path in (*PATHS, Path("README.md"))}


def test_cells_and_badges_are_as_pyproject_has_them(copy):
    """Where it fails: python -m tutorials.book.online"""
    before = texts_of(copy)
    online.write(copy)
    assert texts_of(copy) == before == texts_of(online.ROOT)
    assert len(PATHS) == 22


def test_an_address_is_written_everywhere_and_can_be_taken_back(copy):
    before = texts_of(copy)
    settings = copy / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    named = re.sub(r"\n\[project\.urls\]\n(.+\n)*", "", text)  # as long as it has none
    settings.write_text(f'{named}\n[project.urls]\nRepository = "{ADDRESS}"\n', encoding="utf-8")
    assert online.repository(copy) == ADDRESS
    online.write(copy)
    after = texts_of(copy)
    assert all(f'tucker-ref[reproduce,tutorials] @ git+{ADDRESS}\\"' in after[path] for path in PATHS)
    assert "colab.research.google.com/github/owner/name)" in after[Path("README.md")]
    assert "mybinder.org/v2/gh/owner/name/HEAD?labpath=tutorials" in after[Path("README.md")]
    assert online.launch_buttons(ADDRESS)["repository_url"] == ADDRESS
    settings.write_text(text, encoding="utf-8")
    online.write(copy)
    assert texts_of(copy) == before
    assert online.badges(None) == "" and online.launch_buttons(None) == {}


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_notebook_that_imports_the_library_can_install_it_first(path):
    cells = [cell for cell in read(online.ROOT / path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["id"] == "install" for cell in cells] == [True] + [False] * (len(cells) - 1)
    assert any("import" in "".join(cell["source"]) for cell in cells[1:])
    if not online.repository():
        (place,) = re.findall(r'"(\.\.[^"]*)\[reproduce,tutorials\]"', "".join(cells[0]["source"]))
        assert (online.ROOT / path.parent / place / "pyproject.toml").is_file()


@pytest.mark.parametrize("known", [True, False])
def test_the_cell_installs_only_what_is_missing(known):
    """Run by IPython, with a %pip that writes down what it is asked for."""
    source = "".join(online.installing_cell("..", None)["source"])
    if not known:
        source = source.replace('"tucker_ref"', '"a_library_that_is_nowhere"')
    program = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.register_magic_function(lambda line: print('asked for', line), 'line', 'pip')\n"
        f"shell.run_cell({source!r}).raise_error()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=online.ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("" if known else 'asked for install -q "..[reproduce,tutorials]"\n')


def test_binder_installs_what_the_cell_does():
    asked = (online.ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8")
    assert asked == f"-e .{online.EXTRAS}\n"
