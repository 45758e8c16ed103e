"""mutmut, with the tests collected once for all mutants: `python collected_once.py run`.

mutmut 3.8 has a process that imports the tests and forks once per mutant. Each fork then collects the tests anew, which takes seconds
where running them takes tenths. Here that process keeps what it collected, and each fork runs what it needs of it: of the tests that
belong to the mutant's module, as `tests_of.json` in the current folder lists them, those that call the mutated function.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd

QUICKEST = 50  # tests that must pass in a fork before mutants are tried


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


def run(session: pytest.Session, names: Iterable[str], seconds: dict[str, float]) -> int:
    """Run some of the collected tests, the quickest first, until one fails.

    Args:
        session: as `collect` leaves it; only a process that ends afterwards may run it.
        names: of the tests, as pytest writes them.
        seconds: how long each test takes.

    Returns:
        pytest's exit status: 0, or 1 if a test failed.
    """
    chosen = set(names)
    items = [item for item in session.items if item.nodeid in chosen]
    items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
    for item, following in zip(items, [*items[1:], None]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


class CollectedOnce(PytestRunner):
    """What mutmut asks to run tests: in its server, and in a fork of it per mutant."""

    session: pytest.Session | None = None

    def warm_up(self) -> None:
        """Collect all tests of the selection; called in the server alone.

        Raises:
            RuntimeError: if the quickest of them do not pass in a fork as they did when they were timed: mutants would seem dead.
        """
        self.tests_of = json.loads(Path("tests_of.json").read_text(encoding="utf-8"))
        with change_cwd("mutants"):
            arguments = [
                "--rootdir=.",
                "--tb=native",
                "-s",
                *self._pytest_add_cli_args_test_selection,
                *self._pytest_add_cli_args,
            ]
            self.session = collect(arguments)
        seconds = state().duration_by_test
        child = os.fork()
        if child == 0:
            os._exit(run(self.session, sorted(seconds, key=seconds.get)[:QUICKEST], seconds))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError("tests that pass alone fail in a fork of the process that collected them")

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Run those of the tests that belong to the mutant's module.

        Args:
            mutant_name: as mutmut calls it; None of the code as it is, whose tests have passed when they were timed just before.
            tests: that call the mutated function.

        Returns:
            pytest's exit status, or mutmut's 33 where no test is left.
        """
        if mutant_name is None:
            return 0
        belonging = tuple(self.tests_of[mutant_name.rpartition(".")[0]])
        chosen = [name for name in tests if name.startswith(belonging)]
        with change_cwd("mutants"):
            return run(self.session, chosen, state().duration_by_test) if chosen else 33

    def run_forced_fail(self) -> int:
        """Run tests until one fails, as each does that calls a function of ours at that moment."""
        return super().run_tests(mutant_name=None, tests=[])


if __name__ == "__main__":
    import mutmut.workers.isolation
    from mutmut.__main__ import cli  # which chooses how all processes start

    mutmut.workers.isolation.PytestRunner = CollectedOnce
    cli()
