"""The web book: Sphinx with MyST-NB, which is what Jupyter Book 1 is made of. `make book` builds it, without a network.

The notebooks are taken with the outputs that are committed in them; nothing is executed here.
"""

import importlib.util
import re
from pathlib import Path

from tutorials.book import interactive, online
from tutorials.book.chapters import as_chapter

MATHJAX = Path(importlib.util.find_spec("mathjax").submodule_search_locations[0])  # from the package django-static-mathjax

project = "Tucker Attention, step by step"
author = "The tucker-ref maintainers"
copyright = "2026, The tucker-ref maintainers; MIT licence"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "index"
exclude_patterns = ["book", "exercises", "**.ipynb_checkpoints"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets would be fetched from another host; the page `interactive` has what needs sliders
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

mathjax_path = "tex-svg-full.js"  # one file: glyphs are drawn as paths, no font is fetched

autodoc_member_order = "bysource"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["book.css", str(interactive.STATIC), str(MATHJAX / "static/mathjax/es5" / mathjax_path)]
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = html_domain_indices = False
html_context = {"default_mode": "auto"}  # light or dark as the system has it
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2} | online.launch_buttons(online.repository())


def as_restructured_text(app, what, name, obj, options, lines):
    """Our docstrings are plain text with `code` and indented displays; autodoc reads reStructuredText."""
    text, shown = [], False
    for line in lines:
        display = line.startswith("    ") and (shown or not text or not text[-1].strip())
        if display and not shown:
            text += ["", ".. code-block:: text", ""]
        shown = display or (shown and not line.strip())
        text.append(line if shown else _paragraph_line(line))
    lines[:] = text


def _paragraph_line(line: str) -> str:
    """Code between double backticks, every other sign that reStructuredText reads escaped; `Returns` and `Raises` start anew."""
    field, line = re.match(r"(\s*:\w+[^:]*: ?)?(.*)", line).groups(default="")  # what napoleon made of `Args:` and the like
    parts = re.split(r"(`[^`]+`)", line)
    line = "".join(f"`{part}`" if n % 2 else re.sub(r"([\\*|_])", r"\\\1", part) for n, part in enumerate(parts))
    return field + re.sub(r"^(Returns|Raises|Same arguments)", r"\n\1", line)


def show_chapter(app, name, source):
    """What a page includes from the repository, with links that lead on from here."""
    source[0] = as_chapter(source[0], Path(app.env.doc2path(name)))


def write_numbers(app, error):
    """What the interactive page shows, from the records of the day."""
    if error is None:
        interactive.write_numbers(Path(app.outdir) / "_static")


def setup(app):
    app.connect("build-finished", write_numbers)
    app.connect("source-read", show_chapter)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=900)  # after napoleon
