"""Pages of the repository that are chapters of the book: each has a page beside the tutorials that includes it and nothing else."""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent
INCLUDES = re.compile(r"```\{include\} (\S+)\n```\n")
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")  # the target alone


def included(text: str) -> Path | None:
    """The page that such a page includes, None if it holds something else."""
    found = INCLUDES.fullmatch(text)
    return (FOLDER / found.group(1)).resolve() if found else None


CHAPTERS = {page: path for path in sorted(FOLDER.glob("*.md")) if (page := included(path.read_text(encoding="utf-8")))}
CHAPTERS[FOLDER.parent / "README.md"] = FOLDER / "index.md"  # the first page of both


def as_chapter(text: str, place: Path = FOLDER / "index.md") -> str:
    """A page of the book as Sphinx is to read it: the included one in place of the line that includes it, links led to chapters.

    Args:
        text: of a page or a notebook.
        place: its file.
    """
    page = included(text)
    if page is None:
        return LINK.sub(lambda link: led_from_here(link.group(), place, place.parent), text)
    return LINK.sub(lambda link: led_from_here(link.group(), page), page.read_text(encoding="utf-8"))


def led_from_here(link: str, page: Path, here: Path = FOLDER) -> str:
    """A link that stands in `page` as a page in the folder `here` needs it: to a chapter where there is one, else to the file."""
    if re.match(r"https?:|mailto:|#", link):
        return link
    path, mark, place = link.partition("#")
    target = (page.parent / path).resolve()
    if page.parent == here and target not in CHAPTERS:
        return link
    return os.path.relpath(CHAPTERS.get(target, target), here) + mark + place
