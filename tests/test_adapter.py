"""A layer of `tucker_ref` where a model calls its own attention: masks, caches, positions, and what it refuses to be given."""

import pytest
import torch
from helpers import relative_error

from reproduce.models.public.adapter import Adapter, layer_caches
from reproduce.models.public.layers import Turning, multi_head
from reproduce.train.public_models import open_model
from reproduce.trust import opening
from tucker_ref import MultiHeadAttention, Rotary

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")


def test_a_mask_that_is_added_to_logits_is_read_as_one_that_hides():
    torch.manual_seed(0)
    adapter = Adapter(MultiHeadAttention(24, 4), causal=True, returns_weights=False)
    x, hides = torch.randn(2, 5, 24), torch.ones(5, 5, dtype=torch.bool).tril(-1).T
    added = torch.zeros(5, 5).masked_fill(hides, torch.finfo(torch.float32).min)
    torch.testing.assert_close(adapter(x, added), adapter(x))
    assert relative_error(adapter(x, torch.zeros(5, 5)), adapter(x)) > 1e-2  # control: nothing hidden


def test_weights_that_no_attention_here_has_are_named():
    state = MultiHeadAttention(24, 4).state_dict()
    assert multi_head(state, 6, 1.0, None).d_model == 24  # control
    with pytest.raises(ValueError, match="its attention holds q_norm.weight, which is not known here"):
        multi_head(state | {"q_norm.weight": torch.ones(6)}, 6, 1.0, None)


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return Adapter(MultiHeadAttention(24, 4, rotary=Rotary.heads(6)), causal=True, returns_weights=True, limit=8)


def test_what_no_layer_knows_is_refused_and_not_dropped(adapter):
    x = torch.randn(2, 5, 24)
    assert adapter(x, position_embeddings=(x, x), use_cache=False, output_attentions=None)[1] is None  # control
    with pytest.raises(ValueError, match="this attention is given rope, which no layer here knows"):
        adapter(x, rope=torch.ones(5, 6))
    with pytest.raises(ValueError, match="numbers that are added to its logits, which no layer here knows"):
        adapter(x, torch.randn(5, 5))


def test_positions_beyond_the_frequencies_are_refused(adapter):
    x = torch.randn(2, 5, 24)
    adapter(x, position_ids=torch.arange(3, 8)[None])  # control
    adapter(x[:, :0], position_ids=torch.arange(0)[None])
    with pytest.raises(ValueError, match="position 8: from 8 on this model turns with other frequencies"):
        adapter(x, position_ids=torch.arange(4, 9)[None])


def test_the_model_may_say_that_all_is_seen(adapter):
    x = torch.randn(2, 5, 24)
    assert torch.equal(adapter(x, is_causal=False)[0], adapter.attention(x, causal=False))
    assert relative_error(adapter(x, is_causal=False)[0], adapter(x)[0]) > 1e-2  # control


def test_a_cache_of_ours_follows_beams_and_starts_anew(adapter):
    x = torch.randn(2, 5, 24)
    cache = layer_caches([adapter.attention], 2, 7)
    expected = adapter(x)[0]
    found = torch.cat([adapter(x[:, :3], past_key_values=cache)[0], adapter(x[:, 3:], past_key_values=cache)[0]], dim=1)
    torch.testing.assert_close(found, expected)
    assert cache.get_seq_length() == 5 and cache.get_max_length() == 7 and cache.get_mask_sizes(1, 0) == (6, 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    y = adapter(x[:, :1], past_key_values=cache)[0]
    alone = adapter(torch.cat([x, x[:, :1]], dim=1)[1:])[0][:, -1:]
    relative = [relative_error(y[1:], alone), relative_error(y[:1], alone)]
    assert relative[0] < 1e-5 and relative[1] > 1e-2  # the first sequence had another new token, behind the same past
    cache.reset()
    torch.testing.assert_close(adapter(x, layer_past=cache)[0], expected)


def test_partial_rotary_embedding_is_frequency_zero():
    turning = Turning(torch.tensor([1.0, 0.1], dtype=torch.float64), factor=1.5)
    rotary = turning.rotary(8)
    assert rotary.blocks == (4, 4) and rotary.frequencies.tolist() == pytest.approx([1.0, 0.1, 0, 0])
    state = {f"{name}_proj.weight": torch.randn(24, 24) for name in "qkvo"}
    part, rest = multi_head(state, 8, 1.0, turning), multi_head(state, 8, 1.0)
    ratio = (part.k_proj.weight / rest.k_proj.weight).unflatten(0, (3, 8))
    torch.testing.assert_close(ratio, torch.tensor([1.5] * 4 + [1.0] * 4)[:, None].expand(3, 8, 24))
    assert part.scale == 1.0 and multi_head(state, 4, 1.0, turning).scale == 1.5**2  # all of a head turns
    with pytest.raises(ValueError, match="turns a part of normalised heads, and multiplies it"):
        multi_head(state | {"q_norm.weight": torch.ones(8), "k_norm.weight": torch.ones(8)}, 8, 1.0, turning, eps=1e-6)


def test_frequencies_that_hold_for_short_texts_alone_are_not_used_for_long_ones(tmp_path):
    """longrope: two sets, one for texts up to the original context; the context that is said is that one."""
    longrope = next(a for a in opening.ARCHITECTURES if a.which == "longrope")
    theirs, opened = opening.save(longrope, tmp_path / "m"), open_model(str(tmp_path / "m"))
    opened.put(opened.layers)
    x = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    assert opened.context == 32 and relative_error(opened.logits(opened.model, x[:, :32]), theirs(x[:, :32]).logits) < 1e-5
    with pytest.raises(ValueError, match="position 39: from 32 on"):
        opened.logits(opened.model, x)
