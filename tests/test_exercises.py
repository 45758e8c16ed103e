"""The checks of the tutorials' exercises: a stub is "not attempted yet", every named mistake is recognised, the solution is right.

Stubs are read from the tutorials and solutions from the solution notebooks, so that each check is held to what readers see.
"""

import ast
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import wide_awake

from tucker_ref import GroupedQueryAttention, MultiHeadLatentAttention, as_tucker, multilinear_rank, unfold
from tutorials.exercises import common, e00, e01, e02, e03, e04

FOLDER = Path(__file__).parent.parent / "tutorials"


def exercise_cells(path: Path) -> list[str]:
    """The code cells that call a check, without the semicolon that keeps Jupyter from showing True or False."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [cell.rstrip("; \n") for cell in cells if ".check_" in cell]


def name_of(cell: str) -> str:
    """The check that the cell calls."""
    calls = [node.func.attr for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call) and hasattr(node.func, "attr")]
    return next(name for name in calls if name.startswith("check_"))


def run(path: Path, cell: str) -> None:
    """One exercise cell, after the imports of its notebook and every definition that stands before it."""
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    nodes = [node for source in cells if "%" not in source for node in ast.parse(source.rstrip("; \n")).body]
    needed = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    module = f"e{path.stem[:2]}"
    scope = {module: importlib.import_module(f"tutorials.exercises.{module}")}
    exec(compile(ast.Module(needed, []), path.name, "exec"), scope)
    exec(compile(cell, path.name, "exec"), scope)


STUBS = {
    (path.stem[:2], name_of(cell)): (path, cell) for path in sorted(FOLDER.glob("*.ipynb")) for cell in exercise_cells(path)
}
SOLVED = {
    (path.stem[:2], name_of(cell)): (path, cell)
    for path in sorted((FOLDER / "solutions").glob("*.ipynb"))
    for cell in exercise_cells(path)
}
IDS = [" ".join(key) for key in STUBS]


@pytest.mark.parametrize("key", STUBS, ids=IDS)
def test_a_stub_is_not_attempted_yet(key, capsys):
    run(*STUBS[key])
    assert capsys.readouterr().out.startswith("not attempted yet")


@pytest.mark.parametrize("key", STUBS, ids=IDS)
def test_the_solution_is_right(key, capsys):
    run(*SOLVED[key])
    assert capsys.readouterr().out.startswith("right: ")


@pytest.mark.parametrize("key", STUBS, ids=IDS)
def test_every_mistake_that_a_check_knows_is_named(key, capsys, monkeypatch):
    """The check's own wrong ways as attempts: each is told its own sentence, and no other."""
    module = importlib.import_module(f"tutorials.exercises.e{key[0]}")
    judge, seen = common.judge, []
    for place in (common, module):
        monkeypatch.setattr(place, "judge", lambda attempt, *rest, **options: seen.append((rest, options)) or True)
    getattr(module, key[1])(None)
    ((inputs, solution, mistakes, *rest), options) = seen[0]
    assert mistakes, "a check without a named mistake only says that something is wrong"
    for sentence, wrong in mistakes.items():
        capsys.readouterr()
        assert judge(wrong, inputs, solution, mistakes, *rest, **options) is False, sentence
        assert capsys.readouterr().out.endswith(f": {sentence}\n")


ATTEMPTS = {  # what readers write, and a part of what they must be told
    "unfold transposed": (e00.check_unfold, lambda t, n: unfold(t, n).T, "should be (4, 15): the mode comes first"),
    "unfold by a reshape": (e00.check_unfold, lambda t, n: t.reshape(t.shape[n], -1), "first move the mode to the front"),
    "mode product unfolded": (e00.check_mode_product, lambda t, m, n: m @ unfold(t, n), "fold it back"),
    "an exception": (e00.check_size, lambda shape, ranks: sum(shape) / 0, "your code stops with ZeroDivisionError"),
    "not numbers": (e00.check_size, lambda shape, ranks: "many", "must be numbers"),
    "an unknown mistake": (
        e00.check_unfold,
        lambda t, n: unfold(t, n) + 1,
        "right shape, wrong numbers; the worst is at index",
    ),
    "post without transpose": (e01.check_post, lambda v, o: v @ o, "the transpose is missing"),
    "freedom of one side": (e01.check_freedom, 12 * 64**2, "one side only"),
    "heads by a reshape": (e02.check_split_heads, lambda x, h: x.reshape(len(x), h, x.shape[1], -1), "mixes tokens and heads"),
    "PyTorch's default scale": (
        e02.check_attend,
        lambda q, k, v, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "1/sqrt(width of the query)",
    ),
    "mask of SDPA": (e02.check_causal, lambda n, m: torch.ones(n, m).tril() > 0, "you aligned the first ones"),
    "columns of a Linear": (
        e02.check_tensor,
        lambda layer: torch.stack(
            [q @ k.T for q, k in zip(layer.q_proj.weight.split(4, dim=1), layer.k_proj.weight.split(4, dim=1))]
        ),
        "you cut its columns",
    ),
    "dealt out": (e03.check_group, lambda head, h, g: head % g, "neighbouring"),
    "repeated in turn": (e03.check_repeat, lambda k, h: k.repeat(1, h // k.shape[1], 1, 1), "0 0 1 1"),
    "head mode compressed": (
        e03.check_ranks,
        lambda d, h, g, k: (g, min(d, h * k), min(d, g * k)),
        "It is the key mode that is shared",
    ),
    "W^UK of one head": (e04.check_absorb_query, lambda q, w: q @ w[0], "head 0 for every head"),
    "a latent per head": (
        e04.check_cache,
        lambda d, h, t, n, layers, shared: 2 * (2 - shared) * h * t * n * layers,
        "kept once",
    ),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_typical_mistakes_are_recognised(name, capsys):
    check, attempt, told = ATTEMPTS[name]
    assert check(attempt) is False
    assert told in capsys.readouterr().out


def test_float32_answers_are_accepted_and_inputs_protected(capsys):
    def single(t, n):
        t *= 1  # writes to its argument
        result = unfold(t, n).astype(np.float32)
        t[:] = 0
        return result

    assert e00.check_unfold(single) and e00.check_unfold(single)


def test_the_ranks_that_the_exercises_call_right_are_those_of_layers(monkeypatch):
    def inputs_and_solution(module, check):
        seen = []
        monkeypatch.setattr(module, "judge", lambda attempt, inputs, solution, *rest: seen.append((inputs, solution)))
        getattr(module, check)(None)
        return seen[0]

    inputs, solution = inputs_and_solution(e03, "check_ranks")
    for d, h, g, k in inputs[:3]:
        layer = as_tucker(wide_awake(GroupedQueryAttention(d, h, g, head_dim=k)))
        assert multilinear_rank(layer.pre.numpy().to_tensor()) == solution(d, h, g, k)
    inputs, solution = inputs_and_solution(e04, "check_ranks")
    for d, h, k, s, t in inputs[:3]:
        layer = as_tucker(wide_awake(MultiHeadLatentAttention(d, h, s, t, head_dim=k)))
        assert multilinear_rank(layer.post.numpy().to_tensor()) == solution(d, h, k, s, t)
