"""The README's Python runs as it stands, from top to bottom, and does what its comments say."""

import re
from pathlib import Path

from tucker_ref import mha_cost, tucker_cost

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_in_the_readme_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["y_next"].shape == (2, 1, 768)
    share = sum(p.numel() for p in names["layer"].parameters()) / mha_cost(768, 12).parameters
    assert round(100 * share) == 18 and tucker_cost(768, 12, (8, 128, 64)).cache_per_token == 128
