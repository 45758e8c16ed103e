"""Programs forked from a process that has imported everything already: what they do is the same, and begins seconds sooner.

The process is an interpreter of its own, in the environment that it is given: locale, encoding and streams are those of that interpreter.
A stand-in for `python` asks it for a program, lends it its streams and its environment, hands signals on, and ends as the program ends.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import quicker  # which imports others' modules without coverage

ROOT = Path(__file__).parent.parent
STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
handed_on = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)  # until there is a program to hand them to
with socket.socket(socket.AF_UNIX) as to:
    to.connect({door!r})
    order = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(to, [len(order).to_bytes(8, "big")], [0, 1, 2])
    to.sendall(order)
    program = int.from_bytes(to.recv(8), "big")
    for number in handed_on:
        signal.signal(number, lambda number, _: os.kill(program, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
    status = int.from_bytes(to.recv(8), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class Warm:
    """The process, as a context.

    Args:
        environment: in which it starts.
        modules: that it imports beside the command line.
    """

    def __init__(self, environment: dict[str, str], *modules: str):
        self.folder = tempfile.TemporaryDirectory()
        self.environment, door = environment, os.path.join(self.folder.name, "door")
        self.python = os.path.join(self.folder.name, "python")
        Path(self.python).write_text(STAND_IN.format(python=sys.executable, door=door), encoding="utf-8")
        os.chmod(self.python, 0o700)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, __file__, door, *modules], env=environment, cwd=ROOT, **pipes)
        self.process.stdout.readline()  # from now on it can be asked

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate(b"end")  # said, since a process that a test left may hold this pipe open
        self.folder.cleanup()

    def run(self, *arguments, **environment: str) -> subprocess.CompletedProcess:
        """What `python ARGUMENTS` does, in the repository.

        Args:
            arguments: -m and a module, -c and a program, or a file; then what follows.
            environment: variables beside those of the process.

        Returns:
            Its exit status and, in bytes, what it said.
        """
        command = [self.python, *map(str, arguments)]
        return subprocess.run(command, env={**self.environment, **environment}, cwd=ROOT, capture_output=True)


def become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Do what a program does, in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    said = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for number, (name, old) in enumerate(said.items(), 1):
        setattr(sys, name, open(number, "w", 1, encoding=old.encoding, errors=old.errors, closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-u":  # every line is written at once anyway
        arguments = arguments[1:]
    kind, what = arguments[:2] if arguments[0] in ("-c", "-m") else ("", arguments[0])
    sys.argv = [what if kind == "" else kind, *arguments[2 if kind else 1 :]]
    sys.path[0] = {"-c": "", "-m": folder, "": os.path.dirname(what)}[kind]
    if kind == "-c":
        exec(what, {"__name__": "__main__"})
    elif kind == "-m":
        is_package = hasattr(sys.modules.get(what), "__path__")
        sys.modules.pop(f"{what}.__main__" if is_package else what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def received(asking: socket.socket) -> tuple[list, list[int]]:
    """What a stand-in asks for: arguments, environment and folder; and its streams."""
    length, streams, *_ = socket.recv_fds(asking, 8, 3)
    order = asking.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    return json.loads(order), streams


def tell_ends(asking: dict[socket.socket, int]) -> None:
    """Exit statuses of programs that have ended, to those who asked for them."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            for asked in [a for a, program in asking.items() if program == ended[0]]:
                del asking[asked]
                with asked, contextlib.suppress(OSError):  # of one who was killed
                    asked.sendall(os.waitstatus_to_exitcode(ended[1]).to_bytes(8, "big", signed=True))


def main() -> None:
    """Fork a program for everyone who asks at the door, until stdin speaks or ends; who asked and is gone is followed by its program."""
    for module in ("reproduce.__main__", *sys.argv[2:]):
        importlib.import_module(module)
        if "triton" not in sys.modules:  # whose binding reports what is frozen at the end as leaked
            gc.freeze()  # or each fork, as it ends, copies all that is here only to look through it
    if "torch._dynamo" in sys.modules:
        quicker.compile_untraced()
    asking, ended, wake = {}, *os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    door = socket.socket(socket.AF_UNIX)
    door.bind(sys.argv[1])
    door.listen()
    print(flush=True)
    while True:
        for stream in select.select([0, ended, door, *asking], [], [])[0]:
            if stream == 0:
                return
            if stream == ended:
                os.read(ended, 1 << 10)
                tell_ends(asking)
            elif stream is door:
                asked, _ = door.accept()
                order, streams = received(asked)
                if (program := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (door, asked, *asking):
                        other.close()
                    become(*order, streams)
                    return
                for lent in streams:
                    os.close(lent)
                asking[asked] = program
                with contextlib.suppress(OSError):
                    asked.sendall(program.to_bytes(8, "big"))
            elif stream in asking:  # it says no more: it was killed
                os.kill(asking.pop(stream), signal.SIGKILL)
                stream.close()


if __name__ == "__main__":
    main()
