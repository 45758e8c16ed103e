"""Queries made again in the backward pass: the same output and gradients, less kept, and no kernel run twice."""

import weakref

import pytest
import torch
from helpers import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, Rotary, TuckerAttention, recompute
from tucker_ref.attend import attend

OPTIONS = {
    "plain": {},
    "RoPE": {"rotary": Rotary.latent(16)},
    "QK-norm": {"qk_norm": "head"},
    "RoPE, shared, QK-norm of all": {"rotary": Rotary.latent(16), "shared_kv": True, "qk_norm": "all"},
    "bias, latent norms": {"bias": True, "latent_norm": True},
}
HEADS = {
    "MHA": lambda: MultiHeadAttention(24, 4),
    "MHA, RoPE, biases": lambda: MultiHeadAttention(24, 4, rotary=Rotary.heads(6), bias=True),
    "MHA, RoPE, QK-norm": lambda: MultiHeadAttention(24, 4, rotary=Rotary.heads(6), qk_norm="head"),
    "GQA, RoPE, QK-norm of all": lambda: GroupedQueryAttention(24, 4, 2, rotary=Rotary.heads(6), qk_norm="all"),
}


def layer_of(**options) -> TuckerAttention:
    torch.manual_seed(0)
    return TuckerAttention(24, 4, (3, 12, 16), **options).double()


def results(layer, call=None, **options) -> list[torch.Tensor]:
    """Output and all gradients, of one fixed input and direction."""
    x, direction = torch.randn(2, 2, 9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    y = (layer if call is None else call)(x, **options)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_the_same(options, backend):
    layer = layer_of(**options)
    plain = results(layer, backend=backend)
    layer.recompute = True
    again = results(layer, backend=backend)
    assert max(map(relative_error, again, plain)) < 1e-14
    other = results(layer, backend=backend, causal=False)
    assert relative_error(other[0], plain[0]) > 1e-3  # control: another function is seen


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "reference"])
@pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)
def test_heads_with_keys_of_their_own_too(build, backend):
    torch.manual_seed(0)
    layer = build().double()
    plain = results(layer, backend=backend)
    layer.recompute = True
    assert max(map(relative_error, results(layer, backend=backend), plain)) < 1e-14
    assert relative_error(results(layer, backend=backend, causal=False)[0], plain[0]) > 1e-3  # control


@pytest.mark.parametrize(
    "build", [lambda: layer_of(rotary=Rotary.latent(16)), HEADS["MHA, RoPE, QK-norm"]], ids=["Tucker", "MHA"]
)
def test_under_autocast_nothing_changes(build):
    layer = build().float()

    def rounded() -> list[torch.Tensor]:
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    plain = rounded()
    layer.recompute = True
    assert plain[0].dtype == torch.bfloat16
    assert all(map(torch.equal, rounded(), plain))  # what is made again is rounded as before


def test_a_cache_keeps_keys_and_values_whether_or_not_they_could_be_made_again():
    layer, x = MultiHeadAttention(24, 4).double(), torch.randn(1, 5, 24, dtype=torch.float64)
    expected = layer(x)
    layer.recompute = True
    cache = layer.new_cache(1, 5, dtype=torch.float64)
    y = torch.cat([layer(x[:, :3], cache=cache), layer(x[:, 3:], cache=cache)], dim=1)
    assert cache.length == 5 and relative_error(y, expected) < 1e-14


def test_it_compiles_whole():
    layer = layer_of(rotary=Rotary.latent(16))
    plain = results(layer)
    layer.recompute = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert max(map(relative_error, results(layer, compiled), plain)) < 1e-14


@pytest.mark.parametrize("compiling", [True, False])
def test_kernels_that_are_compiled_are_chosen_for_good(compiling, monkeypatch):
    """So neither switches nor calls are looked at."""
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: compiling)
    attention = recompute._under_the_same_switches(lambda x: x)
    assert [attention(n) for n in range(2)] == [0, 1]
    if compiling:
        assert attention(2) == 2
    else:  # control
        with pytest.raises(RuntimeError, match="one backward pass only"):
            attention(2)


class Counted(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] = self.calls.get(function, 0) + 1
        return function(*args, **(kwargs or {}))


def test_the_kernel_runs_once_and_the_queries_are_made_twice():
    layer = layer_of(rotary=Rotary.latent(16))
    runs = {}
    for again in (False, True):
        layer.recompute = again
        with Counted() as counted:
            results(layer)
        runs[again] = counted.calls
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert runs[False][kernel] == runs[True][kernel] == 1
    cat = torch.ops.aten.cat.default  # queries are turned again, keys are not
    assert runs[True][cat] > runs[False][cat]


@pytest.mark.parametrize("again", [False, True])
def test_no_queries_are_kept_between_the_passes(again, monkeypatch):
    """Queries that are not made again are there until the backward pass: the control."""
    seen = []

    def watched(q, *args, **options):
        seen.append(weakref.ref(q.untyped_storage()))
        return attend(q, *args, **options)

    monkeypatch.setattr("tucker_ref.tucker.attend", watched)
    layer = layer_of(rotary=Rotary.latent(16))
    layer.recompute = again
    y = layer(torch.randn(2, 9, 24, dtype=torch.float64))
    assert (seen[0]() is None) == again
    y.sum().backward()


def test_without_gradients_nothing_is_recorded():
    layer = layer_of()
    layer.recompute = True
    with torch.no_grad():
        assert layer(torch.randn(1, 3, 24, dtype=torch.float64)).grad_fn is None


def test_other_kernels_in_the_backward_pass_are_refused():
    layer = layer_of()
    layer.recompute = True
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        y = layer(x).sum()
    with pytest.raises(RuntimeError, match="put it inside the same sdpa_kernel"):
        y.backward()
    with sdpa_kernel(SDPBackend.MATH):
        layer(x).sum().backward()  # control: under the same switches it passes


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "reference"])
@pytest.mark.parametrize("build", [layer_of, *HEADS.values()], ids=["Tucker", *HEADS])
def test_a_second_backward_pass_is_refused_in_words(build, backend):
    layer = build().double()
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    y = layer(x, backend=backend).sum()
    y.backward(retain_graph=True)
    y.backward()  # control: what keeps all can
    layer.recompute = True
    y = layer(x, backend=backend).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only, even with retain_graph=True"):
        y.backward()


@pytest.mark.parametrize("options, calls", [({}, 2), ({"when": False}, 1)], ids=["by default", "control"])
def test_what_attends_is_called_again_in_the_backward_pass(options, calls):
    called = []
    x = torch.ones(3, requires_grad=True)
    recompute.queries_made_again(lambda x: called.append(1) or x.square(), x, **options).sum().backward()
    assert len(called) == calls and torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize("build", [layer_of, *HEADS.values()], ids=["Tucker", *HEADS])
def test_a_layer_makes_nothing_again_unless_it_is_told_to(build, monkeypatch):
    layer, called = build(), []
    attention = layer._attention
    monkeypatch.setattr(layer, "_attention", lambda *a: called.append(1) or attention(*a))
    for again, calls in ((None, 1), (True, 2)):  # as it was built; the control
        layer.recompute = layer.recompute if again is None else again
        called.clear()
        layer(torch.ones(1, 3, 24, dtype=next(layer.parameters()).dtype, requires_grad=True)).sum().backward()
        assert len(called) == calls


def test_heads_of_one_token_lie_side_by_side():
    x = torch.randn(2, 4, 9, 16)
    laid = recompute.laid_by_token(x)
    assert torch.equal(laid, x) and laid.transpose(1, 2).is_contiguous()
    assert not x.transpose(1, 2).is_contiguous()  # control
    assert recompute.laid_by_token(laid).data_ptr() == laid.data_ptr()  # nothing is copied where they do


def test_queries_reach_the_kernel_laid_by_token(monkeypatch):
    strides = []

    def watched(q, *args, **options):
        strides.append(q.transpose(1, 2).is_contiguous())
        return attend(q, *args, **options)

    monkeypatch.setattr("tucker_ref.tucker.attend", watched)
    for options in OPTIONS.values():
        layer_of(**options)(torch.randn(2, 9, 24, dtype=torch.float64))
    assert all(strides) and len(strides) == len(OPTIONS)


# What is kept, counted. The numbers by hand are of one token and one layer, in elements; d 24, 4 heads.
KEPT = {  # layer, and what its backward pass needs beside x when it makes the rest again
    # P, K, V, the output and its log-sums, and the output latent, which the gradient of U~2 needs.
    "Tucker, wide": (lambda: TuckerAttention(24, 4, (4, 16, 16)), 3 * 16 + 4 * 16 + 4 + 16),
    "Tucker, narrow": (lambda: TuckerAttention(24, 4, (4, 8, 8)), 3 * 8 + 4 * 8 + 4 + 8),
    # One K more: before it was turned it is one product with P and V, and lies in their memory.
    "Tucker, RoPE": (lambda: TuckerAttention(24, 4, (4, 16, 16), rotary=Rotary.latent(16)), 3 * 16 + 4 * 16 + 4 + 16 + 16),
    # K's root mean square.
    "Tucker, RoPE, QK-norm": (
        lambda: TuckerAttention(24, 4, (4, 16, 16), rotary=Rotary.latent(16), qk_norm="head"),
        3 * 16 + 4 * 16 + 4 + 16 + 16 + 1,
    ),
    # The output and its log-sums: queries, keys and values come from x.
    "MHA, RoPE": (lambda: MultiHeadAttention(24, 4, rotary=Rotary.heads(6)), 24 + 4),
    "MHA, RoPE, QK-norm": (lambda: MultiHeadAttention(24, 4, rotary=Rotary.heads(6), qk_norm="head"), 24 + 4),
}
QUERIES = {"Tucker, wide": 4 * 16, "Tucker, narrow": 4 * 8, "Tucker, RoPE": 4 * 16, "MHA, RoPE": 3 * 24}  # plain, kept as well


class Made(TorchDispatchMode):
    """All memory that was taken, while it is there."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.storages += [weakref.ref(x.untyped_storage()) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


def sizes(storages, *but: torch.Tensor) -> int:
    """Bytes of different storages, but for those of these tensors."""
    known = {x.untyped_storage()._cdata for x in but}
    return sum({s._cdata: s.nbytes() for s in storages if s is not None and s._cdata not in known}.values())


def kept(layer, batch: int) -> int:
    """Bytes that are there between the passes, beside x, y and the weights, whoever keeps them."""
    x = torch.randn(batch, 8, 24, requires_grad=True)
    with Made() as made:
        y = layer(x)
    return sizes([storage() for storage in made.storages], x, y, *layer.parameters())


def kept_compiled(layer, batch: int) -> int:
    """The same of a compiled layer, whose graph says what it saves."""
    x, saved = torch.randn(batch, 8, 24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return sizes([tensor.untyped_storage() for tensor in saved], x, *layer.parameters())


def elements_of_a_token(count, layer) -> float:
    return (count(layer, 3) - count(layer, 2)) / 8 / 4  # 8 tokens more, of 4 bytes an element


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_what_was_worked_out_by_hand(name):
    build, by_hand = KEPT[name]
    layer = build()
    layer.recompute = True
    norm = 16 if name == "Tucker, RoPE, QK-norm" else 0  # K normalised; a compiled layer makes it again from K
    assert elements_of_a_token(kept, layer) == by_hand + norm
    layer.recompute = False  # control
    plain = elements_of_a_token(kept, layer)
    assert plain == by_hand + QUERIES[name] if name in QUERIES else plain > by_hand + norm + 4 * 24


@pytest.mark.no_cover
@pytest.mark.parametrize("name", KEPT)
def test_a_compiled_layer_keeps_no_more(name):
    """With the partitioner of torch.compile's default backend, which decides what passes from the first graph to the second."""
    build, by_hand = KEPT[name]
    found = {}
    for again in (True, False):
        torch.compiler.reset()
        layer = build()
        layer.recompute = again
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
        found[again] = elements_of_a_token(kept_compiled, compiled)
    assert found[True] == by_hand
    assert found[False] >= found[True] + 4 * 8  # control


class Copied(TorchDispatchMode):
    """Elements of the tensors that were copied."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.elements.append(result.numel())
        return result


@pytest.mark.parametrize("name", KEPT)
def test_queries_and_outputs_are_never_copied(name, monkeypatch):
    layer, x = KEPT[name][0](), torch.randn(2, 64, 24)
    layer.recompute = True
    with Copied() as copied:
        layer(x).sum().backward()
    assert max(copied.elements, default=0) < x.shape[0] * x.shape[1] * 4 * 6
    by_head = lambda q, *args, **options: attend(q.contiguous(), *args, **options).contiguous()  # noqa: E731
    monkeypatch.setattr("tucker_ref.mha.attend", by_head)
    monkeypatch.setattr("tucker_ref.tucker.attend", by_head)
    with Copied() as copied:  # control
        layer(x).sum().backward()
    assert max(copied.elements) >= x.shape[0] * x.shape[1] * 4 * 6
