"""Programs forked from a process that has imported everything already: what they do is the same, and begins seconds sooner.

The process is an interpreter of its own, in the environment that it is given: locale, encoding and streams are those of that interpreter.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Warm:
    """The process, as a context.

    Args:
        environment: in which it starts.
    """

    def __init__(self, environment: dict[str, str]):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=ROOT, **pipes)

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()

    def run(self, *arguments, **environment: str) -> subprocess.CompletedProcess:
        """What `python ARGUMENTS` does, in the repository.

        Args:
            arguments: -m and a module, -c and a program, or a file; then what follows.
            environment: variables beside those of the process.

        Returns:
            Its exit status and, in bytes, what it said.
        """
        with tempfile.TemporaryDirectory() as folder:
            places = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            order = [list(map(str, arguments)), environment, places]
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            said = [Path(place).read_bytes() for place in places]
        return subprocess.CompletedProcess(arguments, status, *said)


def become(arguments: list[str], environment: dict[str, str], places: list[str]) -> None:
    """Do what a program does, in this process."""
    for stream, place in zip((1, 2), places):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    kind, what = arguments[:2] if arguments[0] in ("-c", "-m") else ("", arguments[0])
    sys.argv = [what if kind == "" else kind, *arguments[2 if kind else 1 :]]
    if kind == "-c":
        exec(what, {"__name__": "__main__"})
    elif kind == "-m":
        sys.modules.pop(f"{what}.__main__", None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def main() -> None:
    """Fork one program per line of stdin, one after the other, and print the exit status of each."""
    import reproduce.__main__  # noqa: F401

    said = os.dup(1)
    while order := sys.stdin.buffer.readline():
        if (child := os.fork()) == 0:
            become(*json.loads(order))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(said, b"%d\n" % status)


if __name__ == "__main__":
    main()
