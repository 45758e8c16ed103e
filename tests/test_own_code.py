"""Whatever is compiled apart is counted apart: nine layers of nine sizes are nine compilations, and none falls back.

The compiler's limit, eight, is met by one mechanism and its control; it is two for the others, which takes a third of the time.
"""

import copy
import pickle

import pytest
import torch
from helpers import EXACT, relative_error, tokens, with_large_weights
from torch import nn
from torch._dynamo.testing import CompileCounter

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, MultiHeadLatentAttention, Rotary, TuckerAttention
from tucker_ref.own_code import with_own_code

SIZES = {
    "MHA": lambda size: MultiHeadAttention(24, 3, head_dim=size),
    "GQA": lambda size: GroupedQueryAttention(24, 6, 2, head_dim=2 * size, rotary=Rotary.heads(2 * size)),
    "MLA": lambda size: MultiHeadLatentAttention(24, 3, 10, size),
    "MLA absorbed": lambda size: MultiHeadLatentAttention(24, 3, 10, size, absorb=True),
    "Tucker": lambda size: TuckerAttention(24, 6, (4, 9, size)),
}


class Shared(TuckerAttention):
    """As if all layers called one function."""

    __call__ = nn.Module.__call__


def compiled(layer, x, in_place: bool, **options):
    """What the layer gives after torch.compile."""
    if in_place:
        layer.compile(**options)
        return layer(x)
    return torch.compile(layer, **options)(x)


LIMIT = torch._dynamo.config.recompile_limit
LIMITS = [pytest.param(name, LIMIT if name == "Tucker" else 2, id=name) for name in SIZES]


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.parametrize("name, limit", LIMITS)
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(layer)", "layer.compile()"])
def test_one_more_layer_than_the_limit_each_of_its_own_size_are_compiled(name, limit, in_place):
    torch.compiler.reset()
    x, counter, kept = tokens(1, 5, 24), CompileCounter(), []
    with torch._dynamo.config.patch(recompile_limit=limit):
        for size in range(3, limit + 4):
            layer = with_large_weights(SIZES[name](size))
            expected = layer(x)
            kept.append(layer)
            assert relative_error(compiled(layer, x, in_place, fullgraph=True, backend=counter), expected) < EXACT
    assert counter.frame_count == limit + 1


@pytest.mark.no_cover
@pytest.mark.parametrize("limit", [2, LIMIT])
def test_control_one_size_more_than_the_limit_is_too_many_for_one_function(limit):
    torch.compiler.reset()
    x, counter = tokens(1, 5, 24), CompileCounter()
    layers = [Shared(24, 6, (4, 9, size)).double() for size in range(3, limit + 4)]
    with torch._dynamo.config.patch(recompile_limit=limit):
        for layer in layers[:-1]:
            compiled(layer, x, False, fullgraph=True, backend=counter)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(layers[-1], x, False, fullgraph=True, backend=counter)
    assert counter.frame_count == limit
    torch.compiler.reset()


@pytest.mark.no_cover
def test_inside_of_models_layers_of_one_size_share_a_compilation():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = TuckerAttention(24, 6, (4, 9, 8)).double()

        def forward(self, x):
            return x + self.attention(x)

    torch.compiler.reset()
    x, counter = tokens(1, 5, 24).requires_grad_(), CompileCounter()
    for _ in range(4):
        block = Block()
        assert relative_error(torch.compile(block, fullgraph=True, backend=counter)(x), block(x)) < EXACT
    assert counter.frame_count == 1


def test_each_layer_has_one_function_of_its_own_and_may_be_copied_and_stored():
    layer, x = TuckerAttention(24, 6, (4, 9, 8)).double(), tokens(1, 5, 24)
    other = copy.deepcopy(layer)
    assert layer.__call__.__func__ is layer.__call__.__func__  # or it would be compiled anew each time
    assert layer.__call__.__code__ is not other.__call__.__code__
    assert TuckerAttention.__call__ is nn.Module.__call__
    for copied in (other, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x)) and torch.equal(copied.__call__(x), layer(x))
    full = layer.__call__(x, causal=False)
    assert torch.equal(full, layer.forward(x, causal=False)) and not torch.equal(full, layer(x))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    assert seen == [1]


def test_a_layer_compiled_in_place_calls_what_was_compiled(monkeypatch):
    called, layer, x = [], TuckerAttention(24, 6, (4, 9, 8)).double(), tokens(1, 5, 24)
    monkeypatch.setattr(
        torch, "compile", lambda function, *g, **options: lambda *a, **o: called.append((g, options)) or function(*a, **o)
    )
    expected = layer(x)
    layer.compile("given", dynamic=False)
    assert torch.equal(layer(x), expected) and called == [(("given",), {"dynamic": False})]


def test_code_of_ones_own_does_the_same():
    def product(a, b=2):
        """Of two."""
        return a * b

    first, second = with_own_code(product), with_own_code(product)
    assert first(3) == second(3, b=2) == 6 and second(3, b=5) == 15 and first.__doc__ == "Of two."
    assert first.__code__ is not second.__code__
