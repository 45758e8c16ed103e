"""Beside rung 6: steps that all look alike give what a growing cache and no cache give, compiled or not, in every mechanism."""

import copy

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from test_cache import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

from tucker_ref import MultiHeadAttention
from tucker_ref.attend import attend
from tucker_ref.held import Held
from tucker_ref.no_gradient import without_gradient
from tucker_ref.static_cache import StaticCache

EVERY = pytest.mark.parametrize("name", CASES)


def layer_of(name: str):
    torch.manual_seed(0)
    return with_large_weights(CASES[name][0]().double())


def after_prompt(layer, x, prompt: int, places: int, device: str | None = None) -> tuple[StaticCache, torch.Tensor]:
    """A static cache that holds the first tokens of x, and its place."""
    cache = layer.new_cache(len(x), places)
    layer(x[:, :prompt], cache=cache)
    place = torch.tensor([prompt], device=device)
    return StaticCache(cache, place), place


def stepped(layer, cache: StaticCache, x: torch.Tensor) -> torch.Tensor:
    steps = []
    for part in x.split(len(cache.place), dim=1):
        steps.append(layer(part, cache=cache, mask=cache.seen(), positions=cache.place))
        cache.place += len(cache.place)
    return torch.cat(steps, dim=1)


@EVERY
@torch.no_grad()
def test_equal_steps_give_what_no_cache_gives(name):
    layer, x = layer_of(name), tokens(2, 12, 24)
    expected = layer(x)[:, 5:]
    cache, place = after_prompt(layer, x, 5, 15)  # three places stay empty
    assert relative_error(stepped(layer, cache, x[:, 5:]), expected) < EXACT
    with Held(layer, 15, torch.float64):
        cache, place = after_prompt(layer, x, 5, 15)
        assert relative_error(stepped(layer, cache, x[:, 5:]), expected) < EXACT
    cache, place = after_prompt(layer, x, 5, 15)
    place -= 3  # control: three tokens are written over
    assert relative_error(stepped(layer, cache, x[:, 5:]), expected) > DIFFERENT


@EVERY
@torch.no_grad()
def test_sequences_that_begin_later_have_positions_of_their_own(name):
    layer, x, late = layer_of(name), tokens(2, 9, 24), torch.tensor([0, 2])
    positions = (torch.arange(9) - late[:, None]).clamp(min=0)
    real = torch.arange(9) >= late[:, None]
    cache = layer.new_cache(2, 9)
    layer(x[:, :6], cache=cache, mask=real[:, None, None, :6], positions=positions[:, :6])
    static = StaticCache(cache, torch.tensor([6]))
    steps = []
    for n in range(6, 9):
        mask = (static.seen() & real)[:, None, None]
        steps.append(layer(x[:, n : n + 1], cache=static, mask=mask, positions=positions[:, n : n + 1]))
        static.place += 1
    y = torch.cat(steps, dim=1)
    assert relative_error(y[:1], layer(x[:1])[:, 6:]) < EXACT
    assert relative_error(y[1:], layer(x[1:, 2:])[:, 4:]) < EXACT
    assert relative_error(y[1:], layer(x[1:])[:, 6:]) > DIFFERENT  # control


@pytest.mark.parametrize("name", ["MHA RoPE", "MLA coupled", "Tucker shared RoPE"])
@torch.no_grad()
def test_several_tokens_at_once_and_positions_by_default(name):
    layer, x = layer_of(name), tokens(2, 11, 24)
    cache = layer.new_cache(2, 12)
    layer(x[:, :5], cache=cache)
    static = StaticCache(cache, torch.tensor([5, 6, 7]))
    steps = []
    for part in x[:, 5:].split(3, dim=1):
        steps.append(layer(part, cache=static, mask=static.seen()))
        static.place += 3
    assert relative_error(torch.cat(steps, dim=1), layer(x)[:, 5:]) < EXACT


@torch.no_grad()
def test_positions_may_leap_after_a_prompt_without_any():
    layer, x = layer_of("Tucker shared RoPE"), tokens(2, 6, 24)
    cache, place = after_prompt(layer, x, 4, 6)
    positions = torch.tensor([0, 1, 2, 3, 7, 9])
    steps = []
    for n in (4, 5):
        steps.append(layer(x[:, n : n + 1], cache=cache, mask=cache.seen(), positions=positions[n : n + 1]))
        place += 1
    assert relative_error(torch.cat(steps, dim=1), layer(x, positions=positions)[:, 4:]) < EXACT
    assert relative_error(torch.cat(steps, dim=1), layer(x)[:, 4:]) > DIFFERENT  # control


@pytest.mark.parametrize("name", ["MHA RoPE", "MLA coupled", "Tucker shared RoPE"])
@torch.no_grad()
def test_refused_rows_leave_it_as_it_was(name):
    layer, x = layer_of(name), tokens(2, 6, 24)
    expected = layer(x)[:, 4:]
    cache, _ = after_prompt(layer, x, 4, 8)
    for rows in (torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="rows is"):
            cache.reorder(rows)
        assert cache.length == 7
    assert relative_error(stepped(layer, cache, x[:, 4:]), expected) < EXACT
    cache, _ = after_prompt(layer, x, 4, 8)
    cache.reorder(torch.tensor([1, 0]))  # control: other sequences go on
    assert relative_error(stepped(layer, cache, x[:, 4:]), expected) > DIFFERENT


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["MHA RoPE", "MLA coupled", "Tucker shared RoPE"])
@torch.no_grad()
def test_places_and_positions_are_integers_of_any_kind(name, kind):
    layer, x, positions = layer_of(name), tokens(2, 6, 24), torch.tensor([0, 1, 2, 3, 7, 9])
    for given, expected in ((positions.to(kind), layer(x, positions=positions)), (None, layer(x))):
        cache = layer.new_cache(2, 8)
        layer(x[:, :4], cache=cache)
        static, steps = StaticCache(cache, torch.tensor([4], dtype=kind)), []
        for n in (4, 5):
            at = None if given is None else given[n : n + 1]
            steps.append(layer(x[:, n : n + 1], cache=static, mask=static.seen(), positions=at))
            static.place += 1
        assert relative_error(torch.cat(steps, dim=1), expected[:, 4:]) < EXACT
    assert relative_error(layer(x, positions=positions)[:, 4:], expected[:, 4:]) > DIFFERENT  # control: positions count


@pytest.mark.parametrize("name", ["MHA RoPE", "MLA coupled", "Tucker shared RoPE"])
def test_one_made_in_inference_mode_serves_outside_of_it(name):
    layer, x = layer_of(name), tokens(2, 6, 24)
    place = torch.tensor([4])
    with torch.inference_mode():
        assert torch.arange(2).is_inference()  # control: what is made here cannot be written outside
        cache = layer.new_cache(2, 8)
        layer(x[:, :4], cache=cache)
        static = StaticCache(cache, place)
    with torch.no_grad():
        assert relative_error(stepped(layer, static, x[:, 4:]), layer(x)[:, 4:]) < EXACT


def test_where_to_go_on_is_written_on_the_device_of_the_place():
    cache, place = after_prompt(layer_of("MHA RoPE"), tokens(2, 6, 24), 4, 6)
    with torch.device("meta"):  # whatever is made elsewhere holds nothing
        assert torch.arange(2).is_meta  # control
        cache.truncate(2)
    assert place.tolist() == [2]


@pytest.mark.parametrize("name", ["MHA RoPE", "Tucker shared RoPE"])
@torch.no_grad()
def test_it_is_where_the_cache_is_whatever_the_default_device(name):
    layer, x = layer_of(name), tokens(2, 6, 24)
    expected = layer(x)[:, 4:]
    with torch.device("meta"):  # what is made there by default holds no values
        cache, _ = after_prompt(layer, x, 4, 6, device="cpu")
        assert cache.seen().device.type == cache.positions(torch.device("cpu")).device.type == "cpu"
        assert relative_error(stepped(layer, cache, x[:, 4:]), expected) < EXACT


@pytest.mark.no_cover
@EVERY
@torch.no_grad()
def test_all_steps_are_one_compilation_that_breaks_nowhere(name):
    layer, x, graphs = layer_of(name), tokens(2, 9, 24), []
    expected = layer(x)[:, 4:]

    def counted(graph, _examples):
        graphs.append(graph)
        return graph.forward

    with Held(layer, 10, torch.float64):
        cache, _ = after_prompt(layer, x, 4, 10)
        steps = stepped(torch.compile(layer, backend=counted, fullgraph=True, dynamic=False), cache, x[:, 4:])
    assert relative_error(steps, expected) < EXACT and len(graphs) == 1
    grows = layer.new_cache(2, 10)  # control: what grows is compiled again
    compiled = torch.compile(layer, backend=counted, fullgraph=True, dynamic=False)
    for part in x[:, :2].split(1, dim=1):
        compiled(part, cache=grows)
    assert len(graphs) > 2


@torch.no_grad()
def test_a_step_mixes_no_core(monkeypatch):
    layer, x, calls = layer_of("Tucker RoPE"), tokens(2, 6, 24), []
    einsum = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda how, *a: calls.append(how) or einsum(how, *a))
    held = Held(layer, 6, torch.float64)
    assert calls.count("rst,hr->hst") == 2
    with held:
        layer(x)
        assert calls.count("rst,hr->hst") == 2
    layer(x)  # control: outside they are mixed again
    assert calls.count("rst,hr->hst") == 4 and layer.rotary.table is None


@torch.no_grad()
def test_what_is_held_is_what_was_there_and_shared_by_layers_that_turn_alike():
    layer, x = layer_of("Tucker shared RoPE"), tokens(2, 6, 24)
    both = torch.nn.ModuleList([layer, copy.deepcopy(layer)])
    held, expected = Held(both, 6, torch.float64), layer(x)
    tables = [value for _, name, value in held.values if name == "table"]
    assert len(tables) == 2 and tables[0] is tables[1]
    for parameter in (layer.pre.core, layer.pre.head, layer.pre.query, layer.pre.key, layer.post.core, layer.post.head):
        parameter.mul_(2.0)
    with held:
        assert relative_error(layer(x), expected) < EXACT
    assert relative_error(layer(x), expected) > DIFFERENT  # control
    assert layer.pre.held_cores is layer.pre.held_factors is layer.post.held_cores is None


@torch.no_grad()
def test_a_static_cache_needs_a_mask_and_is_left_where_it_was():
    layer, x = layer_of("MHA RoPE"), tokens(2, 6, 24)
    cache, place = after_prompt(layer, x, 4, 6)
    with pytest.raises(ValueError, match="a static cache is read as a whole; it needs a mask over its max_tokens places"):
        layer(x[:, 4:5], cache=cache)
    with pytest.raises(ValueError, match="positions has shape"):
        layer(x[:, :2], cache=cache, mask=torch.ones(2, 7, dtype=torch.bool))
    assert place.tolist() == [4]
    expected = layer(x)[:, 4:]
    assert relative_error(stepped(layer, cache, x[:, 4:]), expected) < EXACT
    cache.truncate(5)
    assert relative_error(stepped(layer, cache, x[:, 5:]), expected[:, 1:]) < EXACT
    with pytest.raises(ValueError, match="length is 6"):
        cache.truncate(6)


@pytest.mark.parametrize("name", ["MHA RoPE", "Tucker shared RoPE"])
@torch.no_grad()
def test_sequences_go_on_from_others(name):
    layer, x = layer_of(name), tokens(3, 8, 24)
    cache, place = after_prompt(layer, x, 7, 8)
    expected = stepped(layer, cache, x[:, 7:])
    place -= 1
    cache.reorder(torch.tensor([2, 0, 0]))
    again = stepped(layer, cache, x[[2, 0, 0], 7:])
    assert relative_error(again, expected[[2, 0, 0]]) < EXACT
    assert relative_error(again, expected) > DIFFERENT  # control


@torch.no_grad()
def test_one_query_s_mask_costs_no_repeated_keys_and_means_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 6, 1, 4), (2, 2, 9, 4), (2, 2, 9, 5)))
    for shape in ((9,), (1, 9), (1, 1, 1, 9), (2, 1, 1, 9), (2, 6, 1, 9)):
        mask = torch.rand(shape, generator=generator) < 0.6
        y, expected = (attend(q, k, v, scale=0.3, mask=mask, backend=backend) for backend in ("sdpa", "reference"))
        assert relative_error(y, expected) < EXACT
        assert relative_error(attend(q, k, v, scale=0.3, mask=~mask), expected) > DIFFERENT  # control


def test_a_gradient_through_a_static_cache_is_refused():
    layer = MultiHeadAttention(24, 3).double()
    cache = StaticCache(layer.new_cache(1, 4), torch.tensor([0]))
    y = layer(tokens(1, 1, 24), cache=cache, mask=cache.seen())
    with pytest.raises(RuntimeError, match="a gradient is asked for through a cache"):
        y.sum().backward()


def test_a_compiler_gets_a_gradient_of_the_new_tokens_shape():
    """Fake tensors stand for what a compiler sees: nobody has asked yet, so nothing is refused; shapes must fit."""
    with FakeTensorMode():
        new = torch.empty(2, 1, 2, 3, requires_grad=True)
        without_gradient(torch.empty(2, 1, 5, 3), new).sum().backward()
    assert new.grad.shape == (2, 1, 2, 3)
    stored = torch.zeros(2, 1, 5, 3)  # control: real ones are refused
    with pytest.raises(RuntimeError, match="a gradient is asked for through a cache"):
        without_gradient(stored, torch.zeros(2, 1, 2, 3, requires_grad=True)).sum().backward()
