"""The benchmark of the compression: it measures, and shows no ratio where the two results differ."""

import dataclasses
import itertools
import multiprocessing
import sys

import pytest
import torch

from reproduce.experiments import compress_speed
from reproduce.report import results
from reproduce.store import records
from reproduce.train.options import Options
from tucker_ref import MultiHeadAttention

pytest.importorskip("tensorly", reason="tensorly is not installed; it is in the dev extra")


def test_both_ways_find_the_same_truncated_hosvd():
    torch.manual_seed(0)
    layer = MultiHeadAttention(64, 4).double()
    ours, dense = (way(layer, (3, 10, 12)) for way in (compress_speed.from_factors, compress_speed.from_tensors))
    assert ours == pytest.approx(dense, rel=1e-10)
    assert ours != pytest.approx(compress_speed.from_factors(layer, (3, 10, 11)), rel=1e-3)  # control


@pytest.mark.parametrize(("seconds", "times"), [(61, 1), (59, compress_speed.REPEATS)])
def test_what_takes_over_a_minute_is_done_once(monkeypatch, seconds, times):
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(compress_speed.time, "perf_counter", lambda: next(clock))
    ran = []
    found = compress_speed._measure(lambda layer, ranks: ran.append(ranks), 64, torch.get_num_threads())
    assert found["seconds"] == seconds and len(ran) == 1 + times  # the first one loads


def test_a_run_is_recorded_and_reported(monkeypatch, tmp_path):
    monkeypatch.setitem(compress_speed.PRESETS, "smoke", (64, 128))
    compress_speed.run(Options("smoke", tmp_path, tmp_path / "records"))
    (record,) = records.load(tmp_path / "records", "compress_speed", "smoke")
    for size in record.metrics["sizes"]:
        assert all(size[way]["seconds"] > 0 and size[way]["megabytes"] > 0 for way in ("factors", "tensors"))
    text = results.render([record])
    assert "| 64, 1 " in text and "| 128, 2 " in text and "Seconds grow as d to the" in text


def test_no_ratio_is_shown_where_the_results_differ(monkeypatch, tmp_path):
    def measured(way, d_model):
        norm = 1.0 if way is compress_speed.from_factors else 1.0 + 1e-4
        return {"seconds": 1.0, "megabytes": 1.0, "norms": [norm, 1.0]}

    monkeypatch.setattr(compress_speed, "measured", measured)
    with pytest.raises(ValueError, match="d = 128: the norms .* differ; no ratio is shown"):
        compress_speed.run(Options("smoke", tmp_path, tmp_path / "records"))
    assert not records.load(tmp_path / "records")


def test_a_measurement_is_a_median_with_its_peak():
    found = compress_speed._measure(
        compress_speed.from_factors, 128, torch.get_num_threads()
    )  # in a process of its own otherwise
    assert found["repeats"] == compress_speed.REPEATS and found["seconds"] > 0 and found["megabytes"] > 0
    assert len(found["norms"]) == 2 and all(norm > 0 for norm in found["norms"])


@pytest.mark.parametrize("former", ["a large block", "many small ones, the last of them kept"])
def test_a_known_allocation_is_seen_below_what_the_process_had_once(former):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (small, hidden), (large, hidden_too) = pool.apply(of_known_size, (former, (4, 64)))
    assert (small, large) == pytest.approx((4, 64), rel=0.1)
    assert hidden < 2 and hidden_too < 2  # control: how far the peak of all rises


def of_known_size(former: str, sizes: tuple[int, ...]) -> list[tuple[float, float]]:
    """What two ways of counting see of allocations of some MB, in a process that had held 300 MB before."""
    count, size = (1, 300 * 10**6) if former == "a large block" else (3000, 10**5)
    held = [b"x" * size for _ in range(count)]
    del held[: max(1, count - 1)]  # an allocator gives a heap back from its end on
    calls = [lambda some=10 * size: [torch.ones(10**5, dtype=torch.uint8) for _ in range(some)] for size in sizes]
    peak, hidden = compress_speed._peak_bytes(), []
    for call in calls:
        call()
        hidden.append((compress_speed._peak_bytes() - peak) / 1e6)
    return list(zip(map(compress_speed.added_megabytes, calls), hidden))


def test_a_call_that_takes_nothing_adds_nothing():
    assert compress_speed.added_megabytes(lambda: None) < 0.5
    assert compress_speed.added_megabytes(lambda: torch.ones(10**6)) > 3.5  # control


def test_memory_is_counted_where_nothing_can_be_given_back_too(monkeypatch):
    monkeypatch.setattr(compress_speed.ctypes, "CDLL", lambda name: object())
    assert compress_speed.added_megabytes(lambda: torch.ones(8 * 10**6)) > 30


def test_two_results_that_differ_have_no_ratio(monkeypatch, tmp_path):
    found = {"seconds": 1.0, "megabytes": 1.0, "repeats": 1}
    norms = iter(([1.0, 2.0], [1.0, 2.00001]))
    monkeypatch.setattr(compress_speed, "measured", lambda way, d_model: found | {"norms": next(norms)})
    with pytest.raises(ValueError, match="differ; no ratio is shown"):
        compress_speed.run(Options("smoke", tmp_path, tmp_path))
    assert not records.load(tmp_path)


def test_without_tensorly_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ValueError, match="compress_speed compares with TensorLy: pip install tensorly"):
        compress_speed.run(Options("smoke", tmp_path, tmp_path))


def test_of_one_size_nothing_is_said_to_grow(tmp_path):
    (record,) = records.load(records.COMMITTED, "compress_speed", "paper")
    one = dataclasses.replace(record, metrics={"sizes": record.metrics["sizes"][:1]})
    records.append(tmp_path, one)
    text = results.render(records.load_some(tmp_path))
    assert "| 256, 4 " in text and " grow as d " not in text and "Peak memory is what the call adds" in text
    assert " grow as d " in results.render([record])  # control
