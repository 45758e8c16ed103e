"""What the notebooks need where there is no clone: a cell that installs what is missing, and badges that open them on a server.

All of it hangs on one setting, the repository's address on GitHub, in pyproject.toml:

    [project.urls]
    Repository = "https://github.com/owner/name"

`python -m tutorials.book.online` writes the cells and, where there is an address, the badges. Without one the cell installs
from the clone that the notebook lies in, and there are no badges.
"""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("tutorials/[0-9]*.ipynb", "tutorials/solutions/*.ipynb")  # those that import `tucker_ref`
EXTRAS = "[reproduce,tutorials]"
TAG = "remove-cell"  # the book leaves such a cell out
BADGES = re.compile(
    r"(?<=<!-- badges: written by `python -m tutorials.book.online` -->\n).*?(?=<!-- end of badges -->)", re.DOTALL
)


def repository(root: Path = ROOT) -> str | None:
    """The address in pyproject.toml, None if it names none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def installing_cell(up: str, address: str | None) -> dict:
    """The first code cell of a notebook. It does nothing where `tucker_ref` is installed, and has no number and no output.

    Args:
        up: the way from the notebook's folder to the repository.
        address: of the repository, None to install from the clone.
    """
    source = f"tucker-ref{EXTRAS} @ git+{address}" if address else f"{up}{EXTRAS}"
    lines = [
        "from importlib.util import find_spec\n",
        "\n",
        'if not find_spec("tucker_ref"):  # installs what is missing\n',
        f'    %pip install -q "{source}"',
    ]
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": "install",
        "metadata": {"tags": [TAG]},
        "outputs": [],
        "source": lines,
    }


def with_cell(notebook: dict, cell: dict) -> dict:
    """A notebook with this cell behind its title, in place of the one that was there."""
    others = [one for one in notebook["cells"] if one["id"] != cell["id"]]
    return notebook | {"cells": [others[0], cell, *others[1:]]}


def badges(address: str | None) -> str:
    """A line of Markdown, empty without an address."""
    if not address:
        return ""
    place = address.removeprefix("https://github.com/").strip("/")
    colab, binder = "https://colab.research.google.com", "https://mybinder.org"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{place}) "
        f"[![Open in Binder]({binder}/badge_logo.svg)]({binder}/v2/gh/{place}/HEAD?labpath=tutorials)\n\n"
    )


def launch_buttons(address: str | None) -> dict:
    """The book theme's options for a button on every notebook's page, none without an address."""
    if not address:
        return {}
    servers = {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org"}
    return {
        "repository_url": address,
        "repository_branch": "main",
        "path_to_docs": "tutorials",
        "launch_buttons": {**servers, "notebook_interface": "jupyterlab"},
    }


def write(root: Path = ROOT) -> None:
    """Writes the cells and the README's badges as pyproject.toml has the address."""
    address = repository(root)
    for path in (path for pattern in NOTEBOOKS for path in sorted(root.glob(pattern))):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = installing_cell("/".join([".."] * (len(path.relative_to(root).parts) - 1)), address)
        path.write_text(json.dumps(with_cell(notebook, cell), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(BADGES.sub(badges(address), readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
