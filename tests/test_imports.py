"""Who may import whom: the contracts of pyproject.toml hold, and each of them can be broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tucker_ref", "reproduce", "paper_figures")


def lint(folder, contract: str | None = None) -> tuple[int, str]:
    """Exit status and output of `lint-imports` on the packages in a folder."""
    only = [f"--contract={contract}"] if contract else []
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo", *only]
    result = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    return result.returncode, result.stdout + result.stderr


def test_the_contracts_hold():
    code, said = lint(ROOT)
    assert code == 0 and "7 kept, 0 broken" in said, said


@pytest.mark.parametrize(
    "contract, path, line",
    [
        ("packages", "tucker_ref/mha.py", "from reproduce.models.rows import Row"),
        ("packages", "reproduce/report/results.py", "import paper_figures.style"),
        ("rooms", "reproduce/train/loop.py", "from ..report.markdown import markdown"),
        ("rooms", "reproduce/experiments/table2.py", "from ..report import query"),
        ("rooms", "reproduce/store/records.py", "from ..train.options import Options"),
        ("rooms", "reproduce/models/gpt2.py", "def later():\n    from ..data import text"),  # late is no way out
        ("rooms", "reproduce/report/words.py", "from ..trust import fuzz"),
        ("rooms", "reproduce/new.py", ""),  # a new room has no place yet
        ("report", "reproduce/report/query.py", "from .words import each_once"),
        ("report", "reproduce/report/words.py", "from .markdown import markdown"),
        ("figures", "paper_figures/sizes.py", "from reproduce.report.gpu import loss_cell"),
        ("circles", "reproduce/experiments/figure3_paper.py", "from . import figure3"),
        ("library", "tucker_ref/tucker.py", "import tqdm"),
        ("triton", "tucker_ref/tucker.py", "import triton"),
    ],
)
def test_a_contract_is_broken_by_an_import_that_it_forbids(contract, path, line, tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.json", "*.png"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    code, said = lint(tmp_path, contract)
    assert code == 1 and "BROKEN" in said, said


def test_the_library_imports_numpy_and_torch_and_for_its_kernels_triton():
    graph = grimp.build_graph("tucker_ref", include_external_packages=True)
    outside = {name for name in graph.modules if name.split(".")[0] != "tucker_ref"} - sys.stdlib_module_names
    assert outside == {"numpy", "torch", "triton"}
    importers = graph.find_modules_that_directly_import("triton")
    assert importers and all(name.startswith("tucker_ref.kernels.") for name in importers)


def test_the_program_starts_without_what_few_commands_need():
    """Each of these takes from a third of a second to one, in every start."""
    slow = {"matplotlib", "scipy.stats", "sklearn", "sympy", "torch._dynamo", "torch.distributed.fsdp", "transformers"}
    program = "import sys, reproduce.__main__; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    loaded = set(done.stdout.splitlines())
    assert {"torch", "tokenizers", "reproduce.report.pages"} <= loaded and not slow & loaded, done.stderr  # first, the control


def test_the_ladder_reads_in_an_afternoon():
    """Rungs 1 to 10 with their docstrings; what stands beside them is read when it is asked for."""
    rungs = ["tensor_algebra", "decomposition", "attention_tensors", "attend", "rotary", "cache"]
    rungs += ["mha", "gqa", "mla", "tucker_naive", "tucker"]
    lines = {name: len((ROOT / "tucker_ref" / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in rungs}
    assert sum(lines.values()) <= 1250 and max(lines.values()) <= 220, lines
