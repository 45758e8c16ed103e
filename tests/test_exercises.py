"""The checks of the tutorials' exercises: a stub is "not attempted yet", every named mistake is recognised, the solution is right.

Stubs are read from the tutorials and solutions from the solution notebooks, so that each check is held to what readers see.
"""

import ast
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import with_large_weights

from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    attend,
    hosvd,
    multilinear_rank,
    pre_softmax_tensor,
    tucker_cost,
    unfold,
)
from tutorials.exercises import common, e00, e01, e02, e03, e04, e05, e06, e07, e08, e09, e10

FOLDER = Path(__file__).parent.parent / "tutorials"


def exercise_cells(path: Path) -> list[str]:
    """The code cells that call a check, without the semicolon that keeps Jupyter from showing True or False."""
    cells = [
        "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    return [cell.rstrip("; \n") for cell in cells if ".check_" in cell]


def name_of(cell: str) -> str:
    """The check that the cell calls."""
    calls = [node.func.attr for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call) and hasattr(node.func, "attr")]
    return next(name for name in calls if name.startswith("check_"))


def run(path: Path, cell: str) -> None:
    """One exercise cell, after the imports of its notebook and every definition that stands before it."""
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    nodes = [node for source in cells if "%" not in source for node in ast.parse(source.rstrip("; \n")).body]
    needed = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    needed = [node for node in needed if not getattr(node, "decorator_list", [])]  # Triton reads its kernels from files
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
    "a mask of ones": (e02.check_causal, lambda n, m: torch.ones(n, m).tril(m - n), "a mask is boolean"),
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
    "a logit of all heads": (
        e05.check_logit,
        lambda x, y, h, c, u1, u2, u3: (x @ u2) @ torch.einsum("rst,hr->st", c, u1) @ (y @ u3),
        "its own row of U1",
    ),
    "outputs of each head": (
        e05.check_output,
        lambda z, c, u1, u2: torch.einsum("bhnv,hov,do->bhnd", z, torch.einsum("uov,hu->hov", c, u1), u2),
        "the sum over all of them",
    ),
    "the size of Table 1": (
        e05.check_size,
        lambda d, h, a, b: 2 * (h * a[0] + d * a[1] + d * a[2] + math.prod(a)),
        "the second has ranks of its own",
    ),
    "a core of all heads": (e05.check_core, lambda q, k: torch.einsum("hsk,htk->st", q, k), "(5, 6), it should be (3, 5, 6)"),
    "a core the other way round": (e05.check_core, lambda q, k: k @ q.mT, "query and key have changed places"),
    "a transpose too few": (e05.check_gauge, lambda c, k, a: (c @ torch.linalg.inv(a), k @ a), "the inverse is transposed"),
    "a flat core": (
        e05.check_gauge,
        lambda c, k, a: (e05.gauge(c, k, a)[0].flatten(0, 1), k @ a),
        "the core keeps its shape (2, 3, 4)",
    ),
    "RoFormer's pairs": (
        e06.check_rotation,
        lambda x, n, f: torch.view_as_real(
            torch.view_as_complex(x.reshape(-1, 2)) * torch.polar(torch.ones_like(f), n * f)
        ).flatten(),
        "interleaved",
    ),
    "turned back": (e06.check_rotation, lambda x, n, f: e06.rotation(x, -n, f), "the wrong way"),
    "Def. 3.1's schedule": (
        e06.check_frequencies,
        lambda t, r: 10000.0 ** (-torch.arange(0, t + r, 2, dtype=torch.float64) / (t + r)),
        "the paper's latent schedule",
    ),
    "columns for rows": (
        e06.check_gauge,
        lambda re, im: torch.cat([torch.cat([re.diag(), -im.diag()], 1), torch.cat([im.diag(), re.diag()], 1)]),
        "its transpose",
    ),
    "exponentials of large sums": (
        e07.check_join,
        lambda a, la, b, lb: (la.exp()[:, None] * a + lb.exp()[:, None] * b) / (la.exp() + lb.exp())[:, None],
        "overflows",
    ),
    "the first sum for the largest": (
        e07.check_join,
        lambda a, la, b, lb: (a + (lb - la).exp()[:, None] * b) / (1 + (lb - la).exp())[:, None],
        "subtract the larger of the two",
    ),
    "tiles that divide one another": (
        e07.check_tiles,
        lambda n, q, s: ((n // q) * (n // s) + n // min(q, s)) / 2,
        "4.5 is not it",
    ),
    "half of all tiles": (e07.check_tiles, lambda n, q, s: (n // q) * (n // s) // 2, "half of all tiles is close"),
    "a cache of keys": (e07.check_max_tokens, lambda size, n, t, v, b: size // (n * t * b), "values are cached too"),
    "the query mode again": (
        e08.check_key_gram,
        lambda q, k: torch.einsum("hdk,hkl,hel->de", q, k.mT @ k, q),
        "queries and keys change places",
    ),
    "the bound squared": (
        e08.check_bound,
        lambda s, r: sum((v[n:] ** 2).sum() for v, n in zip(s, r)) / (s[0] ** 2).sum(),
        "take the root",
    ),
    "a trace without its transpose": (
        e08.check_head_gram,
        lambda q, k: torch.einsum("iakl,ialk->ia", q.mT[:, None] @ q[None], k.mT[:, None] @ k[None]),
        "is transposed",
    ),
    "a budget for one tensor": (
        e09.check_query_rank,
        lambda budget, d, h, r, t: (budget - h * r - d * t) // (d + r * t),
        "there are two tensors",
    ),
    "nats per byte": (e09.check_bits_per_byte, lambda loss, tokens, size: loss * tokens / size, "a bit is ln 2 nats"),
    "a third of the patterns": (e08.check_fewer, (4, 9, 9), "little in common"),
    "the mean alone": (e10.check_word, lambda low, high: 1 if (low + high) / 2 > 0 else -1, "the mean alone decides nothing"),
    "normalised to length 1": (
        e10.check_qk_bound,
        lambda q, k: (q * k).abs().max() / len(q) ** 0.5,
        "has the length sqrt(width)",
    ),
    "a test that is not paired": (
        e09.check_verdict,
        lambda a, b: (a.mean() - b.mean()) / ((a.var() + b.var()) / len(a)) ** 0.5,
        "seeds are pairs",
    ),
}


def test_typical_mistakes_of_every_tutorial_are_tried():
    assert {check.__module__[-3:] for check, _, _ in ATTEMPTS.values()} == {f"e{key[0]}" for key in STUBS}


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
        layer = as_tucker(with_large_weights(GroupedQueryAttention(d, h, g, head_dim=k)))
        assert multilinear_rank(layer.pre.numpy().to_tensor()) == solution(d, h, g, k)
    inputs, solution = inputs_and_solution(e04, "check_ranks")
    for d, h, k, s, t in inputs[:3]:
        layer = as_tucker(with_large_weights(MultiHeadLatentAttention(d, h, s, t, head_dim=k)))
        assert multilinear_rank(layer.post.numpy().to_tensor()) == solution(d, h, k, s, t)


def test_what_the_exercises_call_right_is_what_the_library_computes():
    torch.manual_seed(0)
    ranks, post_ranks = (3, 8, 6), (4, 7, 5)
    layer = with_large_weights(TuckerAttention(24, 6, ranks, post_ranks))
    assert e05.size(24, 6, ranks, post_ranks) == sum(p.numel() for p in layer.parameters())
    x, y = torch.randn(2, 24, dtype=torch.float64)
    found = e05.logit(x, y, 2, layer.pre.core, *layer.pre.factors)
    torch.testing.assert_close(found, x @ layer.pre.to_tensor()[2] @ y)
    values = torch.randn(1, 6, 1, 24, dtype=torch.float64)  # (b, h, n, d): what each head mixed, before the value factor
    found = e05.output(values @ layer.post.value, layer.post.core, layer.post.head, layer.post.output)
    torch.testing.assert_close(found, torch.einsum("bhne,hde->bnd", values, layer.post.to_tensor()))
    mla = with_large_weights(MultiHeadLatentAttention(24, 6, 10, 8))
    w_uq, w_uk = mla.q_b_proj.weight.unflatten(0, (6, 4)).mT, mla.up_projections()[0].mT  # (h, s, k), (h, t, k)
    assert torch.equal(e05.core(w_uq, w_uk), as_tucker(mla).pre.core)
    rotary, x = Rotary.heads(6), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(e06.rotation(x, 3, rotary.frequencies), rotary(x[None], torch.tensor([3]))[0])
    torch.testing.assert_close(e06.frequencies(8, 4), Rotary.decoupled(8, 4).frequencies)
    a = e06.gauge(*torch.randn(2, 3, dtype=torch.float64))
    torch.testing.assert_close(
        rotary(a[None], torch.full((6,), 5))[0], rotary(torch.eye(6)[None].double(), torch.full((6,), 5))[0] @ a
    )


def test_what_the_exercises_of_kernels_ranks_and_budgets_call_right_is_what_the_library_computes():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 4, dtype=torch.float64)
    parts = [
        (attend(q[None, None], k[None, None, m], v[None, None, m], scale=1.0)[0, 0], (q @ k[m].T).logsumexp(1))
        for m in (slice(3), slice(3, 7))
    ]
    torch.testing.assert_close(
        e07.join(*parts[0], *parts[1]), attend(q[None, None], k[None, None], v[None, None], scale=1.0)[0, 0]
    )
    for n, queries, sources in ((128, 32, 16), (64, 8, 32), (64, 16, 16)):
        mask = torch.ones(n, n).tril().bool().unflatten(0, (-1, queries)).unflatten(2, (-1, sources))
        assert e07.tiles(n, queries, sources) == mask.any(3).any(1).sum()
    layer = TuckerAttention(24, 6, (3, 8, 6), (3, 8, 5))
    assert e07.max_tokens(layer.new_cache(1, 9).nbytes, 1, 6, 5, 4) == 9
    w_q, w_k = e08._projections()
    w = pre_softmax_tensor(w_q.numpy(), w_k.numpy())
    np.testing.assert_allclose(e08.key_gram(w_q, w_k), unfold(w, 2) @ unfold(w, 2).T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(e08.head_gram(w_q, w_k), unfold(w, 0) @ unfold(w, 0).T, rtol=1e-12, atol=1e-12)
    spectra = [torch.from_numpy(np.linalg.svd(unfold(w, mode), compute_uv=False)) for mode in range(3)]
    assert np.linalg.norm(w - hosvd(w, (2, 3, 3)).to_tensor()) / np.linalg.norm(w) <= e08.bound(spectra, (2, 3, 3))
    guesses = [e09.bits_per_byte(math.log(tokens), 1000, 1000 * size) for tokens, size in ((256, 1.0), (512, 2.6))]
    assert guesses == pytest.approx([8, 9 / 2.6])  # a uniform guess: one unit, but the value depends on the tokenizer
    gains = torch.randn(2, 16, dtype=torch.float64)
    q, k = (F.rms_norm(torch.randn(1000, 16, dtype=torch.float64), (16,)) * gain for gain in gains)
    bound, channel = e10.qk_bound(*gains), (gains[0] * gains[1]).abs().argmax()
    assert ((q @ k.T) / 4).abs().max() <= bound
    q, k = (4 * torch.eye(16, dtype=torch.float64)[channel] * gain for gain in gains)  # of mean square 1 before the gain
    assert (q @ k / 4).abs() == pytest.approx(bound.item())
    s = e09.query_rank(21504, 96, 6, 4, 16)
    assert tucker_cost(96, 6, (4, s, 16)).parameters <= 21504 < tucker_cost(96, 6, (4, s + 1, 16)).parameters
