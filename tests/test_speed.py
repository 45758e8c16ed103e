"""The speed experiment at toy size: what it records, and what it refuses to time."""

import dataclasses

import pytest
import torch

from reproduce.experiments import speed
from reproduce.models.rows import Row
from reproduce.report import speed as speed_report
from reproduce.report import targets
from reproduce.store import records
from reproduce.train.options import Options

SHAPE = speed.PRESETS["smoke"].shapes[0]
TUCKER = Row("Tucker", ranks=(8, 8, 8))


def test_every_section_is_recorded(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records"))
    found = {r.method: r.metrics["rows"] for r in records.load(tmp_path / "records", "speed")}
    assert list(found) == ["limits", "layers", "contexts", "memory", "decode", "models"]
    assert {row["what"] for row in found["limits"]} == {"copy", "matmul"}
    assert len(found["layers"]) == len(SHAPE.rows) * 2 and all(row["milliseconds"] > 0 for row in found["layers"])
    assert {row["tokens"] for row in found["contexts"]} == {32, 64}
    assert [(row["row"], row["again"]) for row in found["memory"]] == [
        ("MHA", False),
        ("Tucker [8,8,8]", False),
        ("Tucker [8,8,8]", True),
    ]
    assert {row["side"] for row in found["decode"]} == {"MHA", "latents 32/32"}
    assert all(row["share_of_matmul"] > 0 for row in found["models"])


def test_sections_can_be_chosen(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records", rows=("limits",)))
    assert [r.method for r in records.load(tmp_path / "records", "speed")] == ["limits"]


def test_a_section_that_is_broken_off_leaves_the_record_that_was_there(tmp_path, monkeypatch):
    options = Options("smoke", tmp_path, tmp_path / "records", rows=("limits",))
    speed.run(options)
    before = records.load(tmp_path / "records", "speed")

    def stopped(*_):
        yield {"what": "copy", "gigabytes_per_second": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "limit_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        speed.run(options)
    assert records.load(tmp_path / "records", "speed") == before


def test_a_backend_that_refuses_has_a_reason_and_no_time():
    if torch.cuda.is_available():
        pytest.skip("on a GPU cuDNN runs")
    timed = speed.timed_layer(SHAPE, TUCKER, "cudnn", speed.PRESETS["smoke"], "cpu")
    assert set(timed) == {"refused"} and "backend 'cudnn' refuses" in timed["refused"]


def test_a_stack_that_refuses_or_is_wrong_has_a_reason_and_no_time(monkeypatch):
    preset = speed.PRESETS["smoke"]
    if not torch.cuda.is_available():
        refused = speed.timed_stack(SHAPE, TUCKER, "cudnn", False, preset, "cpu")
        assert set(refused) == {"refused"} and "backend 'cudnn' refuses" in refused["refused"]
    monkeypatch.setattr(speed, "gate", lambda *_: 1.0)
    assert speed.timed_stack(SHAPE, TUCKER, "math", True, preset, "cpu") == {"refused": "differs from the reference by 1.0e+00"}


def test_a_wrong_backend_is_not_timed(monkeypatch):
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    assert "milliseconds" in speed.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")
    from tucker_ref import tucker

    attend = tucker.attend
    monkeypatch.setattr(
        tucker, "attend", lambda *a, backend, **o: attend(*a, backend=backend, **o) * (1.01 if backend == "math" else 1)
    )
    assert "differs from the reference by 1" in speed.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")["refused"]


def gpu_run() -> dict[str, list[dict]]:
    """Invented rows in the form of a GPU run's: only for the arithmetic of targets and claims."""

    def layer(row, backend, milliseconds, megabytes):
        return {"shape": "LLaMA", "row": row, "backend": backend, "milliseconds": milliseconds, "megabytes": megabytes}

    return {
        "layers": [
            layer("MHA", "cudnn", 10.0, 700.0),
            layer("MHA", "flash", 12.0, 700.0),
            layer("Tucker [32,128,128]", "cudnn", 9.0, 1000.0),
            layer("Tucker [32,128,128]", "triton", 11.0, 400.0),
            {"shape": "LLaMA", "row": "Tucker [32,64,64]", "backend": "cudnn", "refused": "for a reason"},
        ],
        "models": [{"model": "LLaMA", "row": r, "milliseconds": t} for r, t in (("MHA", 100.0), ("Tucker [32,64,64]", 85.0))],
    }


def verdict(sections: dict, words: str) -> tuple[str, str] | None:
    (target,) = [t for t in targets.TARGETS if words in t.what]
    return target.verdict(sections)


def test_targets_are_judged_from_the_best_backend_of_each_side():
    sections = gpu_run()
    assert verdict(sections, "peak memory") == ("0.4", "met")
    assert verdict(sections, "our kernel: time") == ("1.22", "met")
    assert verdict(sections, "LLaMA layer [32,128,128], forward") == ("0.9", "met")
    assert verdict(sections, "LLaMA layer [32,64,64], forward") is None  # refused: no time, no verdict
    sections["layers"][2]["milliseconds"] = 5.0  # control
    assert verdict(sections, "our kernel: time")[1].startswith("missed: ")
    assert verdict(sections, "LLaMA layer [32,128,128], forward") == ("0.5", "met")
    sections["layers"][1]["milliseconds"] = 2.0
    assert verdict(sections, "LLaMA layer [32,128,128], forward")[1].startswith("missed")


def test_decoding_that_is_refused_or_wrong_is_not_timed(monkeypatch):
    q, k, v = torch.ones(1, 2, 1, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    assert speed.timed_decode(q, k, v, "math", 1.0, preset, "cpu")["microseconds"] > 0
    assert "must be one of" in speed.timed_decode(q, k, v, "none", 1.0, preset, "cpu")["refused"]
    attend = speed.attend
    monkeypatch.setattr(
        speed, "attend", lambda *a, backend, **o: attend(*a, backend=backend, **o) * (1 + 0.1 * (backend == "math"))
    )
    assert "differs from the reference by 1" in speed.timed_decode(q, k, v, "math", 1.0, preset, "cpu")["refused"]


def test_decoding_is_timed_at_the_scale_of_the_heads(monkeypatch):
    attend, scales = speed.attend, set()
    monkeypatch.setattr(speed, "attend", lambda *a, scale, **o: scales.add(scale) or attend(*a, scale=scale, **o))
    for width, scale in ((16, 0.25), (64, 0.125)):
        scales.clear()
        preset = dataclasses.replace(
            speed.PRESETS["smoke"], decode=((9, 1),), decode_heads=(2, width), decode_latents=(8, 32), repeats=1
        )
        assert all("error" in row for row in speed.decode(preset, "cpu", speed.Limits(1.0, 1.0)))
        assert scales == {scale}  # of latents too
    assert speed.PRESETS["gpu"].decode_heads[1] ** -0.5 == 0.125


def test_a_shape_with_rotary_embedding_is_a_llama():
    shape = dataclasses.replace(SHAPE, rope_base=100.0)
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1, n_layers={SHAPE.name: 1})
    gpt2, llama = (speed.timed_model(s, Row("MHA"), 1.0, preset, "cpu") for s in (SHAPE, shape))
    assert gpt2["parameters"] != llama["parameters"] and llama["milliseconds"] > 0
    nameless = dataclasses.replace(preset, shapes=(shape,), n_layers={})
    assert not list(speed.models(nameless, "cpu", None))


def test_the_report_says_what_was_measured_alone():
    assert speed_report.short_table([], {}) is None
    committed = records.load(records.COMMITTED, "speed", "gpu")
    layers = [r for r in committed if r.method == "layers"]
    whole, part = ({t.name: t.shown() for t in speed_report.speed_tables(found)} for found in (committed, layers))
    assert set(part) == {"Speed, in short", "Speed, targets", "Speed, layers"} and "it copied at" not in part["Speed, in short"]
    assert len(whole) == 6 and "it copied at" in whole["Speed, in short"]  # control
    assert len(whole["Speed, in short"].splitlines()) == 2 + 2 + 4
    nothing = [dataclasses.replace(layers[0], metrics={"rows": []})]
    assert speed_report.speed_tables(nothing) == []


def test_a_context_without_multi_head_attention_has_no_ratio():
    rows = [{"tokens": 8, "batch": 2, "row": "Tucker [2,4,4]", "backend": "cudnn", "milliseconds": 3.0}]
    mha = {"tokens": 8, "batch": 2, "row": "MHA", "backend": "cudnn", "milliseconds": 4.0}
    assert "| 3.00 |" in speed_report.context_table(rows) and "| 3.00 (0.75) |" in speed_report.context_table([*rows, mha])
    refused = {"tokens": 8, "batch": 2, "row": "MHA", "backend": "flash", "refused": "too wide"}
    assert speed_report.context_table([*rows, mha, refused]).endswith("| 3.00 (0.75) | 4.00 (1.00) | refused |")


def test_a_target_that_is_missed_without_a_reason_has_none(monkeypatch):
    sections = gpu_run()
    table = speed_report.targets_table([], sections)
    assert "What the missed ones hang on" not in table.note
    sections["layers"][2]["milliseconds"] = 5.0
    assert "- Mixing a core" in speed_report.targets_table([], sections).note  # control


def test_the_report_of_models_names_what_was_refused():
    row = {"model": "GPT-2", "row": "MHA", "parameters": 10**6, "milliseconds": 2.0, "tokens_per_second": 5e3}
    row |= {"share_of_matmul": 0.25, "megabytes": None}
    lines = speed_report.model_table([row, {"model": "GPT-2", "row": "MQA", "refused": "out of memory"}]).splitlines()
    assert "| GPT-2 MHA |" in lines[2] and "25%" in lines[2] and "out of memory" in lines[3]
