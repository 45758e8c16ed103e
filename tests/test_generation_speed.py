"""The experiment of generation at toy size: what it records, skips, refuses and shows."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import DIFFERENT, run_here

from reproduce.experiments import generation_speed as experiment
from reproduce.experiments.generation_speed import PRESETS, Setting, build, gated, measured, settings
from reproduce.models import plain_decoding
from reproduce.models.decoding import Decoder
from reproduce.models.rows import TABLE3, Row
from reproduce.report import results
from reproduce.store import records
from reproduce.train.options import Options

SMOKE = PRESETS["smoke"]
GPT2, LLAMA = SMOKE.shapes
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def test_every_setting_is_recorded_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMOKE, batches=(2,), steps=8, repeats=1))
    real, seen = experiment.measured, []

    def stops(setting, *rest):
        seen.append(setting)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(setting, *rest)

    monkeypatch.setattr(experiment, "measured", stops)
    options = Options("smoke", tmp_path, tmp_path / "records")
    with pytest.raises(KeyboardInterrupt):
        experiment.run(options)
    assert len(records.load(tmp_path / "records")) == 2
    experiment.run(options)
    found = records.load(tmp_path / "records", to_show=True)
    everything = list(settings(PRESETS["smoke"]))
    assert len(found) == len(everything) == len({r.id for r in found}) and len(seen) == len(everything) + 1
    for record, setting in zip(found, everything):
        assert (record.method, record.config["way"]) == (setting.row.label, setting.way)
        assert record.metrics["tokens_per_second"] == pytest.approx(2e3 / record.metrics["milliseconds"])
        assert ("error_float64" in record.metrics) == (setting.way != "transformers")
    assert "| GPT-2 MHA, PyTorch |" in results.render(found) and run_here("generation_speed", "--rows", "MHA") == 1


def test_a_setting_that_fails_costs_no_other_and_is_tried_again(tmp_path, monkeypatch):
    """Nor does a gate that breaks off: its way is left, after one attempt."""
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMOKE, shapes=(GPT2,), batches=(1, 2), contexts=(32, 64)))
    asked = []
    monkeypatch.setattr(experiment, "gated", lambda s, *_: asked.append(s.way) or (1 / 0 if s.way == "PyTorch" else {}))

    def fails(setting, *_):
        if setting.context == 64 and setting.batch == 1:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        return {"refused": "for a reason"}

    monkeypatch.setattr(experiment, "measured", fails)
    options = Options("smoke", tmp_path, tmp_path / "records", rows=("GPT-2 MHA",))
    with pytest.raises(ValueError, match=r"GPT-2 MHA, static, sdpa, 64 x 1 \(RuntimeError: CUDNN_.*PyTorch, 32 x 1 \(ZeroDiv"):
        experiment.run(options)
    found = records.load(tmp_path / "records")
    assert len(found) == 3 * 2 and asked == ["static, sdpa", "PyTorch", "transformers"]
    assert not any(r.config["way"] == "PyTorch" or (r.config["context"], r.config["batch"]) == (64, 1) for r in found)
    monkeypatch.setattr(experiment, "gated", lambda *_: {})
    monkeypatch.setattr(experiment, "measured", lambda *_: {"refused": "for a reason"})
    experiment.run(options)  # control: nothing fails
    assert len(records.load(tmp_path / "records")) == 3 * 4


def test_models_are_chosen_by_name_and_each_way_has_all_rows_before_the_next():
    """And the longest compilations come last, so that what a cut leaves out is what is missed least."""
    ways = [s.way for s in settings(PRESETS["gpu"])]
    assert list(dict.fromkeys(ways)) == ["static, triton", "static, sdpa", *experiment.OTHERS]
    assert ways == sorted(ways, key=list(dict.fromkeys(ways)).index)
    with pytest.raises(ValueError, match="no row is called GPT; there are: GPT-2; GPT-2 MHA"):
        experiment.run(Options("smoke", Path(), Path(), rows=("GPT",)))


@pytest.mark.no_cover
def test_rows_are_chosen_and_those_of_the_gpu_are_whole_models(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "compared_and_measured", lambda *_: {"refused": "for a reason"})
    experiment.run(Options("smoke", tmp_path, tmp_path / "records", rows=("LLaMA",)))
    assert {r.config["model"] for r in records.load(tmp_path / "records")} == {"LLaMA"}
    monkeypatch.undo()
    experiment.run(Options("smoke", tmp_path, tmp_path / "one", rows=("LLaMA MLA shared d_c=8 d_R=64",)))
    assert {r.method for r in records.load(tmp_path / "one")} == {"MLA shared d_c=8 d_R=64"}
    gpu = list(settings(PRESETS["gpu"]))
    assert {(s.context, s.batch) for s in gpu} == {(n, b) for n in (1024, 16384, 131072) for b in (1, 16, 64)}
    assert {s.way for s in gpu} == {"static, sdpa", "static, triton", "PyTorch", "transformers"}
    assert {s.row.mechanism for s in gpu if s.way in experiment.OTHERS} == {"MHA"}
    with torch.device("meta"):
        layer = Row("MLA", latent=128, shared_kv=True, rope_dim=64).build(2048, 32, 1e4)
    assert layer.cache_streams() == {"key": (1, 192)} and not layer.coupled
    assert TABLE3[4].build(256, 32, 1e4).coupled  # control


@pytest.mark.parametrize("shape", SMOKE.shapes, ids=lambda shape: shape.name)
def test_a_way_that_differs_is_not_timed(monkeypatch, shape):
    for way in ("static, sdpa", "PyTorch"):
        setting = Setting(shape, Row("MHA"), way, 16, 2)
        assert gated(setting, SMOKE, "cpu")["error_float64"] < 1e-12
    seen = plain_decoding.PlainAttention.forward
    blind = torch.ones(1, 40, dtype=torch.bool)
    monkeypatch.setattr(plain_decoding.PlainAttention, "forward", lambda *a, mask, **o: seen(*a, mask=blind, **o))
    refused = gated(setting, SMOKE, "cpu")["refused"]
    assert refused.startswith("differs from the model without a cache by ") and float(refused.split()[8]) > DIFFERENT


def test_a_cache_is_made_in_the_type_that_it_is_timed_in(monkeypatch):
    """One of float32, of which bfloat16 is made, takes twice the memory before any is timed."""
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **o: made.append(zeros(*a, **o)) or made[-1])
    model = build(Setting(GPT2, Row("MHA"), "PyTorch", 16, 2), 64, "cpu", torch.bfloat16)
    caches = [x for x in made if x.ndim == 4]
    assert len(caches) == 2 * GPT2.n_layers and {x.dtype for x in caches} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert plain_decoding.PlainAttention(96, 12, None, 2, 16).k_cache.dtype == torch.float32  # control


def test_our_kernel_is_compared_in_its_own_type_alone():
    pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")
    assert set(gated(Setting(GPT2, GPT2.rows[1], "static, triton", 16, 2), SMOKE, "cpu")) == {"error"}


def test_what_is_refused_has_a_reason_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "gated", lambda *_: {"refused": "wrong"})
    experiment.run(Options("smoke", tmp_path, tmp_path, rows=("GPT-2 MHA",)))
    found = records.load(tmp_path, to_show=True)
    assert all(r.metrics == {"refused": "wrong"} for r in found) and "| refused |" in results.render(found)
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda _: None)
    setting = Setting(GPT2, Row("MHA"), "transformers", 16, 1)
    assert gated(setting, SMOKE, "cpu") == {"refused": "transformers is not installed"}


def test_memory_that_does_not_suffice_is_recorded_and_other_errors_are_not(monkeypatch):
    setting = Setting(GPT2, Row("MHA"), "static, sdpa", 32, 1)
    for text in ("CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"):
        monkeypatch.setattr(experiment, "timed", lambda *_, text=text: (_ for _ in ()).throw(RuntimeError(text)))
        assert measured(setting, SMOKE, "cpu") == {"refused": "out of memory"}
    monkeypatch.setattr(experiment, "timed", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        measured(setting, SMOKE, "cpu")

    def broken_off(*_):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(experiment, "timed", broken_off)
    assert measured(setting, SMOKE, "cpu") == {"refused": "out of memory"}


def test_what_is_measured_of_a_setting(monkeypatch):
    monkeypatch.setattr(experiment, "timed", lambda *_: 2.0)
    said = measured(Setting(GPT2, GPT2.rows[0], "static, sdpa", 32, 2), SMOKE, "cpu")
    each = 2 * 2 * 32 * 96 * 4  # bytes of keys and values of two layers
    assert said.pop("parameters") > 0 and said.pop("cache_megabytes") * 1e6 == 2 * each
    assert said == {"milliseconds": 2.0, "tokens_per_second": 1000.0}


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed; it is in the dev extra")
@pytest.mark.parametrize("shape", SMOKE.shapes, ids=lambda shape: shape.name)
@torch.no_grad()
def test_transformers_goes_on_from_a_full_cache(shape):
    decoder = plain_decoding.TransformersDecoder(Setting(shape, Row("MHA"), "transformers", 24, 2), 64, torch.float32, "cpu")
    before = [stream.normal_().clone() for stream in decoder.streams()]
    decoder.rewind(16)
    decoder.capture()
    decoder.write(8)
    for stream, old in zip(decoder.streams(), before):
        changed = (stream != old).any(dim=(0, 1, 3))
        assert changed.tolist() == [False] * 15 + [True] * 8 + [False]  # the last token is not read any more
    ours = build(Setting(shape, Row("MHA"), "static, sdpa", 24, 2), 64, "cpu", torch.float32)
    theirs, mine = (sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (decoder.model, ours))
    assert theirs == mine


def test_the_faster_of_our_kernels_is_shown_and_a_reason_where_neither_ran():
    base = {"precision": "bfloat16", "repeats": 5, "steps": 32, "model": "LLaMA"}
    timed = {"tokens_per_second": 100.0, "parameters": 10**9, "cache_megabytes": 100.0}

    def record(way, context, batch, **metrics):
        config = base | {"way": way, "context": context, "batch": batch}
        return dataclasses.replace(
            records.new_record("generation_speed", "gpu", "MHA", config, metrics), device="a card", commit="abc"
        )

    found = [
        record("static, sdpa", 1024, 1, **timed),
        record("static, triton", 1024, 1, **timed | {"tokens_per_second": 200.0}),
        record("static, sdpa", 1024, 16, **timed | {"cache_megabytes": 1600.0}),
        record("static, triton", 1024, 16, refused="out of memory"),
        record("static, sdpa", 2048, 1, refused="out of memory"),
        record("static, triton", 2048, 1, refused="too wide"),
    ]
    shown = results.render(found)
    assert shown.startswith("### Generation\n\n**Generation: tokens a second")
    assert "| LLaMA MHA | 200 | 100 | out of memory or refused | not run |" in shown
    assert "| LLaMA MHA | 780 | — |" in shown and "on one a card" in shown
    lines = [line for line in results.render(two_in_turns(found[0])).splitlines() if " MHA" in line]
    assert [line.split(" |")[0] for line in lines[:3]] == ["| GPT-2 MHA", "| LLaMA MHA", "| LLaMA MHA, PyTorch"]


def two_in_turns(one):
    """As two commands on two GPUs write them."""
    changes = ({"way": "PyTorch"}, {"model": "GPT-2"}, {})
    return [dataclasses.replace(one, config=one.config | change) for change in changes]


def test_a_decoder_of_ours_is_what_is_timed():
    decoder = experiment.decoder_of(Setting(LLAMA, LLAMA.rows[1], "static, sdpa", 16, 2), *models_of(), "cpu")
    assert isinstance(decoder, Decoder) and decoder.greedy and decoder.model.blocks[0].attention.absorb


def models_of():
    return (build(Setting(LLAMA, LLAMA.rows[1], "static, sdpa", 16, 2), 64, "cpu", torch.float32),)
