"""The README's Python runs as it stands, from top to bottom, and does what its comments say."""

import re
from pathlib import Path

from tucker_ref import mha_cost, tucker_cost

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_in_the_readme_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["y_next"].shape == (2, 1, 768)
    share = sum(p.numel() for p in names["layer"].parameters()) / mha_cost(768, 12).parameters
    assert round(100 * share) == 18 and tucker_cost(768, 12, (8, 128, 64)).cache_per_token == 128
    assert names["ranks"][2] + names["post_ranks"][2] <= 256 and names["small"](names["x"]).shape == (2, 16, 768)


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dangling(page: str) -> list[str]:
    """Links of the page to files and headings that are not there."""
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    return [
        link
        for link in links
        if not link.startswith("http") and not (link in anchors(page) if link.startswith("#") else (ROOT / link).exists())
    ]


def test_the_links_in_the_readme_lead_somewhere():
    assert dangling(README) == []
    assert dangling(README + "\n[here](#nowhere) and [there](tucker_ref/nothing.py)") == ["#nowhere", "tucker_ref/nothing.py"]
    headings = re.findall(r"^### (.*)$", README, re.MULTILINE)
    assert len(headings) > 10 and all(f"[{heading}](#" in README for heading in headings if heading != "Figures")
