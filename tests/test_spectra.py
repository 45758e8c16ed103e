"""The spectra experiment on models that it finds, and its refusal where there are none."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from reproduce.experiments import spectra
from reproduce.models.rows import TABLE2
from reproduce.store import records
from reproduce.train.language import build_model, model_path, save_model
from reproduce.train.options import Options
from tucker_ref import MultiHeadAttention

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
