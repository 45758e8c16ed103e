"""Rung 10: the layer of rung 10b is Def. 2.1 as rung 10a spells it, in output and in every gradient."""

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from torch._subclasses.fake_tensor import FakeTensorMode

from tucker_ref import Rotary, TuckerAttention
from tucker_ref.tucker_naive import tucker_attention

SIZES = {  # d, heads, ranks, post_ranks, shared_kv
    "r1 < n_H": (24, 12, (4, 9, 8), (4, 9, 8), False),
    "r1 < n_H, shared": (24, 12, (4, 9, 8), (3, 7, 8), True),
    "unequal ranks": (21, 3, (2, 7, 6), (3, 5, 4), False),
    "unequal ranks, shared": (21, 3, (3, 7, 10), (2, 5, 10), True),
    "odd": (13, 3, (3, 5, 6), (2, 3, 5), False),
    "square cores": (24, 6, (4, 8, 8), (3, 8, 8), False),
    "one head": (7, 1, (1, 4, 4), (1, 3, 3), False),
}
ROTARIES = {
    "none": lambda t: None,
    "latent": lambda t: Rotary.latent(t, base=50.0),
    "interleaved": lambda t: Rotary.latent(t, base=50.0, pairing="interleaved"),
}
MASKS = ("none", "causal", "boolean", "both")
EACH_SIZE = pytest.mark.parametrize("size", SIZES)
EACH_ROTARY = pytest.mark.parametrize("rotary", ROTARIES)
EACH_MASK = pytest.mark.parametrize("mask", MASKS)


def layer_of(size, rotary) -> TuckerAttention:
    d, heads, ranks, post_ranks, shared_kv = SIZES[size]
    return with_large_weights(
        TuckerAttention(d, heads, ranks, post_ranks, shared_kv=shared_kv, rotary=ROTARIES[rotary](ranks[2]))
    )


def rules(mask, heads, batch, n) -> dict:
    """Arguments `causal` and `mask`; in the boolean mask of one sequence and one head the first query may look nowhere."""
    allowed = torch.rand(batch, heads, n, n, generator=torch.Generator().manual_seed(3)) < 0.7
    allowed[0, 0, 0] = False
    return {"causal": mask in ("causal", "both"), "mask": allowed if mask in ("boolean", "both") else None}


def naive(layer, x, **options) -> torch.Tensor:
    """Rung 10a with the layer's own parameters."""
    pre, post = ((weights.core, *weights.factors) for weights in (layer.pre, layer.post))
    return tucker_attention(x, pre, post, **{"scale": layer.scale, "rotary": layer.rotary, **options})


def output_and_gradients(function, layer, x) -> list[torch.Tensor]:
    """The output and the gradients of a fixed random projection of it, with respect to x and every parameter."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])]


def errors(layer, x, options, **other) -> list[float]:
    """Relative errors; `other`: options of the six lines alone. A gradient that vanishes is measured by the largest there is."""
    fast = output_and_gradients(lambda x: layer(x, **options), layer, x)
    slow = output_and_gradients(lambda x: naive(layer, x, **options | other), layer, x)
    norms = [b.norm().item() for b in slow]  # all nothing where the one query may look nowhere
    scales = [norm if norm > 1e-6 * max(norms) else max(norms) or 1.0 for norm in norms]
    return [((a - b).norm() / scale).item() for a, b, scale in zip(fast, slow, scales)]


@pytest.mark.no_cover
@EACH_SIZE
@EACH_ROTARY
@EACH_MASK
@pytest.mark.parametrize("batch, n", [(1, 1), (2, 7)])
def test_def_2_1_the_layer_is_the_six_lines_in_output_and_gradient(size, rotary, mask, batch, n):
    layer, x = layer_of(size, rotary), tokens(batch, n, SIZES[size][0])
    assert max(errors(layer, x, rules(mask, layer.n_heads, batch, n))) < EXACT


@pytest.mark.parametrize("size", ["r1 < n_H", "unequal ranks, shared"])
@EACH_MASK
def test_def_2_1_holds_for_63_tokens_at_positions_of_their_own(size, mask):
    layer, x = layer_of(size, "latent"), tokens(2, 63, SIZES[size][0])
    options = rules(mask, layer.n_heads, 2, 63)
    for positions in (torch.arange(63) + 5, torch.stack([torch.arange(63), 2 * torch.arange(63) - 9])):
        assert max(errors(layer, x, options | {"positions": positions})) < EXACT
    assert errors(layer, x, options | {"positions": positions}, positions=None)[0] > DIFFERENT  # control


def test_the_backends_agree_with_the_six_lines():
    layer, x = layer_of("unequal ranks", "latent"), tokens(2, 7, 21)
    for backend in ("reference", "sdpa", "math"):
        assert relative_error(layer(x, backend=backend), naive(layer, x)) < EXACT


def test_what_the_six_lines_make_is_where_the_tokens_are():
    """Fake tensors know their device, and refuse to meet one of another."""
    turned_on = []

    def rotary(latent, positions):
        turned_on.append(positions.device.type)
        return latent

    with FakeTensorMode():
        x, u1, u2, core = (torch.empty(size, device="meta") for size in ((2, 5, 8), (3, 2), (8, 4), (2, 4, 4)))
        tensor = (core, u1, u2, u2)
        assert tucker_attention(x, tensor, tensor, 0.5, rotary=rotary).device.type == "meta" and set(turned_on) == {"meta"}
        with pytest.raises(RuntimeError, match="same device"):  # control
            tucker_attention(x, tensor, tensor, 0.5, mask=torch.ones(5, 5, dtype=torch.bool))


def faults(layer, x, options) -> dict:
    """Outputs of the six lines with one thing wrong in each."""
    pre, post = ((weights.core, *weights.factors) for weights in (layer.pre, layer.post))
    head_width = Rotary.heads(2, base=50.0).repeated(layer.ranks[2] // 2)  # the same frequency in every pair
    found = {
        "wrong head order": tucker_attention(x, with_factor(pre, 1, pre[1].roll(1, 0)), post, layer.scale, **options),
        "wrong head order after the softmax": tucker_attention(
            x, pre, with_factor(post, 1, post[1].roll(1, 0)), layer.scale, **options
        ),
        "wrong scale": tucker_attention(x, pre, post, layer.ranks[2] ** -0.5, **options),
        "head-width RoPE in place of latent RoPE": naive(layer, x, **options | {"rotary": head_width}),
        "no RoPE": naive(layer, x, **options | {"rotary": None}),
    }
    if layer.ranks[1] == layer.ranks[2]:
        found["a transpose of the core"] = tucker_attention(x, with_factor(pre, 0, pre[0].mT), post, layer.scale, **options)
        found["query and key exchanged"] = tucker_attention(x, (*pre[:2], pre[3], pre[2]), post, layer.scale, **options)
        found["a missing transpose"] = tucker_attention(x, pre, with_factor(post, 0, post[0].mT), layer.scale, **options)
        found["output and value exchanged"] = tucker_attention(x, pre, (*post[:2], post[3], post[2]), layer.scale, **options)
    return found


def with_factor(tensor, place, other):
    return (*tensor[:place], other, *tensor[place + 1 :])


@EACH_MASK
@pytest.mark.parametrize("size", [name for name in SIZES if name != "one head"])
def test_controls_of_the_six_lines(size, mask):
    layer, x = layer_of(size, "latent"), tokens(2, 7, SIZES[size][0])
    options = rules(mask, layer.n_heads, 2, 7) | {"rotary": layer.rotary}
    expected, gradient = output_and_gradients(lambda x: naive(layer, x, **options), layer, x)[:2]
    assert relative_error(layer(x, **rules(mask, layer.n_heads, 2, 7)), expected) < EXACT
    x = x.requires_grad_()
    for fault, wrong in faults(layer, x, options).items():
        direction = torch.randn(wrong.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        assert relative_error(wrong, expected) > DIFFERENT, fault
        assert relative_error(torch.autograd.grad((wrong * direction).sum(), x)[0], gradient) > DIFFERENT, fault
