"""The speed experiment at toy size: what it records, and what it refuses to time."""

import dataclasses

import pytest
import torch

from reproduce import records, speed
from reproduce.options import Options
from reproduce.rows import Row

SHAPE = speed.PRESETS["smoke"].shapes[0]
TUCKER = Row("Tucker", ranks=(8, 8, 8))


def test_every_section_is_recorded(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records"))
    found = {r["method"]: r["metrics"]["rows"] for r in records.load(tmp_path / "records", "speed")}
    assert list(found) == ["limits", "layers", "contexts", "decode", "models"]
    assert {row["what"] for row in found["limits"]} == {"copy", "matmul"}
    assert len(found["layers"]) == len(SHAPE.rows) * 2 and all(row["milliseconds"] > 0 for row in found["layers"])
    assert {row["tokens"] for row in found["contexts"]} == {32, 64}
    assert {row["side"] for row in found["decode"]} == {"MHA", "latents 32/32"}
    assert all(row["share_of_matmul"] > 0 for row in found["models"])


def test_sections_can_be_chosen(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records", rows=("limits",)))
    assert [r["method"] for r in records.load(tmp_path / "records", "speed")] == ["limits"]


def test_a_backend_that_refuses_has_a_reason_and_no_time():
    if torch.cuda.is_available():
        pytest.skip("on a GPU cuDNN runs")
    timed = speed.timed_layer(SHAPE, TUCKER, "cudnn", speed.PRESETS["smoke"], "cpu")
    assert set(timed) == {"refused"} and "backend 'cudnn' refuses" in timed["refused"]


def test_a_wrong_backend_is_not_timed(monkeypatch):
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    assert "milliseconds" in speed.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")
    from tucker_ref import tucker

    attend = tucker.attend
    monkeypatch.setattr(
        tucker, "attend", lambda *a, backend, **o: attend(*a, backend=backend, **o) * (1.01 if backend == "math" else 1)
    )
    assert "differs from the reference by 1" in speed.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")["refused"]
