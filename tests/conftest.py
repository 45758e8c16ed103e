"""Triton's interpreter where there is no GPU, and the matrix of exactness at the end of a run: worst errors, smallest controls."""

import contextlib
import gc
import multiprocessing
import os
from pathlib import Path

import quicker  # isort: skip  (before what it makes quicker)
import pytest
from hypothesis import Phase, settings
from warm import Warm

TESTS = Path(__file__).parent
PLACES = [str(TESTS / "started"), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(PLACES)  # of every Python that a test starts

# ci: the same few inputs in every run. long: minutes, and other inputs each time (`make fuzz`). mutants: ci, and the first that fails.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=500)
settings.register_profile("mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    """What takes seconds, and is not for the process that hands tests out to others (pytest -n) and runs none itself."""
    if config.getoption("numprocesses", 0) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # until all is imported
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, as the next line does
    import torch._dynamo  # the first custom operator imports it, a second that every mutant would pay again

    multiprocessing.set_forkserver_preload(["paper_figures.__main__"])  # once it runs for any test, what it imports is settled
    quicker.rewrite_untraced()
    quicker.compile_untraced()
    if os.environ.get("TRITON_INTERPRET") == "1":
        quicker.interpret_quickly()


MATRIX: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of twenty short documents, which models with small vocabularies can read; files with texts of their own redefine it."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(20):
        words = "".join(f"{n} words and {k} words make {n + k}. " for k in range(200))
        (folder / f"{n:02}.txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def warm():
    """The process from which programs are forked, several workers of one training too."""
    with Warm(
        {**os.environ, "OMP_NUM_THREADS": "1"}, "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run"
    ) as warm:
        yield warm


SLOW = ("two_gpus", "distributed", "figures", "kernels", "quality", "cli", "locale", "survival", "tutorials")


def pytest_collection_modifyitems(items):
    """What takes long comes first: at the end two processes then share out what is short, and none waits for the other."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


def pytest_collection_finish():
    """What has been imported stays: to look through it for garbage again and again takes a tenth of the time of small tests."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.hookimpl(wrapper=True, trylast=True)  # inside pytest-cov's own
def pytest_runtest_call(item):
    """What is marked no_cover runs untraced: in a process of `pytest -n`, pytest-cov pauses one of the two measurements it has started."""
    with quicker.untraced() if item.get_closest_marker("no_cover") else contextlib.nullcontext():
        return (yield)


def pytest_sessionfinish(session):
    gc.unfreeze()  # what is frozen at the end, nanobind reports as leaked
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest -n): its part goes to the one that prints
        session.config.workeroutput["matrix"] = [[*key, value] for key, value in MATRIX.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for row, column, value in getattr(node, "workeroutput", {}).get("matrix", []):
        MATRIX[row, column] = min(value, MATRIX.get((row, column), float("inf")))


def pytest_terminal_summary(terminalreporter):
    if not MATRIX:
        return
    columns = sorted({column for _, column in MATRIX}, key=lambda c: (c == "least control", c.endswith("decoded"), c))
    rows = sorted({row for row, _ in MATRIX})
    width = max(map(len, rows))
    write = terminalreporter.write_line
    terminalreporter.section("as_tucker(layer) against layer: relative error in output and gradient, float64")
    write(" " * width + "".join(column.rjust(18) for column in columns))
    for row in rows:
        cells = (MATRIX.get((row, column)) for column in columns)
        write(row.ljust(width) + "".join(("" if cell is None else f"{cell:.0e}").rjust(18) for cell in cells))
