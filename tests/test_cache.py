"""Rung 6: caches hold exactly the numbers that Table 1 counts, decode to the same outputs, and fail without harm."""

import sys

import pytest
import torch
from helpers import DIFFERENT, EXACT, TOLERANCE, relative_error, tokens, with_large_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tucker_ref import (
    Cache,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    backends,
    gqa_cost,
    mha_cost,
    mla_cost,
    tucker_cost,
)
from tucker_ref.attend import attend
from tucker_ref.cached_attention import keeps_cache, token_positions
from tucker_ref.no_gradient import refused, without_gradient

CASES = {  # layer, and what Table 1 says it caches
    "MHA": (lambda: MultiHeadAttention(24, 3), mha_cost(24, 3)),
    "MHA RoPE": (lambda: MultiHeadAttention(24, 3, rotary=Rotary.heads(8)), mha_cost(24, 3)),
    "MHA bias RoPE": (lambda: MultiHeadAttention(24, 3, bias=True, rotary=Rotary.heads(8)), mha_cost(24, 3)),
    "GQA RoPE": (lambda: GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4)), gqa_cost(24, 6, 2)),
    "MQA": (lambda: GroupedQueryAttention(24, 6, 1), gqa_cost(24, 6, 1)),
    "MLA": (lambda: MultiHeadLatentAttention(24, 3, 10, 8), mla_cost(24, 3, 10, 8)),
    "MLA absorbed": (lambda: MultiHeadLatentAttention(24, 3, 10, 8, absorb=True), mla_cost(24, 3, 10, 8)),
    "MLA separated": (lambda: MultiHeadLatentAttention(24, 3, 10, 8, shared_kv=False), mla_cost(24, 3, 10, 8, shared_kv=False)),
    "MLA decoupled": (
        lambda: MultiHeadLatentAttention(24, 3, 10, 8, rope_dim=4, rotary=Rotary.heads(4), latent_norm=True),
        mla_cost(24, 3, 10, 8, rope_dim=4),
    ),
    "MLA decoupled separated": (
        lambda: MultiHeadLatentAttention(24, 3, 10, 8, rope_dim=4, rotary=Rotary.heads(4), shared_kv=False, absorb=True),
        mla_cost(24, 3, 10, 8, rope_dim=4, shared_kv=False),
    ),
    "MLA coupled": (lambda: MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8)), mla_cost(24, 3, 10, 8)),
    "MLA coupled separated": (
        lambda: MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8), shared_kv=False),
        mla_cost(24, 3, 10, 8, shared_kv=False),
    ),
    "Tucker": (lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5)), tucker_cost(24, 6, (4, 9, 8), (3, 7, 5))),
    "Tucker RoPE": (
        lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8), bias=True),
        tucker_cost(24, 6, (4, 9, 8), (3, 7, 5)),
    ),
    "Tucker shared": (lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True), tucker_cost(24, 6, (4, 9, 8), shared_kv=True)),
    "MHA bias RoPE QK-norm": (
        lambda: MultiHeadAttention(24, 3, bias=True, rotary=Rotary.heads(8), qk_norm="head"),
        mha_cost(24, 3),
    ),
    "GQA RoPE QK-norm all": (
        lambda: GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4), qk_norm="all"),
        gqa_cost(24, 6, 2),
    ),
    "Tucker RoPE QK-norm all": (
        lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8), qk_norm="all"),
        tucker_cost(24, 6, (4, 9, 8), (3, 7, 5)),
    ),
    "Tucker shared QK-norm": (
        lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, qk_norm="head"),
        tucker_cost(24, 6, (4, 9, 8), shared_kv=True),
    ),
    "Tucker shared RoPE QK-norm": (
        lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, rotary=Rotary.latent(8), qk_norm="head", bias=True),
        tucker_cost(24, 6, (4, 9, 8), shared_kv=True),
    ),
    "Tucker shared RoPE": (
        lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, rotary=Rotary.latent(8)),
        tucker_cost(24, 6, (4, 9, 8), shared_kv=True),
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)
ROTATED = [name for name in CASES if "RoPE" in name or "coupled" in name]
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))


def layer_of(name):
    return with_large_weights(CASES[name][0]())


def decode(layer, x, chunks, cache, **options):
    pieces, start = [], 0
    for size in chunks:
        pieces.append(layer(x[:, start : start + size], cache=cache, **options))
        start += size
    assert start == x.shape[1] == cache.length
    return torch.cat(pieces, dim=1)


@EVERY
@DTYPES
def test_bytes_are_those_that_table_1_counts(name, dtype):
    make, cost = CASES[name]
    cache = make().to(dtype).new_cache(3, 7)
    width = torch.empty((), dtype=dtype).element_size()
    assert cache.nbytes == 3 * cost.cache_bytes(7, bytes_per_number=width)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in vars(cache)["streams"].values()}
    assert sum(storages.values()) == cache.nbytes  # nothing hides behind a view


@EVERY
@DTYPES
@pytest.mark.parametrize(
    "batch, chunks", [(1, [1]), (2, [1] * 7), (2, [7]), (1, [5, 1, 1]), (2, [3, 4, 1, 6, 2]), (1, [40, 1, 22])]
)
def test_prefill_and_decode_equal_the_full_forward(name, dtype, batch, chunks):
    layer, x = layer_of(name).to(dtype), tokens(batch, sum(chunks), 24).to(dtype)
    with torch.no_grad():
        actual = decode(layer, x, chunks, layer.new_cache(batch, sum(chunks) + 3))
        assert relative_error(actual, layer(x)) < TOLERANCE[dtype]
        if len(chunks) > 1:  # control: a cache that forgets
            forgetful = torch.cat([layer(part) for part in x.split(chunks, dim=1)], dim=1)
            assert relative_error(forgetful, layer(x)) > DIFFERENT


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 99)
)
def test_any_chunking_gives_the_same_output(name, chunks, batch, seed):
    layer, x = layer_of(name), tokens(batch, sum(chunks), 24, seed)
    assert relative_error(decode(layer, x, chunks, layer.new_cache(batch, sum(chunks))), layer(x)) < EXACT


@EVERY
def test_sequences_of_different_length_share_a_batch_by_left_padding(name):
    """Each sequence decodes as it would alone: padding is masked, and positions count from its first real token."""
    layer, lengths = layer_of(name), (9, 5, 2)
    longest = max(lengths)
    alone = [tokens(1, n, 24, seed=n) for n in lengths]
    x = torch.cat([torch.cat([tokens(1, longest - n, 24, seed=99), t], dim=1) for n, t in zip(lengths, alone)])
    padding = torch.tensor([longest - n for n in lengths])
    seen = (torch.arange(longest) >= padding[:, None])[:, None, None, :]  # (b, 1, 1, m)
    positions = (torch.arange(longest) - padding[:, None]).clamp(min=0)  # (b, n)
    cache, pieces = layer.new_cache(3, longest), []
    for start, end in ((0, 4), (4, 8), (8, 9)):
        pieces.append(layer(x[:, start:end], cache=cache, mask=seen[..., :end], positions=positions[:, start:end]))
    together = torch.cat(pieces, dim=1)
    for i, (n, t) in enumerate(zip(lengths, alone)):
        assert relative_error(together[i : i + 1, longest - n :], layer(t)) < EXACT
    shortest = together[2:, longest - 2 :]
    without_mask = decode(layer, x, [4, 4, 1], layer.new_cache(3, longest), positions=None)[2:, longest - 2 :]
    assert relative_error(without_mask, shortest) > DIFFERENT  # control


@pytest.mark.parametrize("name", ROTATED)
def test_positions_given_to_a_cache_are_kept(name):
    layer, x = layer_of(name), tokens(2, 7, 24)
    positions = torch.tensor([3, 4, 5, 9, 10, 20, 21])
    cache = layer.new_cache(2, 7)
    pieces = [layer(x[:, a:b], cache=cache, positions=positions[a:b]) for a, b in ((0, 4), (4, 6), (6, 7))]
    expected = layer(x, positions=positions)
    assert relative_error(torch.cat(pieces, dim=1), expected) < EXACT
    assert relative_error(layer(x), expected) > DIFFERENT  # control


@pytest.mark.parametrize("name", ROTATED)
def test_a_cache_that_is_used_again_forgets_old_positions(name):
    layer, x = layer_of(name), tokens(2, 6, 24)
    cache = layer.new_cache(2, 6)
    layer(x, cache=cache, positions=torch.arange(6) + 100)
    cache.truncate(0)
    pieces = [layer(part, cache=cache) for part in x.split([4, 2], dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), layer(x)) < EXACT


@EVERY
def test_errors_leave_the_cache_as_it_was(name):
    layer, x = layer_of(name), tokens(2, 8, 24)
    cache = layer.new_cache(2, 6)
    layer(x[:, :4], cache=cache)
    before = {k: t.clone() for k, t in cache.streams.items()}
    for bad, message in [
        (x[:, :3], "3 more tokens after 4 overflow a cache of max_tokens = 6"),
        (x[:1, :1], "batch first"),
        (tokens(3, 1, 24), "batch first"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(bad, cache=cache)
    for options, message in [
        (dict(backend="fast"), "backend is 'fast'"),
        (dict(mask=torch.ones(1, 3, dtype=torch.bool)), "broadcastable to"),
        (dict(mask=torch.ones(1, 5)), "must be boolean"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x[:, 4:5], cache=cache, **options)
    with pytest.raises(ValueError, match="float32; this cache holds torch.float64"):
        layer.float()(x[:, :1].float(), cache=cache)
    layer.double()
    assert cache.length == 4 and all(torch.equal(before[k], t) for k, t in cache.streams.items())
    fresh = layer_of(name)
    assert relative_error(fresh(x[:, 4:6], cache=cache), fresh(x[:, :6])[:, 4:]) < EXACT  # and it still works


def test_a_cache_of_another_layer_is_refused():
    cache = MultiHeadAttention(24, 3).double().new_cache(2, 6)
    with pytest.raises(ValueError, match="key has shape"):
        GroupedQueryAttention(24, 6, 2).double()(tokens(2, 3, 24), cache=cache)
    with pytest.raises(ValueError, match="this cache holds key, value; the layer keeps key"):
        MultiHeadLatentAttention(24, 3, 10, 8).double()(tokens(2, 3, 24), cache=cache)


@pytest.mark.parametrize("arguments", [(0, 5), (2, 0), (2, -1), (True, 5)])
def test_a_cache_needs_room(arguments):
    with pytest.raises(ValueError, match="(batch|max_tokens) is"):
        MultiHeadAttention(24, 3).new_cache(*arguments)


def test_dtype_and_device_are_the_layers_by_default():
    layer = TuckerAttention(24, 6, (4, 9, 8)).to(torch.bfloat16)
    assert {t.dtype for t in layer.new_cache(1, 2).streams.values()} == {torch.bfloat16}
    assert {t.dtype for t in layer.new_cache(1, 2, dtype=torch.float32).streams.values()} == {torch.float32}


@EVERY
@pytest.mark.parametrize("chunks", [[4], [3, 1], [1, 1, 1, 1]])
def test_a_gradient_that_is_asked_for_through_a_cache_is_an_error(name, chunks):
    """Even where nothing was stored before: half of the gradients would be right, and nobody could tell which."""
    layer, x = layer_of(name), tokens(1, 4, 24)
    pieces = [layer(part, cache=cache) for cache in [layer.new_cache(1, 4)] for part in x.split(chunks, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), layer(x)) < EXACT  # no gradient asked for: no harm
    for asked in (torch.cat(pieces, dim=1), pieces[0]):
        with pytest.raises(
            RuntimeError, match=r"through a cache, which keeps none: call the layer without .* torch.no_grad\(\)"
        ):
            asked.sum().backward(retain_graph=True)
    layer.zero_grad()
    layer(x).sum().backward()  # control: training without a cache
    assert all(p.grad is not None for p in layer.parameters())


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_costs_nothing_where_no_gradients_are_kept(name, mode):
    layer, x = layer_of(name), tokens(1, 4, 24)
    cache = layer.new_cache(1, 4)
    with mode():
        y = layer(x, cache=cache)
    assert not y.requires_grad and not any(t.requires_grad for t in cache.streams.values())


@pytest.mark.parametrize("kept, wanted", [(False, True), (True, False), (False, False)])
def test_what_is_stored_is_given_as_it_is_where_nobody_can_ask(kept, wanted):
    stored, new = torch.zeros(2, 1, 5, 3), torch.zeros(2, 1, 2, 3, requires_grad=wanted)
    with torch.set_grad_enabled(kept):
        assert without_gradient(stored, new) is stored
    assert without_gradient(stored, new.requires_grad_()).grad_fn is not None  # control


def test_a_gradient_that_needs_nothing_cached_passes():
    """Where keys and values want none, the output projection's is right."""
    layer, x = layer_of("MHA RoPE"), tokens(1, 4, 24)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.requires_grad_(False)
    layer(x).square().sum().backward()
    expected, layer.o_proj.weight.grad = layer.o_proj.weight.grad, None
    cache = layer.new_cache(1, 4)
    torch.cat([layer(part, cache=cache) for part in x.split(2, dim=1)], dim=1).square().sum().backward()
    assert relative_error(layer.o_proj.weight.grad, expected) < EXACT
    layer.k_proj.requires_grad_(True)  # control: the key's would be wrong
    with pytest.raises(RuntimeError, match="through a cache"):
        layer(x, cache=layer.new_cache(1, 4)).square().sum().backward()


def test_tensors_cached_by_hand_are_guarded_as_well():
    cache = Cache({"key": (1, 2)}, 1, 3, dtype=torch.float32, device="cpu")
    first, second = torch.ones(2, 1, 1, 1, 2, requires_grad=True).unbind()
    before = cache.append(key=first)[0]
    (found,) = cache.append(key=second)
    for asked in (found, before):
        with pytest.raises(RuntimeError, match="through a cache"):
            asked.sum().backward()
    assert not cache.append(key=torch.ones(1, 1, 1, 2))[0].requires_grad  # control: that wants none
    assert not any(t.requires_grad for t in cache.streams.values())
    meta = Cache({"key": (1, 2)}, 1, 3, dtype=torch.float32, device="meta")
    key = torch.ones(1, 1, 2, 2, device="meta", requires_grad=True)
    meta.append(key=key)[0].sum().backward()
    assert key.grad.shape == key.shape  # where nothing is computed, shapes are right


def test_a_length_is_read_and_cut_but_never_set():
    layer, x = layer_of("Tucker RoPE"), tokens(1, 6, 24)
    cache = layer.new_cache(1, 8)
    layer(x[:, :4], cache=cache)
    for length in (7, 4, 0):
        with pytest.raises(AttributeError, match="length"):
            cache.length = length
    for length in (5, 8, -1, True, 2.0, None, "2"):
        with pytest.raises(ValueError, match=f"length is {length!r}; this cache holds 4 tokens.*an integer from 0 to 4"):
            cache.truncate(length)
    assert cache.length == 4
    cache.truncate(4)
    assert relative_error(layer(x[:, 4:], cache=cache), layer(x)[:, 4:]) < EXACT
    cache.truncate(2)
    other = torch.cat([x[:, :2], x[:, 4:]], dim=1)
    again = layer(x[:, 4:], cache=cache)
    assert cache.length == 4 and relative_error(again, layer(other)[:, 2:]) < EXACT
    assert relative_error(again, layer(x)[:, 4:]) > DIFFERENT  # control: what was taken back counts


def test_positions_are_made_where_the_tokens_are():
    x = torch.empty(2, 3, 4, device="meta")
    assert token_positions(x, None, None).device.type == "meta"
    assert token_positions(torch.empty(2, 3, 4), None, None).tolist() == [0, 1, 2]
    cache = Cache({"key": (1, 4)}, 2, 5, dtype=torch.float32, device="meta", keep_positions=True)
    assert cache.positions(torch.device("meta")).device.type == "meta"
    cache.append(torch.arange(3, device="meta"), key=torch.empty(2, 1, 3, 4, device="meta"))
    cache.append(key=torch.empty(2, 1, 1, 4, device="meta"))
    assert cache.positions(torch.device("meta")).shape == (2, 4) and cache.positions(torch.device("meta")).device.type == "meta"


@EVERY
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_whatever_stops_a_forward_leaves_the_cache_as_it_was(name, stop, monkeypatch):
    layer, x = layer_of(name), tokens(2, 6, 24)
    cache = layer.new_cache(2, 6)
    layer(x[:, :4], cache=cache)

    def stopped(*_, **__):
        assert cache.length == 6  # in the middle: the tokens are stored, and attention is not yet computed
        raise stop

    module = sys.modules[next(kind.__module__ for kind in type(layer).__mro__ if "forward" in vars(kind))]
    with monkeypatch.context() as patch:
        patch.setattr(module, "attend", stopped)
        with pytest.raises(stop):
            layer(x[:, 4:], cache=cache)
    assert cache.length == 4
    assert relative_error(layer(x[:, 4:], cache=cache), layer(x)[:, 4:]) < EXACT


def test_a_forward_of_its_own_keeps_its_cache_where_it_says_so():
    class Stubborn(MultiHeadAttention):
        def forward(self, x, *, cache=None, **options):
            super().forward(x, cache=cache, **options)
            raise RuntimeError("a kernel refuses")

    class Decorated(Stubborn):
        forward = keeps_cache(Stubborn.forward)

    class Heir(Decorated):
        pass

    for kind, kept in ((Decorated, 0), (Heir, 0), (Stubborn, 2)):  # the last is the control: nothing is wrapped unseen
        layer = kind(24, 3)
        cache = layer.new_cache(1, 4)
        with pytest.raises(RuntimeError, match="a kernel refuses"), torch.no_grad():
            layer(torch.ones(1, 2, 24), cache=cache)
        assert cache.length == kept


def test_positions_are_kept_where_the_tokens_are():
    """On PyTorch's "meta" device, which refuses to meet a tensor of another one."""
    cache = Cache({"key": (1, 2)}, 3, 5, dtype=torch.float32, device="meta", keep_positions=True)
    token = torch.empty(3, 1, 1, 2, device="meta")
    for positions in (None, torch.tensor([4], device="meta"), None):
        cache.append(positions, key=token)
    assert cache.positions(token.device).shape == (3, 3) and cache.positions(token.device).is_meta


@pytest.mark.parametrize("made_in_inference", [True, False])
def test_a_cache_may_be_used_in_and_out_of_inference_mode(made_in_inference):
    layer = with_large_weights(TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, rotary=Rotary.latent(8)))
    x, places = torch.randn(2, 3, 24, dtype=torch.float64), torch.arange(3) + 5
    with torch.inference_mode(made_in_inference):
        cache = layer.new_cache(2, 8)
    with torch.inference_mode():
        first = layer(x[:, :2], cache=cache, positions=places[:2])
    with torch.no_grad():
        last = layer(x[:, 2:], cache=cache, positions=places[2:])
        expected = layer(x, positions=places)
    torch.testing.assert_close(torch.cat([first, last], dim=1), expected)


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.parametrize("name", ["MHA RoPE", "GQA RoPE", "MLA decoupled", "Tucker shared RoPE"])
def test_a_layer_compiles_into_one_graph_where_it_decodes(name):
    """In pieces, where queries are fewer than sources, and one token at a time beside a mask."""
    layer, x = layer_of(name), tokens(2, 9, 24)
    padding = (torch.arange(9) >= torch.tensor([[0], [2]]))[:, None, None, :]  # (b, 1, 1, m)
    for mask, chunks in ((None, (4, 3, 2)), (padding, (4, 2, 1, 1, 1))):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        cache, start = layer.new_cache(2, 9), 0
        with torch.no_grad():
            expected = layer(x, mask=mask)
            for size in chunks:
                end = start + size
                y = compiled(x[:, start:end], cache=cache, mask=None if mask is None else mask[..., :end])
                assert relative_error(y, expected[:, start:end]) < EXACT
                start = end


@EVERY
def test_beams_go_on_from_the_sequences_that_they_chose(name):
    layer, x = layer_of(name), tokens(3, 6, 24)
    turns = name in ROTATED
    positions = torch.arange(6) + torch.tensor([[0], [5], [20]])  # (b, n)
    rows = torch.tensor([2, 0, 0])
    cache = layer.new_cache(3, 8)
    layer(x[:, :5], cache=cache, positions=positions[:, :5] if turns else None)
    cache.reorder(rows)
    last = layer(x[:, 5:], cache=cache, positions=positions[rows][:, 5:] if turns else None)
    chosen = torch.cat([x[rows][:, :5], x[:, 5:]], dim=1)
    expected = layer(chosen, positions=positions[rows] if turns else None)[:, 5:]
    assert relative_error(last, expected) < EXACT
    assert relative_error(layer(x)[:, 5:], expected) > DIFFERENT  # control: without a new order


@pytest.mark.parametrize(
    "rows",
    [[0, 1], torch.tensor([0, 1, 2]), torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor(0)],
)
def test_an_order_that_is_none_is_refused(rows):
    cache = Cache({"key": (1, 2)}, 2, 3, dtype=torch.float32, device="cpu")
    cache.append(key=torch.arange(4.0).reshape(2, 1, 1, 2))
    with pytest.raises(ValueError, match="it must be 2 integers from 0 to 1, one per sequence"):
        cache.reorder(rows)
    assert torch.equal(cache.streams["key"][:, 0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    cache.reorder(torch.tensor([1, 1], dtype=torch.int32))  # control
    assert torch.equal(cache.streams["key"][:, 0, 0], torch.tensor([[2.0, 3.0], [2.0, 3.0]]))


@EVERY
def test_a_shorter_length_takes_tokens_back(name):
    """As speculative decoding does with guesses that were refused."""
    layer, x, guess = layer_of(name), tokens(2, 6, 24), tokens(2, 3, 24, seed=7)
    cache = layer.new_cache(2, 9)
    layer(x[:, :4], cache=cache)
    layer(guess, cache=cache)
    cache.truncate(4)
    assert relative_error(layer(x[:, 4:], cache=cache), layer(x)[:, 4:]) < EXACT


@torch.no_grad()
def test_our_kernel_may_have_a_mask_of_the_one_token_that_is_decoded(monkeypatch):
    """The kernel itself is in test_kernels.py: here another stands in its place."""

    def kernel(q, k, v, scale, causal, mask):
        return attend(q, k, v, scale=scale, causal=causal, mask=mask, backend="reference")

    monkeypatch.setattr(backends, "triton", kernel)
    layer, x, mask = layer_of("MHA RoPE"), tokens(2, 6, 24), torch.arange(6) != 1
    cache = layer.new_cache(2, 6)
    layer(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="backend 'triton' takes no mask"):  # of two tokens
        layer(x[:, 4:], cache=cache, mask=mask, backend="triton")
    layer(x[:, 4:5], cache=cache)
    y = layer(x[:, 5:], cache=cache, mask=mask, backend="triton")
    assert relative_error(y, layer(x, mask=mask)[:, 5:]) < EXACT
    assert relative_error(y, layer(x)[:, 5:]) > DIFFERENT  # control: the mask counts


def test_a_layer_may_name_its_arguments_otherwise():
    class Renamed(TuckerAttention):
        def forward(self, hidden_states, attention_mask=None, **options):
            return super().forward(hidden_states, mask=attention_mask, **options)

    layer, x = with_large_weights(Renamed(24, 6, (4, 9, 8))), tokens(2, 5, 24)
    mask, cache = torch.arange(5) != 1, layer.new_cache(2, 5)
    expected, hidden = TuckerAttention.forward(layer, x), TuckerAttention.forward(layer, x, mask=mask)
    for y, wanted in ((layer(x, mask), hidden), (layer(hidden_states=x), expected), (layer(x, cache=cache), expected)):
        assert relative_error(y, wanted) < EXACT
    assert cache.length == 5
    assert relative_error(hidden, expected) > DIFFERENT  # control: the mask counts


def test_quantised_weights_and_adapters_do_not_decide_what_a_layer_takes():
    class Quantised(torch.nn.Module):
        """Eight bits a weight, and an adapter in single precision."""

        def __init__(self, linear):
            super().__init__()
            self.bias, self.step = None, linear.weight.abs().max().item() / 127
            self.weight = torch.nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)
            self.adapter = torch.nn.Parameter(torch.zeros(linear.weight.shape))

        def forward(self, x):
            return x @ (self.weight * self.step + self.adapter).to(x.dtype).T

    layer, x = MultiHeadAttention(24, 3).bfloat16(), torch.randn(2, 5, 24).bfloat16()
    expected = layer(x)
    layer.q_proj = Quantised(layer.q_proj)
    assert next(layer.parameters()).dtype == torch.int8  # control: what comes first would not do
    torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="x is torch.float16"):
        layer(x.half())
    assert layer.new_cache(2, 5).streams["key"].dtype == torch.float32  # the adapter's, of all that can be a cache's the first
    assert layer.new_cache(2, 5, dtype=torch.bfloat16).streams["key"].dtype == torch.bfloat16
    for name in [name for name, _ in layer.named_parameters()]:
        module, _, parameter = name.rpartition(".")
        value = layer.get_parameter(name).detach()
        delattr(layer.get_submodule(module), parameter)
        setattr(layer.get_submodule(module), parameter, value)
    assert layer.new_cache(2, 5).streams["key"].dtype == torch.float32  # a layer without parameters


def test_a_compiler_knows_the_shape_of_a_gradient_and_does_not_meet_the_refusal():
    assert refused(torch.empty(2, 3, device="meta")).shape == (2, 3)
    with pytest.raises(RuntimeError, match="a gradient is asked for through a cache"):
        refused(torch.empty(2, 3))
