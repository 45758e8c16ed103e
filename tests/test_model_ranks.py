"""Ranks for all layers of a model from one budget, against every combination there is."""

import dataclasses
import math
from itertools import product

import pytest
import torch

from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    Rotary,
    choose_ranks,
    compress,
    relative_errors,
    second_moment,
    spectra,
    tucker_cost,
)
from tucker_ref.compression import model_ranks
from tucker_ref.compression.factored_tensor import factored_tensors
from tucker_ref.compression.model_ranks import Choice, choices, choose_model_ranks, solve
from tucker_ref.compression.ranks import check_tensor_ranks


def model(**options):
    """Three layers of which the first has heads that agree almost, and the last ones that are much alike."""
    torch.manual_seed(0)
    layers = [MultiHeadAttention(12, 3, **options).double() for _ in range(3)]
    with torch.no_grad():
        for layer, same in zip(layers, (0.97, 0.0, 0.7)):
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
                weight = projection.weight.unflatten(0, (3, 4))
                weight.copy_(same * weight[:1] + (1 - same) * weight)
    return layers


def counted(layer, pre, post):
    """Parameters of the compressed layer itself."""
    return sum(p.numel() for p in compress(layer, pre, post).parameters())


def cheapest(items, budget):
    """By trying all of them: the least loss that fits."""
    return min((sum(c.loss for c in one) for one in product(*items) if sum(c.cost for c in one) <= budget), default=None)


@pytest.mark.parametrize("units", [model_ranks.UNITS, 40])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_of_all_combinations(seed, units, monkeypatch):
    """Of those that fit if the budget is counted in parts and each cost rounded up."""
    monkeypatch.setattr(model_ranks, "UNITS", units)
    torch.manual_seed(seed)
    items = [
        [Choice((1, 1, 1), int(cost), loss) for cost, loss in zip(torch.randint(1, 40, (4,)), torch.rand(4).tolist())]
        for _ in range(4)
    ]
    smallest = sum(min(c.cost for c in item) for item in items)
    best = {}
    for budget in range(smallest + 12, 160, 7):
        found, unit = solve(items, budget), math.ceil(budget / units)
        rounded = [[dataclasses.replace(c, cost=math.ceil(c.cost / unit)) for c in item] for item in items]
        assert sum(c.cost for c in found) <= budget and all(c in item for c, item in zip(found, items))
        best[budget] = sum(c.loss for c in found)
        assert best[budget] == pytest.approx(cheapest(rounded, budget // unit), abs=1e-12)
    assert len(set(best.values())) > 2  # control: the budget decides
    with pytest.raises(
        ValueError, match=f"the budget is {smallest - 1}; even the smallest ranks of all layers take {smallest}"
    ):
        solve(items, smallest - 1)


def test_a_choice_may_take_the_whole_budget_and_of_equals_the_first_is_taken():
    first, second = Choice((1, 1, 1), 5, 0.5), Choice((2, 2, 2), 5, 0.5)
    assert solve([[first, second]], 5) == [first] and solve([[second, first]], 5) == [second]


@pytest.mark.parametrize("rotary", [None, Rotary.heads(4)])
def test_choices_are_all_ranks_that_none_beats_with_the_bound_of_the_error(rotary):
    layer = model(rotary=rotary)[0]
    for tensor, spectrum in zip(factored_tensors(layer), spectra(layer)):
        found = choices(tensor, model_ranks._parameters)
        for choice in found:
            assert check_tensor_ranks(tensor, choice.ranks) == choice.ranks
            lost = spectrum.tails(choice.ranks).sum() / tensor.squared_norm()
            assert choice.loss == pytest.approx(lost.item(), abs=1e-12)
        assert all(a.cost < b.cost and a.loss > b.loss for a, b in zip(found, found[1:]))
        for ranks in product(range(1, 4), range(1, 13), range(1, 13)):
            try:
                check_tensor_ranks(tensor, ranks)
            except ValueError:
                continue
            loss = (spectrum.tails(ranks).sum() / tensor.squared_norm()).item()
            assert any(c.cost <= model_ranks._parameters(tensor, ranks) and c.loss <= loss + 1e-12 for c in found)


def test_of_a_tensor_of_zeros_nothing_is_lost():
    layer = model()[0]
    layer.q_proj.weight.data.zero_()
    pre, post = factored_tensors(layer)
    assert [(c.ranks, c.loss) for c in choices(pre, model_ranks._parameters)] == [((1, 1, 1), 0.0)]
    assert len(choices(post, model_ranks._parameters)) > 1  # control


def test_of_real_layers_too_and_the_layers_differ():
    layers = model()
    items = [choices(tensor, model_ranks._parameters) for layer in layers[:2] for tensor in factored_tensors(layer)]
    items = [item[::4] for item in items]  # few enough to try all
    budget = sum(item[len(item) // 2].cost for item in items)
    assert sum(c.loss for c in solve(items, budget)) == pytest.approx(cheapest(items, budget), abs=1e-12)
    ranks = choose_model_ranks(layers, max_parameters=1000)
    assert ranks[0][0][0] < ranks[1][0][0]  # heads that agree need fewer


@pytest.mark.parametrize("bias", [False, True])
def test_the_budget_is_kept_and_better_spent_than_evenly(bias):
    layers = model(bias=bias)
    budget = 1200
    by_model = choose_model_ranks(layers, max_parameters=budget)
    assert sum(counted(layer, *ranks) for layer, ranks in zip(layers, by_model)) <= budget

    def lost(chosen):
        return sum(e**2 for layer, ranks in zip(layers, chosen) for e in relative_errors(layer, compress(layer, *ranks)))

    evenly = [choose_ranks(layer, max_parameters=budget // 3) for layer in layers]
    assert lost(by_model) < 0.9 * lost(evenly)  # control: the same budget for each layer loses more


def test_a_cache_is_shared_out_by_what_it_saves():
    layers = model(rotary=Rotary.heads(4))
    ranks = choose_model_ranks(layers, max_cache=36)
    cached = [tucker_cost(12, 3, pre, post).cache_per_token for pre, post in ranks]
    assert sum(cached) <= 36 and len(set(cached)) > 1
    assert all(pre[2] % 2 == 0 for pre, _ in ranks)
    for layer, (pre, post) in zip(layers, ranks):
        compress(layer, pre, post)  # these ranks exist
    whole = choose_model_ranks(layers, max_cache=3 * 24)
    assert all(max(relative_errors(layer, compress(layer, *r))) < 1e-7 for layer, r in zip(layers, whole))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("what", ["max_parameters", "max_cache"])
def test_a_budget_that_ranks_just_fill_gives_those_ranks(what, bias):
    layers = model(bias=bias)
    ranks = choose_model_ranks(layers, **{what: {"max_parameters": 1200, "max_cache": 36}[what]})
    if what == "max_parameters":
        filled = sum(counted(layer, *both) for layer, both in zip(layers, ranks))
    else:
        filled = sum(pre[2] + post[2] for pre, post in ranks)
    assert choose_model_ranks(layers, **{what: filled}) == ranks
    assert choose_model_ranks(layers, **{what: filled - 1}) != ranks  # control


def test_a_moment_changes_the_choice():
    layers = model()
    moments = [second_moment(layer, torch.randn(200, 12).double() * torch.logspace(-2, 0, 12)) for layer in layers]
    plain, aware = (choose_model_ranks(layers, max_parameters=1000, moments=known) for known in (None, moments))
    assert plain != aware


def test_a_budget_in_parts_is_kept_and_nearly_spent(monkeypatch):
    layers = model()
    exact = choose_model_ranks(layers, max_parameters=1200)
    monkeypatch.setattr(model_ranks, "UNITS", 200)
    parts = choose_model_ranks(layers, max_parameters=1200)
    sizes = [sum(counted(layer, *ranks) for layer, ranks in zip(layers, chosen)) for chosen in (parts, exact)]
    assert 1200 - 6 * 7 - 60 <= sizes[0] <= 1200 >= sizes[1]


def test_ranks_that_are_tried_reach_from_one_to_all():
    assert model_ranks._steps(5, even=False) == [1, 2, 3, 4, 5]
    assert model_ranks._steps(8, even=True) == [2, 4, 6, 8] and model_ranks._steps(7, even=True)[-1] == 8
    many = model_ranks._steps(640, even=False)
    assert len(many) == model_ranks.STEPS and (many[0], many[-1]) == (1, 640)


def test_what_is_refused():
    layers = [GroupedQueryAttention(12, 3, 1)]
    for budgets in ({}, {"max_parameters": 100, "max_cache": 10}):
        with pytest.raises(ValueError, match="needs exactly one of max_parameters and max_cache"):
            choose_model_ranks(layers, **budgets)
    with pytest.raises(ValueError, match="0 moments for 1 layers"):
        choose_model_ranks(layers, max_cache=10, moments=[])
    for budget in (0, 1):
        with pytest.raises(ValueError, match=f"the budget is {budget}; even the smallest ranks of all layers take 2"):
            choose_model_ranks(layers, max_cache=budget)
    for name in ("max_cache", "max_parameters"):
        with pytest.raises(ValueError, match=f"^{name} is 1.5"):
            choose_model_ranks(layers, **{name: 1.5})
    assert choose_model_ranks(layers, max_cache=2**60)[0][0][2] == 4  # control: no budget is too large
