"""Rung 5: rotary embedding: what it is, what its constructors promise, and Lemma B.5: only distances matter."""

import cmath
import math

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tucker_ref import (
    GroupedQueryAttention,
    Llama3Scaling,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
)
from tucker_ref.held import Held
from tucker_ref.rope_frequencies import _device, cos_sin, joined

PLACES = torch.tensor([0, 1, 5, 1000, 131_071])


def by_hand(rotary: Rotary, x: torch.Tensor, positions) -> torch.Tensor:
    """Every pair as a complex number, multiplied by exp(i position frequency), one by one."""
    y, pair, start = x.clone(), 0, 0
    for block in rotary.blocks:
        for j in range(block // 2):
            a, b = (start + j, start + j + block // 2) if rotary.pairing == "half" else (start + 2 * j, start + 2 * j + 1)
            for n, position in enumerate(positions):
                turned = complex(x[n, a], x[n, b]) * cmath.exp(1j * float(position) * float(rotary.frequencies[pair]))
                y[n, a], y[n, b] = turned.real, turned.imag
            pair += 1
        start += block
    return y


ALL = {
    "heads": lambda: Rotary.heads(8),
    "heads-interleaved": lambda: Rotary.heads(8, pairing="interleaved"),
    "groups": lambda: Rotary.groups(4, 3, base=500.0),
    "groups-interleaved": lambda: Rotary.groups(4, 3, pairing="interleaved"),
    "latent": lambda: Rotary.latent(10),
    "decoupled": lambda: Rotary.decoupled(6, 4),
    "decoupled-interleaved": lambda: Rotary.decoupled(6, 4, pairing="interleaved"),
    "llama3": lambda: Rotary.heads(16, base=500000.0, scaling=Llama3Scaling()),
}
EVERY = pytest.mark.parametrize("name", ALL)


@EVERY
def test_it_multiplies_complex_numbers(name):
    rotary = ALL[name]()
    x = tokens(1, 5, rotary.width)[0]
    assert relative_error(rotary(x[None], PLACES)[0], by_hand(rotary, x, PLACES)) < EXACT
    assert relative_error(rotary(x[None], PLACES + 1)[0], by_hand(rotary, x, PLACES)) > DIFFERENT  # control


@EVERY
def test_eq_10_turning_composes_to_distances(name):
    """<R(m) q, R(n) k> = <R(m - n) q, k>."""
    rotary = ALL[name]()
    q, k = tokens(2, 5, rotary.width)
    m, n = PLACES, PLACES.flip(0)
    both = (rotary(q[None], m) * rotary(k[None], n)).sum(-1)
    once = (rotary(q[None], m - n) * k[None]).sum(-1)
    assert relative_error(both, once) < EXACT
    assert relative_error((rotary(q[None], m + 1) * rotary(k[None], n)).sum(-1), once) > DIFFERENT  # control


@EVERY
def test_lengths_are_kept_and_position_zero_does_nothing(name):
    rotary = ALL[name]()
    x = tokens(1, 5, rotary.width)
    assert relative_error(rotary(x, PLACES).norm(dim=-1), x.norm(dim=-1)) < EXACT
    assert torch.equal(rotary(x, torch.zeros(5, dtype=torch.long)), x)


@pytest.mark.parametrize("blocks", [(8,), (4, 4, 4), (6, 4)])
def test_the_two_pairings_differ_by_a_permutation_of_channels(blocks):
    frequencies = torch.rand(sum(blocks) // 2, dtype=torch.float64)
    half, interleaved = (Rotary(frequencies, pairing, blocks) for pairing in ("half", "interleaved"))
    order, start = [], 0  # interleaved channel 2j is half's j, 2j + 1 is half's j + block/2
    for block in blocks:
        order += [start + (j // 2) + (j % 2) * block // 2 for j in range(block)]
        start += block
    x = tokens(1, 5, sum(blocks))
    assert relative_error(interleaved(x[..., order], PLACES), half(x, PLACES)[..., order]) < EXACT
    assert relative_error(interleaved(x, PLACES), half(x, PLACES)) > DIFFERENT  # control: without the permutation


def test_constructors_have_the_schedules_they_promise():
    theta = lambda width: 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # noqa: E731
    assert torch.equal(Rotary.heads(8).frequencies, theta(8))
    assert torch.equal(Rotary.groups(8, 3).frequencies, theta(8).repeat(3))
    assert torch.equal(Rotary.latent(24).frequencies, theta(24))
    assert torch.equal(Rotary.decoupled(6, 8).frequencies, torch.cat([torch.zeros(3), theta(8)]))
    assert Rotary.groups(8, 3).width == Rotary.latent(24).width == 24
    assert not torch.equal(Rotary.groups(8, 3).frequencies, Rotary.latent(24).frequencies)  # not the same thing


def test_frequencies_given_as_numbers_keep_all_their_digits():
    assert Rotary([0.1, 1 / 3]).frequencies.tolist() == [0.1, 1 / 3]
    with torch.device("meta"):  # where a layer is built that will be loaded: values must not be lost
        assert Rotary([0.1, 1 / 3]).frequencies.tolist() == [0.1, 1 / 3]
    assert Rotary(torch.tensor([0.1])).frequencies.dtype == torch.float64


def test_groups_turn_each_key_head_as_heads_would():
    x = tokens(1, 5, 12)
    each = torch.cat([Rotary.heads(4)(part, PLACES) for part in x.split(4, dim=-1)], dim=-1)
    assert relative_error(Rotary.groups(4, 3)(x, PLACES), each) < EXACT
    assert relative_error(Rotary(Rotary.groups(4, 3).frequencies)(x, PLACES), each) > DIFFERENT  # control: pairs across heads


def test_decoupled_leaves_the_latent_alone():
    x = tokens(1, 5, 10)
    y = Rotary.decoupled(6, 4)(x, PLACES)
    assert torch.equal(y[..., :6], x[..., :6])
    assert relative_error(y[..., 6:], Rotary.heads(4)(x[..., 6:], PLACES)) < EXACT


def test_llama3_scaling_keeps_fast_and_slows_slow_frequencies():
    plain, scaled = (
        Rotary.heads(64, base=500000.0).frequencies,
        Rotary.heads(64, base=500000.0, scaling=Llama3Scaling()).frequencies,
    )
    ratio = scaled / plain
    assert (
        ratio[0] == 1
        and ratio[-1] == pytest.approx(1 / 8)
        and (ratio.diff() <= 0).all()
        and ((ratio > 0.13) & (ratio < 0.99)).any()
    )


@pytest.mark.parametrize("make", [Rotary.heads, Rotary.latent, lambda *a: Rotary.groups(a[0] // 2, 2, *a[1:])])
def test_scaling_and_pairing_reach_the_schedule(make):
    """Llama 3.1 by its own words: wavelengths above context / low are stretched, those below context / high kept."""
    scaling = Llama3Scaling(factor=4.0, low_frequency_factor=2.0, high_frequency_factor=5.0, original_context=300)
    made, plain = make(16, 300.0, "interleaved", scaling), make(16, 300.0, "interleaved")
    assert made.pairing == "interleaved" and not torch.equal(plain.frequencies, make(16, 400.0).frequencies)
    for ours, theta in zip(made.frequencies.tolist(), plain.frequencies.tolist()):
        wavelength = 2 * math.pi / theta
        if wavelength > 300 / 2:
            expected = theta / 4
        elif wavelength < 300 / 5:
            expected = theta
        else:
            smooth = (300 / wavelength - 2) / (5 - 2)
            expected = (1 - smooth) * theta / 4 + smooth * theta
        assert ours == pytest.approx(expected, rel=1e-12)
    spread = made.frequencies / plain.frequencies
    assert {spread.min().item(), spread.max().item()} == {0.25, 1.0} and len(spread.unique()) > 2  # all three kinds are there


def test_constructors_have_the_defaults_of_the_llama_family():
    assert torch.equal(Rotary.heads(8).frequencies, Rotary.heads(8, 10000.0, "half", None).frequencies)
    for plain, said in (
        (Rotary.groups(8, 2), Rotary.groups(8, 2, 10000.0, "half")),
        (Rotary.latent(8), Rotary.latent(8, 10000.0, "half")),
        (Rotary.decoupled(4, 8), Rotary.decoupled(4, 8, 10000.0, "half")),
        (Rotary([1.0, 2.0]), Rotary([1.0, 2.0], "half", (4,))),
    ):
        assert torch.equal(plain.frequencies, said.frequencies)
        assert (plain.pairing, plain.blocks) == (said.pairing, said.blocks) and plain.pairing == "half"
    defaults = Llama3Scaling()
    assert defaults == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    decoupled = Rotary.decoupled(4, 8, 50.0, "interleaved", Llama3Scaling(original_context=64))
    assert decoupled.pairing == "interleaved" and decoupled.blocks == (4, 8)
    assert torch.equal(decoupled.frequencies[2:], Rotary.heads(8, 50.0, scaling=Llama3Scaling(original_context=64)).frequencies)


def test_scaling_and_base_take_any_positive_number():
    assert Llama3Scaling(factor=0.5, original_context=1).factor == 0.5  # a shorter context is a choice too
    assert torch.equal(Rotary.heads(4, 0.25).frequencies, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert torch.equal(Rotary.heads(4, 1).frequencies, torch.ones(2, dtype=torch.float64))
    for bad in (dict(low_frequency_factor=0.0), dict(original_context=0), dict(factor=0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            Llama3Scaling(**bad)


def test_frequencies_follow_the_device(monkeypatch):
    assert Rotary.heads(4).to("meta").frequencies.device.type == "meta"
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda:7"))
    assert _device() == torch.device("cuda:7")
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("meta"))
    assert _device() == torch.device("cpu")  # values must not be lost


def test_frequencies_come_back_from_the_meta_device():
    """A layer that was moved there and given memory again has no values but these."""
    layer, x = with_large_weights(MultiHeadAttention(24, 3, rotary=Rotary.heads(8))), tokens(2, 5, 24)
    emptied = MultiHeadAttention(24, 3, rotary=Rotary.heads(8)).double().to("meta").to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    assert relative_error(emptied(x), layer(x)) < EXACT
    emptied.rotary.frequencies.zero_()
    assert relative_error(emptied(x), layer(x)) > DIFFERENT  # control


@pytest.mark.parametrize(
    "frequencies, why",
    [(torch.ones(2, 2), r"shape \(2, 2\); it"), ([1.0, float("nan")], r"shape \(2,\), NaN or infinity among them; it")],
)
def test_frequencies_are_refused_for_what_is_wrong_with_them(frequencies, why):
    with pytest.raises(ValueError, match=f"^frequencies has {why} must be a list of finite numbers"):
        Rotary(frequencies)


def test_frequencies_are_constants_of_their_own():
    given = torch.tensor([1.0, 0.1], dtype=torch.float64)
    rotary = Rotary(given)
    given.zero_()
    assert rotary.frequencies.tolist() == [1.0, 0.1]
    assert not rotary.state_dict()  # a checkpoint of a model without them can be loaded


def test_what_is_looked_up_turns_as_what_is_computed():
    rotary, x, positions = Rotary.groups(4, 3), tokens(2, 5, 12), torch.tensor([0, 6, 1, 3, 3])
    expected = rotary(x, positions)
    with Held(rotary, 7, torch.float64):
        assert torch.equal(rotary(x, positions), expected)
        rotary.table = rotary.table[::-1]
        assert relative_error(rotary(x, positions), expected) > DIFFERENT  # control


def test_one_block_alone_is_not_copied():
    x = tokens(1, 5, 4)
    assert joined([x]) is x and torch.equal(joined([x, 2 * x]), torch.cat([x, 2 * x], dim=-1))


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_a_compiler_knows_what_cosines_and_sines_are_like(shape):
    """Fake tensors take the operator's word for shapes and dtypes; what it computes must keep it."""
    given = torch.zeros(shape, dtype=torch.int64), Rotary.heads(8).frequencies
    real = cos_sin(*given, torch.float32)
    with FakeTensorMode() as mode:
        said = cos_sin(*map(mode.from_tensor, given), torch.float32)
    assert [(t.shape, t.dtype) for t in said] == [(t.shape, t.dtype) for t in real] == 2 * [((*shape, 4), torch.float32)]


def test_positions_may_differ_between_sequences():
    rotary, x = Rotary.heads(8), tokens(2, 5, 8)
    positions = torch.stack([PLACES, PLACES + 3])
    expected = torch.cat([rotary(x[:1], positions[0]), rotary(x[1:], positions[1])])
    assert torch.equal(rotary(x, positions), expected)
    heads = x[:, None].expand(-1, 3, -1, -1)  # (b, h, n, k)
    assert torch.equal(rotary(heads, positions), expected[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(rotary(x[0], PLACES), expected[0])  # of one sequence alone, which has one list of positions
    with pytest.raises(ValueError, match=r"^positions has shape \(5, 5\) on cpu; x \(5, 8\) on cpu needs \(5,\)$"):
        rotary(x[0], PLACES.expand(5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_keep_their_digits_whatever_the_layer_is_cast_to(dtype):
    layer = MultiHeadAttention(16, 2, rotary=Rotary.heads(8)).to(dtype)
    assert torch.equal(layer.rotary.frequencies, Rotary.heads(8).frequencies)
    x = tokens(1, 5, 8)
    far = layer.rotary(x.to(dtype), PLACES)
    assert (
        far.dtype == dtype
        and relative_error(far, Rotary.heads(8)(x, PLACES)) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    )


def turned_by_hand(x: torch.Tensor, base: float) -> torch.Tensor:
    """The usual schedule on half-split pairs of the last axis of (b, n, width), as complex numbers; written without Rotary."""
    n, width = x.shape[1:]
    angles = torch.arange(n, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def causal_attention(q, k, v, scale):
    logits = q @ k.mT * scale
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("shared_kv", [True, False])
def test_cor_3_2_1_mla_with_coupled_rope_is_its_formula(shared_kv):
    """Eqs. 13, 14, 20: per head, the fused query X W^DQ W^UQ W^UK^T and the latent X W^DKV turn at the latent's width."""
    layer = with_large_weights(MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8, base=50.0), shared_kv=shared_kv))
    x, expected = tokens(2, 7, 24), 0
    c_k = x @ layer.kv_a_proj_with_mqa.weight.T
    c_v = c_k if shared_kv else x @ layer.v_a_proj.weight.T
    for h in range(3):
        w_uq, up = layer.q_b_proj.weight[8 * h : 8 * h + 8], layer.kv_b_proj.weight[16 * h : 16 * h + 16]
        q = x @ layer.q_a_proj.weight.T @ w_uq.T @ up[:8]
        z = causal_attention(turned_by_hand(q, 50.0), turned_by_hand(c_k, 50.0), c_v @ up[8:].T, 8**-0.5)
        expected = expected + z @ layer.o_proj.weight[:, 8 * h : 8 * h + 8].T
    assert relative_error(layer(x), expected) < EXACT
    layer.scale = 10**-0.5
    assert relative_error(layer(x), expected) > DIFFERENT  # control: another scale


def test_mla_with_decoupled_rope_is_its_formula():
    layer = with_large_weights(MultiHeadLatentAttention(24, 3, 10, 9, rope_dim=4, rotary=Rotary.heads(4, base=50.0)))
    x, expected = tokens(2, 7, 24), 0
    c_kv, k_rope = (x @ layer.kv_a_proj_with_mqa.weight.T).split([9, 4], dim=-1)
    for h in range(3):
        q, q_rope = (x @ layer.q_a_proj.weight.T @ layer.q_b_proj.weight[12 * h : 12 * h + 12].T).split([8, 4], dim=-1)
        up = layer.kv_b_proj.weight[16 * h : 16 * h + 16]
        q, k = torch.cat([q, turned_by_hand(q_rope, 50.0)], -1), torch.cat([c_kv @ up[:8].T, turned_by_hand(k_rope, 50.0)], -1)
        expected = expected + causal_attention(q, k, c_kv @ up[8:].T, 12**-0.5) @ layer.o_proj.weight[:, 8 * h : 8 * h + 8].T
    assert relative_error(layer(x), expected) < EXACT
    layer.scale = 8**-0.5
    assert relative_error(layer(x), expected) > DIFFERENT  # control: the scale without the rotary channels


@pytest.mark.parametrize("shared_kv", [True, False])
def test_def_3_1_tucker_with_latent_rope_is_its_formula(shared_kv):
    """Eq. 12: every head's latent query and the shared key turn at width r3; the scale stays 1/sqrt(d_H)."""
    layer = with_large_weights(TuckerAttention(24, 6, (4, 9, 8), shared_kv=shared_kv, rotary=Rotary.latent(8, base=50.0)))
    x, expected = tokens(2, 7, 24), 0
    key = turned_by_hand(x @ layer.pre.key, 50.0)
    for before, after in zip(layer.pre.head_cores(), layer.post.head_cores()):
        q = turned_by_hand(x @ layer.pre.query @ before, 50.0)
        z = causal_attention(q, key, x @ layer.post.value, 4**-0.5)
        expected = expected + z @ after.T @ layer.post.output.T
    assert relative_error(layer(x), expected) < EXACT
    layer.rotary = Rotary.latent(8, base=60.0)
    assert relative_error(layer(x), expected) > DIFFERENT  # control: another base


@pytest.mark.parametrize("name", ["MHA", "MLA coupled", "Tucker", "Tucker shared"])
def test_layers_built_without_memory_work_once_they_are_loaded(name):
    """torch.device("meta"), to_empty, load_state_dict: tables of the rotary embedding and shared latents must survive."""
    layer, x = with_large_weights(LAYERS[name]()), tokens(2, 7, 24)
    with torch.device("meta"):
        other = LAYERS[name]()
    assert other(torch.empty(2, 7, 24, device="meta")).shape == (2, 7, 24)  # shapes alone, as to count what it will cost
    other = other.to_empty(device="cpu").double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    if name == "Tucker shared":
        assert other.post.value is other.pre.key
        other.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
        assert other.post.value is other.pre.key and torch.equal(other(x), layer(x))


LAYERS = {
    "MHA": lambda: MultiHeadAttention(24, 3, rotary=Rotary.heads(8)),
    "GQA": lambda: GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4, pairing="interleaved")),
    "MLA decoupled": lambda: MultiHeadLatentAttention(24, 3, 10, 8, rope_dim=4, rotary=Rotary.heads(4)),
    "MLA coupled": lambda: MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8)),
    "MLA coupled separated": lambda: MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8), shared_kv=False),
    "Tucker": lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8)),
    "Tucker shared": lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, rotary=Rotary.latent(8)),
}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 5000), st.booleans(), st.integers(0, 99))
def test_lemma_b5_only_distances_between_positions_matter(name, shift, causal, seed):
    layer, x = with_large_weights(LAYERS[name](), seed), tokens(2, 7, 24, seed)
    positions = torch.tensor([0, 1, 2, 5, 9, 11, 40])
    expected = layer(x, causal=causal, positions=positions)
    assert relative_error(layer(x, causal=causal, positions=positions + shift), expected) < 1e-10  # far angles lose two digits
    stretched = layer(x, causal=causal, positions=2 * positions)
    assert relative_error(stretched, expected) > DIFFERENT  # control: other distances, other output


@pytest.mark.parametrize("name", LAYERS)
def test_default_positions_count_from_zero(name):
    layer, x = with_large_weights(LAYERS[name]()), tokens(2, 7, 24)
    assert torch.equal(layer(x), layer(x, positions=torch.arange(7)))
    assert torch.equal(layer(x), layer(x, positions=torch.arange(7).repeat(2, 1)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "positions, message",
    [
        (torch.arange(6), r"int64 \(6,\); it must be integers of shape \(7,\) or \(2, 7\)"),
        (torch.arange(7.0), "float32"),
        (torch.ones(7, dtype=torch.bool), "bool"),
        (torch.zeros(3, 7, dtype=torch.long), r"\(3, 7\)"),
    ],
)
def test_bad_positions_are_named(name, positions, message):
    with pytest.raises(ValueError, match=f"positions is .*{message}"):
        LAYERS[name]().double()(tokens(2, 7, 24), positions=positions)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rotary.heads(7), "rotary width is 7.*even"),
        (lambda: Rotary.latent(9), "rotary width is 9"),
        (lambda: Rotary.groups(5, 2), "rotary width is 5"),
        (lambda: Rotary.groups(4, 0), "n_kv_heads is 0"),
        (lambda: Rotary.decoupled(5, 4), "kv_rank is 5.*even"),
        (lambda: Rotary.heads(8, base=-1.0), "base is -1.0"),
        (lambda: Rotary.heads(8, pairing="both"), "pairing is 'both'.*half, interleaved"),
        (lambda: Rotary([]), "frequencies has shape"),
        (lambda: Rotary([1.0, float("nan")]), "finite"),
        (lambda: Rotary(torch.ones(2, requires_grad=True)), "frequencies requires a gradient; they are constants"),
        (
            lambda: Rotary(torch.ones(2, device="meta")),
            "frequencies holds no values .it is on the meta device.; they are constants",
        ),
        (lambda: Rotary([1.0, 2.0], blocks=(2, 4)), r"blocks \(2, 4\) add up to 6"),
        (lambda: Rotary([1.0, 2.0], blocks=(3, 1)), "a block's width is 3"),
        (lambda: Rotary.heads(8)(torch.ones(1, 2, 6), torch.arange(2)), "x has width 6.*turns 8"),
        (lambda: MultiHeadAttention(24, 3, rotary=Rotary.heads(6)), "rotary turns 6 channels.*head_dim = 8"),
        (lambda: TuckerAttention(24, 3, (2, 4, 6), rotary=Rotary.latent(8)), r"ranks\[2\] = 6"),
        (lambda: MultiHeadLatentAttention(24, 3, 6, 8, rotary=Rotary.latent(6)), "kv_rank = 8"),
        (lambda: MultiHeadLatentAttention(24, 3, 6, 8, rope_dim=4, rotary=Rotary.latent(8)), "rope_dim = 4"),
        (lambda: MultiHeadLatentAttention(24, 3, 6, 8, rope_dim=4), "rope_dim is 4.*Rotary.heads"),
        (lambda: MultiHeadLatentAttention(24, 3, 6, 8, rope_dim=-2), "rope_dim is -2"),
        (lambda: MultiHeadAttention(24, 3, bias="yes"), "bias is 'yes'"),
        (lambda: TuckerAttention(24, 3, (2, 4, 4), bias="qkv"), "^bias is 'qkv'; it must be False or True$"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_compiler_knows_the_shapes_of_cosines_and_sines():
    given = (torch.arange(10).view(2, 5), torch.rand(3, dtype=torch.float64), torch.float32)
    torch.library.opcheck(cos_sin, given, test_utils="test_faketensor")
