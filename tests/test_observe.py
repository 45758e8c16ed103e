"""What is seen of a model in training is what is there."""

import math

import pytest
import torch

from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2
from reproduce.train.observe import observation

TOKENS = torch.arange(10).remainder(7)[None]


@pytest.mark.parametrize("row", TABLE2[::2], ids=lambda row: row.label)
def test_norms_are_those_of_all_layers_and_the_model_is_left_alone(row):
    torch.manual_seed(0)
    model = GPT2(7, 16, 96, 12, 2, row.narrowed(8).build)
    model.loss(TOKENS).backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = observation(model, TOKENS)
    kinds = dict(model.blocks[0].attention.named_parameters())
    assert list(seen["gradients"]) == list(seen["weights"]) == list(kinds)
    for kind in kinds:
        both = [dict(block.attention.named_parameters())[kind] for block in model.blocks]
        assert seen["weights"][kind] == pytest.approx(math.hypot(*(p.detach().norm() for p in both)), rel=1e-3)
        assert seen["gradients"][kind] == pytest.approx(math.hypot(*(p.grad.norm() for p in both)), rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_largest_logit_is_found_and_scales_with_the_queries():
    torch.manual_seed(0)
    model = GPT2(7, 16, 96, 12, 1, TABLE2[0].build)
    model.loss(TOKENS).backward()
    attention, x = model.blocks[0].attention, []
    attention.register_forward_pre_hook(lambda _, arguments: x.append(arguments[0]))
    once = observation(model, TOKENS)["largest_logit"]
    q, k = (
        projection(x[0].float()).unflatten(-1, (12, 8)).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    assert once == pytest.approx(((q @ k.mT) * attention.scale).tril().abs().max().item(), rel=0.03)  # seen in bfloat16
    with torch.no_grad():
        attention.q_proj.weight.mul_(3)
    assert observation(model, TOKENS)["largest_logit"] == pytest.approx(3 * once, rel=0.03)
