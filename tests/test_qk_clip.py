"""QK-clip: heads whose logits have grown too large come back to the limit, and no others change."""

import dataclasses

import pytest
import torch
from helpers import EXACT, relative_error
from torch import nn

from reproduce.experiments import table2
from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2, TABLE2_NORMED, Row
from reproduce.store import records
from reproduce.train import language
from reproduce.train.distributed import Workers
from reproduce.train.options import Options
from reproduce.train.qk_clip import EVERY, clip, clip_heads, logits_of, scale_logits
from reproduce.train.recipes import Recipe
from reproduce.trust import survival
from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
)

FACTORS = torch.tensor([0.25, 1.0, 0.5, 0.9, 1.0, 0.1])
LAYERS = {
    "MHA": lambda: MultiHeadAttention(48, 6, bias=True),
    "GQA": lambda: GroupedQueryAttention(48, 6, 2, bias="qkv"),
    "MLA": lambda: MultiHeadLatentAttention(48, 6, 20, 16),
    "MLA, decoupled": lambda: MultiHeadLatentAttention(48, 6, 20, 16, rope_dim=4, rotary=Rotary.heads(4)),
    "Tucker": lambda: TuckerAttention(48, 6, (4, 12, 12), bias=True),
}
TOKENS = torch.arange(16).remainder(7)[None]


@pytest.mark.parametrize("name", LAYERS)
def test_the_logits_of_each_head_are_scaled_and_its_outputs_are_not(name):
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():  # biases too
            parameter.normal_()
    before = as_tucker(layer)
    scale_logits(layer, FACTORS)
    after = as_tucker(layer)
    expected = before.pre.to_tensor() * FACTORS.double()[:, None, None]  # (h, d, d)
    assert relative_error(after.pre.to_tensor(), expected) < EXACT
    assert relative_error(after.post.to_tensor(), before.post.to_tensor()) < EXACT
    assert relative_error(after.pre.to_tensor(), before.pre.to_tensor()) > 0.1  # control


def test_where_a_head_has_keys_of_its_own_they_take_half():
    """As Kimi K2 does; shared keys are left alone."""
    for name, share in (("MHA", 0.5), ("GQA", 0.0)):
        layer = LAYERS[name]()
        before = layer.k_proj.weight.detach().clone()
        scale_logits(layer, FACTORS)
        per_channel = (FACTORS**share).repeat_interleave(layer.head_dim)[: len(before), None]
        assert relative_error(layer.k_proj.weight, before * per_channel) < 1e-6
        assert relative_error(layer.k_proj.weight, before * per_channel**0.5) > 0.1 or share == 0.0  # control


def test_a_factor_is_rounded_as_the_weights_are():
    layer = LAYERS["Tucker"]().bfloat16()
    before = layer.pre.head.detach().clone()
    scale_logits(layer, FACTORS)
    assert torch.equal(layer.pre.head, before * FACTORS.bfloat16()[:, None])
    assert not torch.equal(layer.pre.head.float(), before.float() * FACTORS[:, None])  # control


def model_of(row):
    torch.manual_seed(0)
    return GPT2(7, 16, 96, 12, 2, row.build)


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight:UserWarning"
)  # of an RMSNorm without a fused kernel
@pytest.mark.parametrize(
    "row",
    [
        *(row.narrowed(8) for row in (*TABLE2[:2], TABLE2[3], TABLE2_NORMED[4])),
        *(Row("Tucker", ranks=(8, 8, 8), latent_norm=norm) for norm in (False, True)),
    ],
    ids=lambda row: row.label,
)
def test_heads_beyond_the_limit_come_back_to_it_and_others_stay(row):
    model = model_of(row)
    before = logits_of(model, TOKENS)
    assert [len(logits) for logits in before] == [12, 12]
    limit = before[0].median().item()
    clipped = clip([block.attention for block in model.blocks], before, limit)
    assert clipped == sum(int((logits > limit).sum()) for logits in before) > 0
    after = logits_of(model, TOKENS)[0]  # of the first layer, whose inputs are as they were
    assert torch.allclose(after, before[0].clamp(max=limit), rtol=0.02)  # seen in bfloat16
    assert before[0].max() > 1.1 * limit  # control
    assert clip_heads(model, TOKENS, 1e6) == 0


def test_what_cannot_be_clipped_is_refused():
    with pytest.raises(ValueError, match="layer has qk_norm='head'; its logits are bounded already and cannot be clipped"):
        scale_logits(MultiHeadAttention(48, 6, qk_norm="head"), FACTORS)
    with pytest.raises(ValueError, match="layer is Linear; it must be an attention of tucker_ref"):
        scale_logits(nn.Linear(3, 3), FACTORS)


def test_a_run_is_clipped_while_it_trains_and_its_record_says_so(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for n in range(10):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} words and more. " * 40, encoding="utf-8")
    looked = []
    monkeypatch.setattr(language, "clip_heads", lambda model, tokens, limit: looked.append((tokens.shape[0], limit)))
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(tmp_path / "text"), steps=EVERY + 1, qk_clip=0.5)
    rows, preset = [(survival.ROWS[0], Recipe())], dataclasses.replace(survival.TOY, keep_models=False)
    language.train_rows("table2", rows, survival.SHAPE, preset, options)
    language.train_rows("table2", rows, survival.SHAPE, preset, dataclasses.replace(options, qk_clip=None))
    clipped, plain = records.load(tmp_path / "records")
    assert looked == [(1, 0.5)] * 2  # in steps 0 and EVERY, of the first run alone
    assert clipped.config["train"]["qk_clip"] == 0.5 and "qk_clip" not in plain.config["train"]
    with pytest.raises(ValueError, match="--qk-clip looks at the logits of whole layers; it runs on one worker"):
        many = dataclasses.replace(options, workers=Workers(count=2), seeds=(7,))
        monkeypatch.setattr(Workers, "agree", lambda *_: None)
        language.train_rows("table2", rows, survival.SHAPE, preset, many)
    with pytest.raises(ValueError, match="--qk-clip 0.5: QK-norm bounds the logits of MHA QK-norm already; name other --rows"):
        language.train_rows("table2", [*rows, (TABLE2_NORMED[0], Recipe())], survival.SHAPE, preset, options)
    assert table2.PRESETS["gpu-fresh"].train.qk_clip is None
