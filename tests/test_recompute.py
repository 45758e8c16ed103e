"""Queries made again in the backward pass: the same output and gradients, less kept, and no kernel run twice."""

import weakref

import pytest
import torch
from helpers import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from tucker_ref import Rotary, TuckerAttention, recompute
from tucker_ref.attend import attend

OPTIONS = {
    "plain": {},
    "RoPE": {"rotary": Rotary.latent(16)},
    "QK-norm": {"qk_norm": "head"},
    "RoPE, shared, QK-norm of all": {"rotary": Rotary.latent(16), "shared_kv": True, "qk_norm": "all"},
    "bias, latent norms": {"bias": True, "latent_norm": True},
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


def test_it_compiles_whole():
    layer = layer_of(rotary=Rotary.latent(16))
    plain = results(layer)
    layer.recompute = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert max(map(relative_error, results(layer, compiled), plain)) < 1e-14


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
def test_a_second_backward_pass_is_refused_in_words(backend):
    layer = layer_of()
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    y = layer(x, backend=backend).sum()
    y.backward(retain_graph=True)
    y.backward()  # control: what keeps all can
    layer.recompute = True
    y = layer(x, backend=backend).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only, even with retain_graph=True"):
        y.backward()


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
