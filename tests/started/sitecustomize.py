"""Read by every Python that a test starts: where coverage is measured, others' modules are imported without, and Ctrl-C may come."""

import sys
from pathlib import Path

if sys.gettrace():
    import threading

    from coverage.collector import Collector

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import quicker  # noqa: F401

    sys.path.pop(0)
    for collector in Collector._collectors:
        collector.data_lock = threading.RLock()  # Ctrl-C may come while it is held, and its holder must not wait for it then
