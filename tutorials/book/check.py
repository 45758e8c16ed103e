"""Check a built book: `python -m tutorials.book.check out/book`. Used by `make book`; prints every fault and exits with 1 if any.

A page may ask no other host for a script, style, font or picture, every link within the book must meet a page and a place in
it, and no formula may be left as its LaTeX source.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SILENT = {"script", "style", "pre", "code", "textarea"}  # elements whose text is no prose
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
FOREIGN_STYLE = re.compile(r"""(?:@import\s+|url\(\s*)['"]?((?:https?:)?//[^'")\s]+)""")


class Page(HTMLParser):
    """What one page loads, links to, can be linked at, and says."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.prose: list[str] = []
        self._open: list[tuple[str, bool]] = []  # open elements, and whether their text is no prose
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif tag == "link" and given.get("rel") not in ("canonical", "alternate"):
            self.loads.append(given.get("href", ""))
        self.loads += [given[name] for name in ("src", "poster", "data") if name in given]
        self.loads += FOREIGN_STYLE.findall(given.get("style", ""))
        if tag not in VOID:
            silent = tag in SILENT or "math" in given.get("class", "").split()
            self._open.append((tag, silent or bool(self._open and self._open[-1][1])))

    def handle_endtag(self, tag):
        while any(tag == name for name, _ in self._open) and self._open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if self._open and self._open[-1][0] == "style":
            self.loads += FOREIGN_STYLE.findall(text)
        if not (self._open and self._open[-1][1]):
            self.prose.append(text)


def faults(book: Path) -> list[str]:
    """One line for each fault of the built book in this folder, the best of all answers being []."""
    book = book.resolve()
    files = sorted(path for path in book.rglob("*.html") if "_static" not in path.relative_to(book).parts)
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files}
    found = [] if pages else ["no pages"]
    for path, page in pages.items():
        name = path.relative_to(book)
        found += [f"{name}: loads {address} from another host" for address in page.loads if urlsplit(address).netloc]
        wanted = {*page.links, *(address for address in page.loads if not address.startswith("data:"))}
        found += [f"{name}: nothing at {link}" for link in sorted(wanted) if not _meets(link, path, pages)]
        sources = re.findall(r"\$[^$\n]+\$|\\\(|\\\[|\\begin\{", "".join(page.prose))
        found += [f"{name}: unrendered formula {source}" for source in sources]
    for path in sorted(book.rglob("*.css")):
        addresses = FOREIGN_STYLE.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(book)}: loads {address} from another host" for address in addresses]
    return found


def _meets(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link of the page at `path` leads to a file, and to a place in it if it is a page; other hosts are not asked."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    place = unquote(parts.fragment)
    return target.exists() and (not place or target not in pages or place in pages[target].places)


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
