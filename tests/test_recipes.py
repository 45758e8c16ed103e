"""Other ways to start and train a Tucker Attention: each does what its name says, and nothing else."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import EXACT, relative_error

from reproduce.experiments import ablations
from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2, TABLE2_BESIDE
from reproduce.store import records
from reproduce.train import language
from reproduce.train.distributed import Workers
from reproduce.train.loop import train
from reproduce.train.optimizers import make_optimizer
from reproduce.train.options import Options
from reproduce.train.recipes import INITS, Recipe, TuckerAdamW, decay_products, retract, with_attention_apart
from reproduce.train.settings import TrainConfig, learning_rate_at
from tucker_ref import MultiHeadAttention, Rotary, TuckerAttention, compress
from tucker_ref.tucker_weights import TuckerWeights

CONFIG = TrainConfig(steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=2, log_every=2, checkpoint_every=4)
TUCKER = TABLE2[4].narrowed(16)
PLAIN = Recipe()


def model_of(row=TUCKER, recipe=PLAIN):
    torch.manual_seed(0)
    model = GPT2(50, 16, 48, 12, 2, row.build)
    recipe.prepare(model)
    return model


def windows(step):
    return (torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(step)),)


def layers(*seeds):
    """Attention tensors of several layers with factors that are far from orthonormal."""

    def tensor(seed):
        generator = torch.Generator().manual_seed(seed)
        core, head, query, key = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4), (5, 2), (7, 3), (7, 4))
        )
        return TuckerWeights(core, {"head": head, "query": query, "key": key})

    return [tensor(seed) for seed in seeds]


def test_retraction_changes_the_factors_and_not_the_tensors():
    tensors = layers(0, 1)
    before = [w.to_tensor().detach() for w in tensors]
    retract(tensors, carried=True)
    for weights, tensor in zip(tensors, before):
        assert relative_error(weights.to_tensor(), tensor) < EXACT
        for factor in weights.factors:
            assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), atol=1e-12)


def test_retraction_without_carrying_takes_q_of_each_factor_and_leaves_the_cores():
    tensors, before = layers(0, 1), layers(0, 1)
    retract(tensors, carried=False)
    for weights, old in zip(tensors, before):
        assert torch.equal(weights.core, old.core)
        assert relative_error(weights.to_tensor(), old.to_tensor()) > 0.1  # control: what was dropped is something
        for q, u in zip(weights.factors, old.factors):
            r = q.detach().T @ u.detach()
            assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-12)
            assert torch.allclose(q @ r, u, atol=1e-12) and torch.allclose(r.tril(-1), torch.zeros_like(r), atol=1e-12)
            assert (r.diagonal() > 0).all()


def test_decay_of_the_product_is_a_step_down_its_squared_norm():
    (weights,), (other,) = layers(3), layers(3)
    half = 0.5 * other.to_tensor().square().sum()
    slopes = torch.autograd.grad(half, [other.core, *other.factors])
    expected = [p.detach() - 0.01 * slope for p, slope in zip((other.core, *other.factors), slopes)]
    decay_products([weights, *layers(4)], 0.01)
    for actual, wanted in zip((weights.core, *weights.factors), expected):
        assert relative_error(actual, wanted) < EXACT


def test_every_initialisation_is_what_its_name_says():
    gain = 0.5  # 1/sqrt(2 L) with two layers
    same, xavier, small, hosvd, normed = (
        model_of(recipe=r).blocks[1].attention for r in (Recipe(), *ablations.RECIPES[:3], Recipe(latent_norm=True))
    )
    orthonormal = lambda u: torch.allclose(u.T @ u, torch.eye(u.shape[1]), atol=1e-5)  # noqa: E731
    assert orthonormal(same.pre.query) and orthonormal(hosvd.pre.query) and orthonormal(normed.pre.query)
    assert not orthonormal(xavier.pre.query) and xavier.init == "xavier" and normed.latent_norm and not same.latent_norm
    assert small.pre.query.std().item() == pytest.approx(0.02, rel=0.1)
    assert small.post.core.std().item() == pytest.approx(0.02 * gain, rel=0.2)
    mha = MultiHeadAttention(48, 12)
    mha.reset_parameters(0.02, gain)
    expected = compress(mha, hosvd.ranks)  # as large, since random layers are alike
    assert hosvd.pre.core.norm().item() == pytest.approx(expected.pre.core.norm().item(), rel=0.1)
    assert hosvd.post.core.norm().item() == pytest.approx(expected.post.core.norm().item(), rel=0.1)
    assert {same.ranks} == {xavier.ranks, small.ranks, hosvd.ranks, normed.ranks}


KEPT = {
    "rotary": dict(rotary=Rotary.latent(8, 100.0)),
    "bias": dict(bias=True),
    "shared KV": dict(shared_kv=True),
    "scale": dict(scale=0.1),
    "all but norms": dict(rotary=Rotary.latent(8), bias=True, shared_kv=True, scale=-0.3),
    "qk_norm": dict(qk_norm="head"),
    "latent_norm": dict(latent_norm=True),
}


def prepared(init, **options):
    """One layer before and after."""
    torch.manual_seed(0)
    old = TuckerAttention(24, 4, (3, 10, 8), **options)
    block = SimpleNamespace(attention=old)
    Recipe("another", init=init).prepare(SimpleNamespace(blocks=[block]))
    return old, block.attention


@pytest.mark.parametrize("init", INITS[1:])
@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_what_a_layer_has_it_keeps_however_it_is_started(init, options):
    if init == INITS[3] and (normed := {"latent_norm", "qk_norm"} & options.keys()):
        with pytest.raises(ValueError, match=f"'another': init 'HOSVD .*' does not go with {normed.pop()}"):
            prepared(init, **options)
        return
    old, new = prepared(init, **options)
    assert new is not old and {k: v.shape for k, v in new.state_dict().items()} == {
        k: v.shape for k, v in old.state_dict().items()
    }
    for name in ("shared_kv", "scale", "bias", "qk_norm", "latent_norm", "ranks", "post_ranks"):
        assert getattr(new, name) == getattr(old, name)
    assert (new.rotary is None) == (old.rotary is None)
    assert new.rotary is None or torch.equal(new.rotary.frequencies, old.rotary.frequencies)
    assert new.rotates_on_reading == old.rotates_on_reading
    assert all((gain == 1).all() for name, gain in new.named_parameters() if "norm" in name)
    if old.bias:
        assert not any(bias.any() for bias in (new.pre.query[24:], new.pre.key[24:], new.post.value[24:], new.output_bias))


def test_the_hosvd_has_logits_as_large_at_any_scale():
    size = lambda layer: abs(layer.scale) * layer.pre.to_tensor().norm().item()  # noqa: E731
    usual, other = (prepared(INITS[3], **options)[1] for options in ({}, {"scale": 0.05}))
    assert size(other) == pytest.approx(size(usual), rel=1e-4)
    assert other.scale < usual.scale and other.pre.core.norm() > 5 * usual.pre.core.norm()  # control


def test_the_hosvd_and_normalised_latents_are_refused_together():
    with pytest.raises(ValueError, match="'both': init 'HOSVD .*' does not go with latent_norm"):
        model_of(recipe=Recipe("both", init=INITS[3], latent_norm=True))


def test_a_recipe_leaves_other_mechanisms_alone():
    for recipe in ablations.RECIPES:
        plain, prepared = model_of(TABLE2[0]), model_of(TABLE2[0], recipe)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), prepared.parameters()))
    for recipe in (r for r in ablations.RECIPES if r.init != PLAIN.init):  # control: Tucker's own start otherwise
        own = zip(model_of().parameters(), model_of(recipe=recipe).parameters())
        assert not all(torch.equal(a, b) for a, b in own)


@pytest.mark.parametrize("recipe", [r for r in ablations.RECIPES if not r.warmup > 1], ids=lambda r: r.name)
def test_a_recipe_trains_and_is_not_the_same_training(recipe, tmp_path):
    plain, other = model_of(), model_of(recipe=recipe)
    for number, (model, how) in enumerate(((plain, Recipe()), (other, recipe))):
        train(model, windows, GPT2.loss, CONFIG, tmp_path / f"{number}.pt", "", optimizer_of=how.optimizer)
    a, b = ([p.detach() for p in (m.blocks[0].attention.pre.core, m.blocks[0].attention.pre.key)] for m in (plain, other))
    assert not torch.equal(a[0], b[0]) or not torch.equal(a[1], b[1])
    factor = other.blocks[0].attention.pre.key
    kept = torch.allclose(factor.T @ factor, torch.eye(factor.shape[1]), atol=1e-5)
    assert kept == recipe.retracted


def test_the_neutral_optimiser_with_groups_takes_the_same_steps(tmp_path):
    """Control: what differs above is the recipe, not the grouping."""
    plain, grouped = model_of(), model_of()
    train(plain, windows, GPT2.loss, CONFIG, tmp_path / "a.pt", "")
    train(grouped, windows, GPT2.loss, CONFIG, tmp_path / "b.pt", "", optimizer_of=lambda *a: TuckerAdamW(*a, Recipe()))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), grouped.parameters()))


def test_a_share_of_the_rate_is_a_share_at_every_step(tmp_path):
    model = model_of()
    optimizer = TuckerAdamW(model, CONFIG, Recipe(core_rate=0.25))
    train(model, windows, GPT2.loss, CONFIG, tmp_path / "c.pt", "", optimizer_of=lambda *_: optimizer)
    rate = learning_rate_at(CONFIG.steps - 1, CONFIG)
    assert [g["lr"] / rate for g in optimizer.param_groups] == pytest.approx([1, 1, 0.25, 1])


def test_a_slower_attention_is_that_of_any_mechanism_and_nothing_else(tmp_path):
    recipe = Recipe(attention_rate=0.25)
    for row in (TABLE2[0], TABLE2[3].narrowed(16), TUCKER):
        model = model_of(row)
        used = []
        make = lambda *a: used.append(recipe.optimizer(*a)) or used[-1]  # noqa: B023, E731
        train(model, windows, GPT2.loss, CONFIG, tmp_path / f"{row.label}.pt", "", optimizer_of=make)
        (optimizer,) = used
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        slow = {id(p) for block in model.blocks for p in block.attention.parameters()}
        assert rates.keys() == {id(p) for p in model.parameters()}
        rate = learning_rate_at(CONFIG.steps - 1, CONFIG)
        assert all(found == pytest.approx(rate * (0.25 if p in slow else 1)) for p, found in rates.items())
        plain = make_optimizer(model, CONFIG)
        decay = lambda o: {id(p): group["weight_decay"] for group in o.param_groups for p in group["params"]}  # noqa: E731
        assert decay(optimizer) == decay(plain)


def test_the_attention_apart_at_the_full_rate_takes_the_same_steps(tmp_path):
    """Control: what a slower attention changes is its rate."""
    for rate in (1.0, 0.25):
        plain, apart = model_of(TABLE2[0]), model_of(TABLE2[0])
        train(plain, windows, GPT2.loss, CONFIG, tmp_path / f"{rate}a.pt", "")
        slower = lambda model, config: with_attention_apart(model, config, rate)  # noqa: B023, E731
        train(apart, windows, GPT2.loss, CONFIG, tmp_path / f"{rate}b.pt", "", optimizer_of=slower)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), apart.parameters())) == (rate == 1)


def test_a_shared_latent_is_refused():
    shared = TABLE2_BESIDE[2].narrowed(16)
    with pytest.raises(ValueError, match="'kept' is not defined for a latent that keys and values share"):
        Recipe("kept", retracted=True).optimizer(model_of(shared), CONFIG)


def test_ablations_record_what_was_changed(tmp_path):
    preset = dataclasses.replace(ablations.PRESETS["smoke"], train=CONFIG, validation_tokens=256)
    text = tmp_path / "novel.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 400, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(text), rows=("as it is", "warm-up four times longer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.PRESETS, "smoke", preset)
        ablations.run(options)
        with pytest.raises(ValueError, match="no recipe is called nonsense; there are: as it is; init xavier"):
            ablations.run(dataclasses.replace(options, rows=("nonsense",)))
    found = {r.method: r.config for r in records.load(tmp_path / "records", "ablations")}
    assert set(found) == {
        f"{row}{change}" for row in ("Tucker [8,128,128]", "MHA") for change in ("", ", warm-up four times longer")
    }
    assert "recipe" not in found["MHA"] and found["MHA, warm-up four times longer"]["recipe"] == {"warmup": 4}
    assert found["MHA, warm-up four times longer"]["train"]["warmup_steps"] == 8


def test_cures_are_tried_on_the_row_that_broke_down_and_on_the_widest_each_at_its_own_rate(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(
        ablations, "train_rows", lambda name, cases, model, preset, options: tried.append((list(cases), preset))
    )
    options = Options("gpu", tmp_path, tmp_path, rows=("normalised latents",))
    ablations.run(options)
    ablations.run(Options("smoke", tmp_path, tmp_path))
    (cures, preset), (cases, _) = tried
    assert [(row.label, recipe.config()) for row, recipe in cures] == [
        (label, {"latent_norm": True}) for label in ("Tucker [8,128,128]", "Tucker [12,256,256]")
    ]
    rates = [language.settings_of(row, recipe, preset, options).learning_rate for row, recipe in cures]
    assert rates == [2.4e-3, 1.2e-3]
    (mha,) = ((row, recipe) for row, recipe in ablations.CURES if row == "MHA")
    row = next(row for row, _ in cases if row.label == "MHA")
    assert mha[1].config() == {"attention_rate": 0.25}
    slower = next(recipe for recipe in ablations.RECIPES if recipe.name == ablations.SLOWER[0])
    for case, recipe in ((row, mha[1]), (cures[0][0], slower)):  # the sweep's best with this change
        assert language.settings_of(case, recipe, preset, options).learning_rate == 4.8e-3
        given = dataclasses.replace(options, learning_rate=0.1)
        assert language.settings_of(case, recipe, preset, given).learning_rate == 0.1
    assert len(cases) == len(ablations.CASES) > len(ablations.CURES)  # control


def test_a_recipe_that_would_not_do_what_it_says_is_refused():
    with pytest.raises(ValueError, match="init must be one of orthonormal, .* but is 'xaviar'"):
        Recipe(init="xaviar")
    with pytest.raises(ValueError, match="attention_rate goes with the plain optimiser: not with core_rate"):
        Recipe(core_rate=0.25, attention_rate=0.25)


def test_a_run_that_diverges_is_on_record_and_the_next_one_starts(tmp_path):
    preset = dataclasses.replace(ablations.PRESETS["smoke"], train=CONFIG, validation_tokens=256, observe_every=1)
    text = tmp_path / "novel.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 400, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "records", text=str(text), rows=("as it is",), learning_rate=1e30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.PRESETS, "smoke", preset)
        ablations.run(options)
        ablations.run(options)  # known: not run again
        ablations.run(dataclasses.replace(options, learning_rate=1e-3))
    wild, tame = (
        [r.metrics for r in records.load(tmp_path / "records", "ablations") if r.config["train"]["learning_rate"] == rate]
        for rate in (1e30, 1e-3)
    )
    assert [m.get("diverged_at") for m in wild] == [2, 2] and all("validation_loss" not in m for m in wild)
    assert all([o["step"] for o in m["observations"]] == [0] for m in wild)  # the next one would be NaN
    assert [m.get("diverged_at") for m in tame] == [None, None] and all(m["validation_loss"] > 0 for m in tame)
    last = dataclasses.replace(options, records=tmp_path / "last", steps=1)
    with pytest.MonkeyPatch.context() as patch:  # the only step begins with a loss, and leaves weights that have none
        patch.setitem(ablations.PRESETS, "smoke", preset)
        ablations.run(dataclasses.replace(last, learning_rate=1e30))
        ablations.run(dataclasses.replace(last, learning_rate=1e-3))
    spoiled = [r.metrics for r in records.load(last.records, "ablations", to_show=True)]
    assert [m.get("diverged_at") for m in spoiled] == [1, 1, None, None] and all(len(m["curve"]) == 1 for m in spoiled)
    second = dataclasses.replace(options, records=tmp_path / "second", workers=Workers(rank=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.PRESETS, "smoke", preset)
        ablations.run(second)
        ablations.run(dataclasses.replace(second, learning_rate=1e-3))
    assert not records.load(tmp_path / "second")  # of several workers the first alone records
