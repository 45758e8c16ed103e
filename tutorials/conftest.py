"""Under nbval kernels are forked from one process that has imported what notebooks import of others: the same, and seconds sooner."""

import json
import os
from pathlib import Path

from warm import Warm

PRELOADED = ("ipykernel.kernelapp", "torch", "matplotlib.pyplot", "matplotlib_inline.backend_inline")
ASKED_FOR = "python3"  # the kernel that notebooks name


def pytest_configure(config):
    """Say where that kernel is, to all processes of pytest -n by what they inherit."""
    if hasattr(config, "workerinput") or not (config.getoption("nbval") or config.getoption("nbval_lax")):
        return
    warm = Warm(dict(os.environ), *PRELOADED)
    config.add_cleanup(lambda: warm.__exit__())
    place = Path(warm.folder.name, "kernels", ASKED_FOR)
    place.mkdir(parents=True)
    command = [warm.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "forked", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = os.pathsep.join([warm.folder.name, *filter(None, [os.environ.get("JUPYTER_PATH")])])
