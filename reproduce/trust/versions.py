"""Versions: the tests of the library, under warnings as errors, on the Python, torch and NumPy at hand; or on several, from a wheel.

`python -m reproduce versions` runs `tests/` of the current folder with this interpreter. With `--preset wheel` the wheel is built and
installed in an empty environment per combination, and tests and README run from a folder outside the repository, where only the
installed packages can be imported.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from reproduce.store.records import append, git_commit, new_record  # by full name: a copy of this file runs beside the wheel
from reproduce.train.options import Options

TAKES = ()
PRESETS = {
    "smoke": (),  # here
    "wheel": (  # the oldest and the newest that pyproject.toml allows
        ("python3.11", ("numpy==2.0.0", "torch==2.11.0")),
        ("python3.11", ("numpy", "torch")),
        ("python3.14", ("numpy", "torch")),
    ),
}
ROOT = Path(__file__).parents[2]
TOOLS = ("pytest", "hypothesis", "tensorly")
CORE = (
    "tensor_algebra", "decomposition", "attention_tensors", "attend", "rotary", "cache", "mechanisms", "special_cases",
    "compress", "convert", "costs", "contracts", "hostile", "readme",
)  # fmt: skip


def run(options: Options) -> None:
    """One record per combination of versions.

    Args:
        options: `preset` names the combinations; those whose Python is not on this machine are left out.

    Raises:
        ValueError: if a test fails, or a wheel cannot be built or installed.
    """
    combinations = PRESETS[options.preset]
    if not combinations:
        return here(options)
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        [wheel] = Path(folder).glob("*.whl")
        for python, packages in tqdm(combinations, "versions"):
            if shutil.which(python) is None or subprocess.run([python, "-V"], capture_output=True).returncode:
                tqdm.write(f"{python} is not on this machine: left out")
                continue
            tqdm.write(f"{python}, {', '.join(packages)}")
            elsewhere(wheel, python, packages, options.records.absolute())


def here(options: Options) -> None:
    """Run the core tests of the current folder with this interpreter, and record how many passed.

    Args:
        options: where the record goes.

    Raises:
        ValueError: if a test fails, after the record is written; or if none ran.
    """
    started = time.perf_counter()
    call(sys.executable, "-W", "error", "-c", "import tucker_ref")
    files = [f"tests/test_{name}.py" for name in CORE]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-q", "-rfE", *files]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not counts:
        raise ValueError(f"no test ran: {(done.stdout + done.stderr)[-4000:]}")
    import tucker_ref

    metrics = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
    metrics["failed"] += counts.get("error", 0)
    metrics["library"] = "wheel" if "site-packages" in tucker_ref.__file__ else "source"
    method = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {numpy.__version__}"
    print(f"{method}, from {metrics['library']}: " + ", ".join(f"{metrics[n]} {n}" for n in ("passed", "failed", "skipped")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wall = time.perf_counter() - started
    record = new_record("versions", "tests", method, {"tests": CORE}, metrics, device=device, wall_seconds=wall)
    append(options.records, record, replace=True)
    if done.returncode:
        raise ValueError(f"the tests do not pass with {method}: {(done.stdout + done.stderr)[-4000:]}")


def elsewhere(wheel: Path, python: str, packages: tuple[str, ...], records: Path) -> None:
    """An empty environment with the wheel and these packages, and the same tests run from a folder that is no repository.

    Args:
        wheel: what is tested.
        python: the interpreter's name.
        packages: as pip takes them, with or without a version.
        records: the folder of records, absolute.

    Raises:
        ValueError: if something cannot be installed, or a test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment, place = Path(folder) / "environment", Path(folder) / "elsewhere"
        call(python, "-m", "venv", environment)
        free = {package.split("==")[0] for package in packages}
        pins = [
            line
            for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            if line.split("==")[0] not in free
        ]
        (Path(folder) / "pins.txt").write_text("\n".join(pins), encoding="utf-8")
        install = (environment / "bin" / "python", "-m", "pip", "install", "-q", "-c", Path(folder) / "pins.txt")
        call(*install, f"{wheel}[reproduce,triton]", *packages, *TOOLS)
        shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (ROOT / "README.md", ROOT / "pyproject.toml", Path(__file__)):  # the wheel leaves this file out
            shutil.copy(path, place)
        call(environment / "bin" / "python", Path(__file__).name, "versions", "--records", records, folder=place)


def call(*command, folder: Path | None = None) -> None:
    """Run a command that sees nothing but what is installed.

    Args:
        command: its parts.
        folder: where it runs, here if None.

    Raises:
        ValueError: with what it printed, if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # nothing but what is installed
    environment["GIT_COMMIT"] = git_commit()  # which a wheel does not know
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command))} failed: {(done.stdout + done.stderr)[-4000:]}")


if __name__ == "__main__":
    here(Options("smoke", Path("out"), Path(sys.argv[-1])))
