"""GPT-2 and ViT: attention is an argument, and the rest is what the papers describe."""

import pytest
import torch

from reproduce.models.gpt2 import GPT2
from reproduce.models.llama import Llama
from reproduce.models.rows import TABLE2, TABLE3, TABLE3_NORMED
from reproduce.models.vit import ViT
from tucker_ref import MultiHeadAttention, as_tucker

ROWS = pytest.mark.parametrize("row", TABLE2, ids=lambda row: row.label)


@ROWS
def test_gpt2_sees_no_later_token_and_starts_at_chance(row):
    torch.manual_seed(0)
    model = GPT2(50, 16, 48, 12, 2, row.narrowed(16).build)
    tokens = torch.randint(0, 50, (3, 16))
    logits = model(tokens)
    assert logits.shape == (3, 16, 50)
    later = tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 50
    torch.testing.assert_close(model(later)[:, :9], logits[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(model(later)[:, 9:], logits[:, 9:])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 50, (48,)))
    assert abs(loss.item() - torch.tensor(50.0).log().item()) < 0.2


@pytest.mark.parametrize("row", (*TABLE3, *TABLE3_NORMED), ids=lambda row: row.label)
def test_llama_sees_no_later_token_and_where_each_one_stands(row):
    torch.manual_seed(0)
    model = Llama(50, 256, 32, 2, lambda d, h: row.narrowed(8).build(d, h, 50.0))
    tokens = torch.randint(0, 50, (3, 16))
    logits = model(tokens)
    later = tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 50
    torch.testing.assert_close(model(later)[:, :9], logits[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(model(later)[:, 9:], logits[:, 9:])
    turned = tokens.clone()
    turned[:, :9] = tokens[:, :9].flip(1)  # the same tokens before the last one, in other places
    assert not torch.allclose(model(turned)[:, 15], logits[:, 15], atol=1e-7)


@ROWS
def test_vit_sees_every_patch(row):
    torch.manual_seed(0)
    model = ViT(8, 2, 3, 5, 48, 12, 2, row.narrowed(16).build)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 8, 8)
    logits = model(images)
    assert logits.shape == (2, 5)
    for y, x in ((0, 0), (7, 7)):
        changed = images.clone()
        changed[:, :, y, x] += 1
        assert not torch.allclose(model(changed), logits)


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at inner tensors
@pytest.mark.parametrize("row", TABLE2[::3], ids=lambda row: row.label)
@pytest.mark.parametrize("llama", [False, True])
def test_compiled_in_parts_it_is_the_same_model(row, llama):
    torch.manual_seed(0)
    torch.compiler.reset()
    attention = row.narrowed(16)
    if llama:
        model = Llama(50, 48, 12, 3, lambda d, h: attention.build(d, h, 50.0)).double()
    else:
        model = GPT2(50, 16, 48, 12, 3, attention.build).double()
    windows = torch.randint(0, 50, (3, 17))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model.loss(windows), parameters)
    model.compile_parts(backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # the first block's compilation serves them all
        actual = torch.autograd.grad(model.loss(windows), parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_residual_branches_start_scaled_by_depth():
    for n_layers in (2, 8):
        block = GPT2(50, 16, 192, 12, n_layers, MultiHeadAttention).blocks[0]
        for weight in (block.attention.o_proj.weight, block.mlp.down.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * n_layers) ** 0.5, rel=0.05)


def test_a_trained_model_can_be_converted_layer_by_layer():
    """The theorems at the level of a whole model."""
    torch.manual_seed(0)
    model = GPT2(50, 16, 48, 12, 2, MultiHeadAttention).double()
    tokens = torch.randint(0, 50, (3, 16))
    expected = model(tokens)
    for block in model.blocks:
        block.attention = as_tucker(block.attention)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.blocks[0].attention.pre.head.copy_(model.blocks[0].attention.pre.head.flip(0))
    assert not torch.allclose(model(tokens), expected, rtol=1e-6)  # control


def test_patches_must_fit_the_image():
    with pytest.raises(ValueError, match="patch_size is 3; it must divide image_size = 8"):
        ViT(8, 3, 1, 10, 48, 12, 2, MultiHeadAttention)
