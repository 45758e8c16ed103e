"""Read by every Python that a test starts: where coverage is measured, others' modules are imported without."""

import sys
from pathlib import Path

if sys.gettrace():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import quicker  # noqa: F401

    sys.path.pop(0)
