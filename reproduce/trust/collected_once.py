"""mutmut, with the tests collected once for all mutants: `python collected_once.py run`.

mutmut 3.8 has a process that imports the tests and forks once per mutant. Each fork then collects the tests anew, which takes seconds
where running them takes tenths. Here that process keeps what it collected, and each fork runs what it needs of it: of the tests that
belong to the mutant's module those that call the mutated function, first the ones that killed another mutant of it. A mutant that is
listed as equivalent meets no more than fifty of them: it would take all its tests each time, and the reason beside it stands for the rest.

Of the mutants that mypy rejects, some are drawn by lot and tried all the same. `asked.json` in the current folder says what is asked:
`tests_of` each module, the `equivalent` mutants, and the `seed` of the lot with its `share`. `drawn.json` has the answer.
"""

import gc
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd

ASKED, DRAWN, KILLERS = Path("asked.json"), Path("drawn.json"), Path("killers.txt")  # in the current folder
QUICKEST = 50  # tests that must pass in a fork before mutants are tried, and all that one meets which is listed as equivalent


def collect(arguments: list[str]) -> pytest.Session:
    """Collect tests and leave the session open.

    Args:
        arguments: of pytest's command line.
    """
    from _pytest.config import get_config  # pytest.main closes what it opens

    config = get_config(arguments)
    config = config.pluginmanager.hook.pytest_cmdline_parse(pluginmanager=config.pluginmanager, args=arguments)
    config._do_configure()
    session = pytest.Session.from_config(config)
    config.hook.pytest_sessionstart(session=session)
    config.hook.pytest_collection(session=session)
    return session


def run(session: pytest.Session, names: Iterable[str]) -> str | None:
    """Run some of the collected tests until one fails.

    Args:
        session: as `collect` leaves it; only a process that ends afterwards may run it.
        names: of the tests, as pytest writes them; those that were not collected are left out.

    Returns:
        The name of the one that failed, None if all passed.
    """
    collected = {item.nodeid: item for item in session.items}
    items = [collected[name] for name in names if name in collected]
    for item, following in zip(items, [*items[1:], None]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return item.nodeid
    return None


def in_order(names: Iterable[str], killed: Counter[str], seconds: dict[str, float]) -> list[str]:
    """Tests as they are best tried, the sooner to end a mutant.

    Args:
        names: of the tests.
        killed: how many mutants of the same function each has killed.
        seconds: how long each takes.
    """
    return sorted(names, key=lambda name: (-killed[name], seconds.get(name, 0.0), name))


def lot(rejected: Iterable[str], share: float, seed: int) -> list[str]:
    """Of the mutants that types reject those on which tests are tried all the same: of each module a share, and at least one.

    Args:
        rejected: their names, as mutmut calls them.
        share: of these.
        seed: of the lot.
    """
    of_module: dict[str, list[str]] = {}
    for name in sorted(rejected):
        of_module.setdefault(name.rpartition(".")[0], []).append(name)
    return [name for names in of_module.values() for name in random.Random(seed).sample(names, math.ceil(share * len(names)))]


class CollectedOnce(PytestRunner):
    """What mutmut asks to run tests: in its server, and in a fork of it per mutant."""

    session: pytest.Session | None = None

    def warm_up(self) -> None:
        """Collect all tests of the selection; called in the server alone.

        Raises:
            RuntimeError: if the quickest of them do not pass in a fork as they did when they were timed: mutants would seem dead.
        """
        asked = json.loads(ASKED.read_text(encoding="utf-8"))
        self.tests_of, self.equivalent = asked["tests_of"], asked["equivalent"]
        with change_cwd("mutants"):
            arguments = [
                "--rootdir=.",
                "--tb=native",
                "-s",
                *self._pytest_add_cli_args_test_selection,
                *self._pytest_add_cli_args,
            ]
            self.session = collect(arguments)
        gc.collect()
        gc.freeze()  # or each fork copies all that is here, only to count what refers to what
        seconds = state().duration_by_test
        quickest = sorted(seconds, key=seconds.get)[:QUICKEST]
        if self.fails_in_a_fork(quickest, ""):
            raise RuntimeError("tests that pass alone fail in a fork of the process that collected them")
        called = {name for tests in state().tests_by_mangled_function_name.values() for name in tests}
        if called and not self.fails_in_a_fork(in_order(called, Counter(), seconds), "fail"):
            raise RuntimeError("tests pass where every function that is mutated fails")

    def fails_in_a_fork(self, names: list[str], mutant: str) -> bool:
        """Whether one of these tests fails.

        Args:
            names: of the tests.
            mutant: that is to be there; "" for none, "fail" for errors from all functions that are mutated.
        """
        child = os.fork()
        if child == 0:
            set_mutant_under_test(mutant)
            with change_cwd("mutants"):
                os._exit(run(self.session, names) is not None)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Run those of the tests that belong to the mutant's module.

        Args:
            mutant_name: as mutmut calls it; None of the code as it is, whose tests have passed when they were timed just before.
            tests: that call the mutated function.

        Returns:
            pytest's exit status: 0, or 1 if a test failed; mutmut's 33 where no test is left.
        """
        if mutant_name is None:
            return 0
        function = mutant_name.rpartition("__mutmut_")[0]
        belonging = tuple(self.tests_of[mutant_name.rpartition(".")[0]])
        chosen = [name for name in tests if name.startswith(belonging)]
        if not chosen:
            return 33
        lines = KILLERS.read_text(encoding="utf-8").splitlines() if KILLERS.exists() else []
        killed = Counter(name for of, name in (line.split("\t") for line in lines) if of == function)
        chosen = in_order(chosen, killed, state().duration_by_test)
        if self.is_listed(mutant_name):
            chosen = chosen[:QUICKEST]
        with change_cwd("mutants"):
            killer = run(self.session, chosen)
        if killer is None:
            return 0
        with KILLERS.open("a", encoding="utf-8") as file:
            file.write(f"{function}\t{killer}\n")
        return 1

    def is_listed(self, mutant_name: str) -> bool:
        """Whether an equivalent mutant changes the same. One of another function, if it does, lives on as a survivor."""
        lines = get_diff_for_mutant(mutant_name, path=mutant_name.rpartition(".")[0].replace(".", "/") + ".py").splitlines()
        old, new = (" ".join(line[1:].strip() for line in lines[2:] if line[0] == sign) for sign in "-+")
        return any(text.endswith(f": {old} -> {new}") for text in self.equivalent)

    def run_forced_fail(self) -> int:
        """The server tries this itself, for it has the tests at hand."""
        return 1


def rejected_by_types(filtered: Callable[[], dict]) -> dict:
    """What mypy rejects and no test shall meet; writes what was drawn to meet them.

    Args:
        filtered: mutmut's own: runs mypy, and returns what it rejects by name.
    """
    rejected, asked = filtered(), json.loads(ASKED.read_text(encoding="utf-8"))
    drawn = lot(rejected, asked["share"], asked["seed"])
    DRAWN.write_text(json.dumps(drawn), encoding="utf-8")
    return {name: error for name, error in rejected.items() if name not in drawn}


if __name__ == "__main__":
    import mutmut.__main__ as program  # which chooses how all processes start
    import mutmut.workers.isolation

    mutmut.workers.isolation.PytestRunner = CollectedOnce
    program.filter_mutants_with_type_checker = partial(rejected_by_types, program.filter_mutants_with_type_checker)
    program.cli()
