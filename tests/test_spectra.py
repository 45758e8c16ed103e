"""The spectra experiment on models that it finds, and its refusal where there are none."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from reproduce.experiments import samples, spectra, table2
from reproduce.models.rows import TABLE2
from reproduce.report import results, unfoldings
from reproduce.store import records
from reproduce.train.language import build_model, model_path, save_model
from reproduce.train.options import Options
from tucker_ref import MultiHeadAttention, second_moment

CONFIG = {"model": "gpt2", "d_model": 48, "n_heads": 12, "n_layers": 2, "context": 16, "vocab_size": 50}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(
        spectra.PRESETS, "smoke", dataclasses.replace(spectra.PRESETS["smoke"], narrower=768 // CONFIG["d_model"])
    )


def test_ranks_of_saved_models_are_recorded(tmp_path, tiny):
    for row in (TABLE2[0], TABLE2[-1]):
        config = CONFIG | {"row": row.config(), "attention": row.narrowed(16).config(), "train": {}}
        torch.manual_seed(0)
        model = build_model(config)
        with torch.no_grad():  # make the second half of the heads repeat the first, in the first layer
            if row.mechanism == "MHA":
                attention = model.blocks[0].attention
                for projection in (attention.q_proj, attention.k_proj):
                    projection.weight[24:] = projection.weight[:24]
        save_model(model_path(tmp_path, f"table2 {row.label} seed 0"), model, config, Tokenizer(BPE()).to_str())
    spectra.run(Options("smoke", tmp_path, tmp_path / "records"))
    mha, tucker = records.load(tmp_path / "records", "spectra")
    assert (mha.method, tucker.method) == ("MHA", "Tucker [8,64,64]")
    first, second = (layer["pre"]["head"] for layer in mha.metrics["trained"])
    assert first["size"] == second["size"] == 12 and first["energy_rank_99"] == 6 < second["energy_rank_99"]
    assert sum(value > first["floor"] for value in first["values"]) == 6
    start, other = (layer["pre"]["head"] for layer in mha.metrics["initial"])
    assert start["entropy_rank"] > 10 and start["square_rank"] > 10 and "values" in start and "values" not in other
    assert tucker.metrics["trained"][0]["pre"]["head"]["energy_rank_99"] <= 8


def test_a_model_of_another_preset_is_not_taken_for_one_of_this(tmp_path, tiny):
    config = CONFIG | {"row": TABLE2[0].config(), "attention": TABLE2[0].config(), "train": {}}
    path = model_path(tmp_path, "table2 MHA seed 0")
    save_model(path, build_model(config), config, Tokenizer(BPE()).to_str())
    options = Options("smoke", tmp_path, tmp_path / "records")
    with pytest.raises(ValueError, match="seed-0.safetensors is not of the preset gpu: d is 48, not 768"):
        spectra.run(dataclasses.replace(options, preset="gpu"))
    assert not records.load(tmp_path / "records")
    spectra.run(options)  # control
    assert len(records.load(tmp_path / "records")) == 1


def test_models_of_two_optimisers_are_trained_kept_and_looked_at(tmp_path, monkeypatch):
    """The whole way at toy size: table2 keeps what it trains, and records say the optimiser, the rate and what was reached."""
    preset = table2.PRESETS["gpu-fresh-optimizers"]
    train = dataclasses.replace(
        preset.train,
        steps=2,
        batch_size=2,
        warmup_steps=1,
        precision="float32",
        compiled=False,
        log_every=1,
        checkpoint_every=2,
    )
    small = dataclasses.replace(preset, narrower=16, n_layers=2, context=16, vocab_size=300, train=train, observe_every=0)
    for presets in (table2.PRESETS, spectra.PRESETS):
        monkeypatch.setitem(presets, "gpu-fresh-optimizers", small)
    monkeypatch.setattr(spectra, "WINDOW", 16)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {n} says {n * n} and no more than that." for n in range(400)), encoding="utf-8")
    options = Options("gpu-fresh-optimizers", tmp_path, tmp_path / "records", text=str(text))
    table2.run(options)
    for rate in (1e-3, 2e-3):
        table2.run(dataclasses.replace(options, optimizer="adamw", learning_rates=(rate,)))
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 6  # those of one name lie side by side
    samples._ids.cache_clear()
    spectra.run(options)
    assert samples._ids.cache_info().misses == 1  # they have one tokenizer
    found = records.load(tmp_path / "records", "spectra", to_show=True)
    assert {(r.method, r.train.get("optimizer"), r.rate) for r in found} == {
        ("MHA", "muon", 2.4e-3), ("MHA QK-norm", "muon", 9.6e-3),
        *((row, None, rate) for row in ("MHA", "MHA QK-norm") for rate in (1e-3, 2e-3)),
    }  # fmt: skip
    reached = {r.id: r.metrics["validation_loss"] for r in records.load(tmp_path / "records", "table2") if r.preset != "sizes"}
    assert sorted(r.metrics["validation_loss"] for r in found) == sorted(reached.values())
    whole = {(r.method, r.train.get("optimizer"), r.metrics["validation_loss"]) for r in found if unfoldings.has_values(r)}
    assert len(whole) == 4  # of the two with AdamW the better one
    for r in found:
        losses = [
            s.metrics["validation_loss"]
            for s in found
            if (s.method, s.train.get("optimizer")) == (r.method, r.train.get("optimizer"))
        ]
        assert unfoldings.has_values(r) == (r.metrics["validation_loss"] == min(losses))
        assert ("centred" in r.metrics) == (r.method == "MHA") and {"inputs", "initial_inputs"} <= set(r.metrics)
        assert r.metrics["read"]["name"] == "text.txt" and r.data["train_tokens"] > 0
        head = [r.metrics[way][0]["pre"]["head"]["square_rank"] for way in ("initial", "trained")]
        assert abs(head[0] - head[1]) < 2  # two steps: still as it started
    assert results.tables(found)["spectra"][0].body.count("\n| ") == 5  # three ways of looking at one row, two at the other
    spectra.run(dataclasses.replace(options, rows=("MHA QK-norm",), text=None))
    with pytest.raises(ValueError, match="run `python -m reproduce table2 --preset gpu-fresh-optimizers` first"):
        spectra.run(dataclasses.replace(options, out=tmp_path / "elsewhere"))


def test_the_mean_of_what_keys_read_has_a_one_behind_it_where_there_are_biases():
    x = torch.arange(24.0).view(2, 12)
    for bias in (False, True):
        layer = MultiHeadAttention(12, 3, bias=bias)
        mean = spectra.mean_of(layer, x)
        assert torch.equal(mean[:12], x.double().mean(0)) and mean[12:].tolist() == [1.0] * bias


def test_what_all_keys_share_counts_for_nothing_where_nothing_turns_them():
    """Keys about their mean have the spectrum of inputs that were centred; control: with the mean they have another one."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(12, 3).double(), torch.randn(50, 12).double() + 3
    moment, own = second_moment(layer, x, 0.0), second_moment(layer, x - x.mean(0), 0.0)
    about = spectra.centred(moment, spectra.mean_of(layer, x), 0.0)
    ranks = [
        spectra.of_layers([layer], moments=[moment], key_moments=keys)[0]["pre"]["head"]["square_rank"]
        for keys in ([about], [own], None)
    ]
    assert ranks[0] == pytest.approx(ranks[1], abs=1e-3) and abs(ranks[0] - ranks[2]) > 0.05


def test_the_layers_are_taken_to_the_device_named():
    assert len(spectra.of_layers([MultiHeadAttention(12, 3)], "cpu")) == 1  # control
    with pytest.raises(ValueError, match="holds no values"):
        spectra.of_layers([MultiHeadAttention(12, 3)], "meta")


def test_a_layer_of_zeros_has_values_and_a_floor_of_zero():
    layer = MultiHeadAttention(12, 3)
    with torch.no_grad():
        layer.o_proj.weight.zero_()
    ((pre, post),) = (layer.values() for layer in spectra.of_layers([layer]))
    for mode in post.values():
        assert (mode["rank"], mode["entropy_rank"], mode["floor"], set(mode["values"])) == (0, 0.0, 0.0, {0.0})
    for mode in pre.values():  # control
        assert mode["values"][0] == 1.0 and mode["rank"] > 0 and mode["floor"] > 0


def test_without_models_it_says_what_to_run_first(tmp_path):
    with pytest.raises(ValueError, match="holds no model of table2; run `python -m reproduce table2 --preset smoke` first"):
        spectra.run(Options("smoke", tmp_path, tmp_path))


@pytest.mark.parametrize("choice", [{"rows": ("MHA",)}, {"seeds": (1,)}])
def test_a_choice_of_rows_or_seeds_is_refused_with_a_named_model(tmp_path, choice):
    (name,) = choice
    with pytest.raises(ValueError, match=f"--{name} chooses among models of table2: it does not go with --model"):
        spectra.run(Options("smoke", tmp_path, tmp_path, model="gpt2", **choice))
