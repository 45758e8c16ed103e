"""The speed experiment at toy size: what it records, and what it refuses to time."""

import dataclasses
import functools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import committed_records

from reproduce.experiments import speed
from reproduce.experiments.speed import curves, decoding, layers, models, presets, sections
from reproduce.models.rows import Row
from reproduce.report import budgets, claims, headline, powers, since, targets
from reproduce.report import speed as speed_report
from reproduce.store import records
from reproduce.train import runs
from reproduce.train.options import Options

ROOT = Path(__file__).parent.parent

SHAPE = speed.PRESETS["smoke"].shapes[0]
TUCKER = Row("Tucker", ranks=(8, 8, 8))


def test_every_section_is_recorded(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records"))
    found = {r.method: r.metrics["rows"] for r in records.load(tmp_path / "records", "speed")}
    assert list(found) == ["limits", "layers", "contexts", "memory", "decode", "models", "step", "curves"]
    assert {row["what"] for row in found["limits"]} == {"copy", "matmul"}
    assert len(found["layers"]) == len(SHAPE.rows) * 2 and all(row["milliseconds"] > 0 for row in found["layers"])
    assert {row["tokens"] for row in found["contexts"]} == {32, 64}
    both = [(row, way) for row in ("MHA", "Tucker [8,8,8]") for way in layers.WAYS]
    assert [(row["row"], row["way"]) for row in found["memory"]] == both
    assert [(row["row"], row["way"]) for row in found["step"]] == [(row, way) for row, way in both if way in layers.WAYS[:2]]
    assert all(row["batch"] == SHAPE.batch and row["tokens_per_second"] > 0 for row in found["step"])
    assert len(found["curves"]) == 3 * 3 * 2 and all(row["microseconds"] > 0 for row in found["curves"])
    table = speed_report.curve_table(found["curves"])
    assert "| d 24 to 96 | MHA | 0.0 to 0.0: 2.00 | 0.0 to 0.0: 1.00 |" in table  # 4 d^2 parameters, 2 d a token
    assert ": 0.00 | 0.0 to 0.0: 1.00 |" in table.splitlines()[-1] and "| — |" in table  # a CPU counts no memory
    assert [path.name for path in tmp_path.iterdir()] == ["records"]  # nothing of a section that ended is left
    assert {row["side"] for row in found["decode"]} == {"MHA", "latents 32/32", "MLA d_c=16 d_R=8"}
    assert all(row["microseconds_in_a_row"] > 0 and row["copy_microseconds"] > 0 for row in found["decode"])
    assert all(row["share_of_matmul"] > 0 for row in found["models"])


def test_sections_can_be_chosen(tmp_path):
    speed.run(Options("smoke", tmp_path, tmp_path / "records", rows=("limits",)))
    assert [r.method for r in records.load(tmp_path / "records", "speed")] == ["limits"]


def test_a_section_that_is_broken_off_leaves_the_record_that_was_there(tmp_path, monkeypatch):
    options = Options("smoke", tmp_path, tmp_path / "records", rows=("limits",))
    speed.run(options)
    before = records.load(tmp_path / "records", "speed")

    def stopped(*_):
        yield {"what": "copy"}, lambda: {"gigabytes_per_second": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "limit_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        speed.run(options)
    assert records.load(tmp_path / "records", "speed") == before


def counted(stop: int, config: dict, partial) -> tuple[list[dict], int]:
    """The rows of a section of four, and how many of them were measured; it is stopped at one of them."""
    measured = []

    def measure(number):
        if number == stop:
            raise KeyboardInterrupt
        measured.append(number)
        return {"value": 10 * number}

    try:
        rows, _ = sections.through("toy", (({"number": n}, lambda n=n: measure(n)) for n in range(4)), partial, config, "cpu")
    except KeyboardInterrupt:
        rows = []
    return rows, len(measured)


def test_a_section_that_is_stopped_goes_on_where_it_was(tmp_path):
    partial = tmp_path / "toy.json"
    assert counted(2, {"device": "A"}, partial) == ([], 2)
    whole = [{"number": n, "value": 10 * n} for n in range(4)]
    assert counted(-1, {"device": "A"}, partial) == (whole, 2)
    assert counted(-1, {"device": "B"}, partial) == (whole, 4)  # control: of another device nothing is taken over
    partial.write_text('{"rows": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match="delete it to start this section again"):
        counted(-1, {"device": "B"}, partial)


def test_what_fails_in_one_row_costs_no_other_and_is_tried_again(tmp_path):
    """A GPU is lent for minutes: a kernel that breaks off must not end what comes after it, nor be on record."""
    partial, broken = tmp_path / "toy.json", {2}

    def measure(number):
        if number in broken:
            raise RuntimeError(f"of row {number}\nand more")
        return {"value": 10 * number}

    def through():
        cases = (({"number": n}, lambda n=n: measured.append(n) or measure(n)) for n in range(4))
        return sections.through("toy", cases, partial, {}, "cpu")[0]

    measured = []
    with pytest.raises(ValueError, match=r"^failed: toy, number 2 \(RuntimeError: of row 2\)\. All else is kept"):
        through()
    assert measured == [0, 1, 2, 3]
    kept = json.loads(partial.read_text(encoding="utf-8"))["rows"]
    assert [row["number"] for row in kept] == [0, 1, 3]
    measured, broken = [], set()
    assert [row["value"] for row in through()] == [0, 10, 20, 30] and measured == [2]


def test_a_row_that_is_measured_again_leaves_later_ones_in_the_file(tmp_path):
    partial, rows = tmp_path / "toy.json", [{"number": n, "value": n} for n in (0, 2)]
    partial.write_text(json.dumps({"config": {}, "rows": rows, "seconds": 1.0}), encoding="utf-8")

    cases = [({"number": n}, lambda n=n: {"value": n}) for n in range(3)]
    sections.through("toy", iter(cases[:2]), partial, {}, "cpu")
    assert [row["number"] for row in json.loads(partial.read_text(encoding="utf-8"))["rows"]] == [0, 1, 2]


def test_a_device_that_no_longer_works_ends_all(monkeypatch):
    """After an illegal access every later call fails, and says nothing of what was asked."""
    failures = runs.Failures("cpu")
    with failures.kept("first"):
        raise RuntimeError("one kernel")

    def gone(*_, **__):
        raise RuntimeError("an illegal memory access")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="illegal memory access"):
        patch.setattr(torch, "ones", gone)
        with failures.kept("second"):
            raise RuntimeError("another kernel")
    with pytest.raises(ValueError, match="first .RuntimeError: one kernel.; second"):
        failures.tell()


@pytest.mark.parametrize("most", [4, 5, 9, 12])
@pytest.mark.parametrize("bent", [-2.0, 0.0, 2.0], ids=["fewer", "as predicted", "more"])
def test_the_largest_batch_fits_and_the_next_does_not(most, bent):
    """bent: how far from the straight line through the first batch memory is where it runs out, in batches."""
    tried = []

    def peak(batch):
        tried.append(batch)
        return None if batch > most else 10.0 + batch

    limit = 10.0 + max(4, most + bent) + 0.5
    assert models.largest_batch(peak, 4, 14.0, 10.0, limit) == most
    assert most + 1 in tried and len(tried) <= 4


def test_what_two_batches_took_leads_to_the_third():
    """Beside weights and moments something else is held, which one batch alone does not show."""
    tried = []

    def peak(batch):
        tried.append(batch)
        return None if 25e9 + 4.8e9 * batch > 80e9 else 25e9 + 4.8e9 * batch

    assert models.largest_batch(peak, 4, 25e9 + 4 * 4.8e9, 19e9, 80e9) == 11 and tried == [9, 11, 12]


def test_a_step_takes_the_largest_batch(monkeypatch):
    def timed(shape, *_):
        if shape.batch > 6:
            return {"refused": "out of memory"}
        return {"megabytes": 20e3 + 1e4 * shape.batch, "parameters": 10**9, "milliseconds": 1.0 * shape.batch}

    monkeypatch.setattr(models, "timed_model", timed)
    preset = speed.PRESETS["smoke"]
    found = models.timed_step(dataclasses.replace(SHAPE, batch=4), TUCKER, True, 1.0, preset, "cpu")
    assert found["batch"] == 6 and found["milliseconds"] == 6.0
    refused = models.timed_step(dataclasses.replace(SHAPE, batch=7), TUCKER, True, 1.0, preset, "cpu")
    assert refused == {"refused": "out of memory"}


@pytest.mark.parametrize("module", [layers, models])
def test_memory_that_does_not_suffice_is_a_reason_and_another_error_is_none(module, monkeypatch):
    preset = speed.PRESETS["smoke"]

    def timed():
        if module is layers:
            return layers.timed_stack(SHAPE, TUCKER, "math", "plain", preset, "cpu")
        return models.timed_model(SHAPE, TUCKER, 1.0, preset, "cpu")

    def raises(error):
        monkeypatch.setattr(module, "peak_megabytes", lambda *_, **__: (_ for _ in ()).throw(error))

    broken_off = RuntimeError("a compilation failed")
    broken_off.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for error in (broken_off.__context__, broken_off):
        raises(error)
        assert timed() == {"refused": "out of memory"}
    raises(RuntimeError("a compilation failed"))
    with pytest.raises(RuntimeError, match="a compilation failed"):
        timed()


def test_powers_are_found_and_two_points_have_none():
    sizes = [1.0, 2.0, 4.0, 8.0]
    exponent, factor = powers.fitted_power(sizes, [3 * n**1.5 for n in sizes])
    assert (exponent, factor) == pytest.approx((1.5, 3), abs=1e-12) and powers.in_words(-0.001) == "0.00"
    assert abs(powers.fitted_power(sizes, [3 + n**1.5 for n in sizes])[0] - 1.5) > 0.1  # control
    assert powers.fitted_power(sizes[:2], sizes[:2]) is None


def test_points_are_of_one_size_one_row_and_what_was_measured():
    first = {"along": "d", "value": 512, "row": "MHA", "parameters": 2e6, "megabytes": None}
    rows = [first, first | {"value": 1024, "parameters": 4e6}, first | {"value": 2048, "refused": "out of memory"}]
    rows += [first | {"along": "N"}, first | {"row": "MQA"}]
    del rows[2]["parameters"]
    assert powers.points_of(rows, "d", "MHA", "parameters") == ([512, 1024], [2, 4])
    assert powers.points_of(rows, "d", "MHA", "megabytes") == powers.points_of(rows, "d", "MHA", "microseconds") == ([], [])


def test_curves_say_where_they_begin_and_end():
    def ends(last: float) -> str:
        rows = [
            {"along": "d", "value": n, "row": "MHA", "parameters": p, "megabytes": p / 1e3}
            for n, p in zip((1, 2, 4), (1e6, 2e6, last))
        ]
        return speed_report.curve_table(rows).splitlines()[-1]

    assert ends(4e6) == "| d 1 to 4 | MHA | 1.0 to 4.0: 1.00 | — | — | 1,000 to 4,000: 1.00 | — |"
    assert "1.0 to 16.0: 2.00" in ends(16e6)  # control


def test_sizes_along_the_curves_are_those_of_layers_with_memory():
    for row in (Row("MHA"), TUCKER):
        layer = row.build(SHAPE.d_model, SHAPE.n_heads)
        cache = layer.new_cache(1, SHAPE.tokens, dtype=torch.bfloat16)
        expected = {"parameters": sum(p.numel() for p in layer.parameters()), "cache_bytes": cache.nbytes}
        assert curves.counted(SHAPE, row, torch.bfloat16) == expected


def test_a_point_that_refuses_to_train_or_to_decode_has_a_reason(monkeypatch):
    preset = speed.PRESETS["smoke"]
    assert "microseconds" in curves.timed_point(SHAPE, TUCKER, 1.0, preset, "cpu")
    for name in ("timed_layer", "timed_decode"):
        with monkeypatch.context() as patch:
            patch.setattr(curves, name, lambda *_: {"refused": "for a reason"})
            assert curves.timed_point(SHAPE, TUCKER, 1.0, preset, "cpu") == {"refused": "for a reason"}


def test_tables_of_memory_and_steps_hold_ratios_to_what_keeps_all():
    case = {"row": "MHA", "backend": "cudnn", "way": "plain", "layers": 8}
    rows = [
        case | {"milliseconds": 40.0, "megabytes": 3000.0, "kept_megabytes": 2000.0},
        case | {"way": "queries again", "milliseconds": 42.0, "megabytes": 1500.0, "kept_megabytes": 1000.0},
        case | {"way": "budget 0.6", "refused": "out of memory"},
        case | {"row": "MQA", "milliseconds": 1.0, "megabytes": None, "kept_megabytes": None},
    ]
    lines = speed_report.memory_table(rows).splitlines()[2:]
    assert "42.0 (1.05) | 1,000 (0.50) | 1,500 (0.50)" in lines[1]
    assert lines[2].endswith("| refused | refused | refused |") and lines[3].endswith("| 1.0 (1.00) | — | — |")
    step = {"model": "LLaMA", "row": "MHA", "way": "plain", "tokens": 4096, "batch": 8, "milliseconds": 500.0}
    step |= {"tokens_per_second": 64e3, "megabytes": 79e3}
    table = speed_report.step_table([step, step | {"batch": 12, "tokens_per_second": 66e3}])
    assert "sequences of 4,096" in table and "12 (1.50)" in table and "66,000 (1.03)" in table


def test_a_backend_that_refuses_has_a_reason_and_no_time():
    if torch.cuda.is_available():
        pytest.skip("on a GPU cuDNN runs")
    timed = layers.timed_layer(SHAPE, TUCKER, "cudnn", speed.PRESETS["smoke"], "cpu")
    assert set(timed) == {"refused"} and "backend 'cudnn' refuses" in timed["refused"]


def test_a_stack_that_refuses_or_is_wrong_has_a_reason_and_no_time(monkeypatch):
    preset = speed.PRESETS["smoke"]
    if not torch.cuda.is_available():
        refused = layers.timed_stack(SHAPE, TUCKER, "cudnn", "plain", preset, "cpu")
        assert set(refused) == {"refused"} and "backend 'cudnn' refuses" in refused["refused"]
    monkeypatch.setattr(layers, "gate", lambda *_: 1.0)
    assert layers.timed_stack(SHAPE, TUCKER, "math", "plain", preset, "cpu") == {
        "refused": "differs from the reference by 1.0e+00"
    }


def test_the_layers_of_a_stack_share_one_compilation(monkeypatch):
    graphs, plain = [], torch.compile
    counted = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda *a, **o: plain(*a, **o, backend=counted))
    torch.compiler.reset()
    x, stack = (
        torch.randn(1, 5, SHAPE.d_model),
        [TUCKER.build(SHAPE.d_model, SHAPE.n_heads) for _ in range(10)],
    )  # two beyond the limit
    with torch.no_grad():
        found = [layer(x, backend="math") for layer in layers.compiled_alike(stack, "cuda:1")]
        assert len(graphs) == 1 and all(torch.allclose(y, layer(x, backend="math")) for y, layer in zip(found, stack))
        assert not torch.allclose(found[0], found[1])
        for layer in stack[:3]:  # control: as a layer alone is compiled
            layers.compiled(layer, "cuda")(x, backend="math")
    assert len(graphs) == 4 and layers.compiled_alike(stack, "cpu") == stack
    torch.compiler.reset()


def test_a_wrong_backend_is_not_timed(monkeypatch):
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    assert "milliseconds" in layers.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")
    from tucker_ref import tucker

    attend = tucker.attend
    monkeypatch.setattr(
        tucker, "attend", lambda *a, backend, **o: attend(*a, backend=backend, **o) * (1.01 if backend == "math" else 1)
    )
    assert "differs from the reference by 1" in layers.timed_layer(SHAPE, TUCKER, "math", preset, "cpu")["refused"]


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


def test_targets_of_memory_are_judged_against_what_keeps_all_with_the_same_kernels():
    def stack(way, milliseconds, megabytes, backend="cudnn"):
        sizes = {"milliseconds": milliseconds, "megabytes": megabytes}
        return {"row": "Tucker [32,64,64]", "backend": backend, "way": way, **sizes}

    rows = [stack("plain", 10.0, 1000.0), stack("queries again", 10.4, 500.0), stack("plain", 1.0, 1.0, "triton")]
    assert verdict({"memory": rows}, "[32,64,64], queries made again: peak") == ("0.5", "met")
    assert verdict({"memory": rows}, "[32,64,64], queries made again: time") == ("1.04", "met")
    assert verdict({"memory": rows}, "[32,128,128], queries made again: time") is None
    rows[1] = stack("queries again", 11.0, 600.0)  # control
    assert verdict({"memory": rows}, "[32,64,64], queries made again: peak") == ("0.6", f"missed: {targets.KEPT}")
    assert verdict({"memory": rows[1:]}, "[32,64,64], queries made again: time") is None


def test_decoding_that_is_refused_or_wrong_is_not_timed(monkeypatch):
    q, cache = torch.ones(1, 2, 1, 8), [(torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8))]
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    assert decoding.timed_decode(q, cache, "math", 1.0, preset, "cpu")["microseconds"] > 0
    assert "must be one of" in decoding.timed_decode(q, cache, "none", 1.0, preset, "cpu")["refused"]
    attend = decoding.attend
    monkeypatch.setattr(
        decoding, "attend", lambda *a, backend, **o: attend(*a, backend=backend, **o) * (1 + 0.1 * (backend == "math"))
    )
    assert "differs from the reference by 1" in decoding.timed_decode(q, cache, "math", 1.0, preset, "cpu")["refused"]


def test_in_a_row_every_call_reads_a_cache_of_its_own(monkeypatch):
    preset, side = speed.PRESETS["smoke"], presets.Side("MLA", 1, 24, 16, shared=True)
    caches = [decoding.drawn(side, 9, 2, torch.float32, "cpu") for _ in range(3)]
    attend, read = decoding.attend, []
    monkeypatch.setattr(decoding, "attend", lambda q, k, v, **o: read.append(k.data_ptr()) or attend(q, k, v, **o))
    timed = decoding.timed_decode(torch.ones(2, 4, 1, 24), caches, "math", 1.0, preset, "cpu")
    addresses = [k.data_ptr() for k, _ in caches]
    assert read[-len(caches) * (preset.repeats + 2) :] == addresses * (preset.repeats + 2)
    assert timed["bytes"] == 2 * 9 * 24 * 4  # values are a view
    alone = decoding.drawn(dataclasses.replace(side, shared=False), 9, 2, torch.float32, "cpu")
    assert decoding.cache_bytes(*alone) == 2 * 9 * (24 + 16) * 4  # control


def test_mechanisms_are_timed_with_caches_of_as_many_bytes():
    """Up to a token of each sequence; and multi-head attention and latents after as many tokens, too."""
    found = {}
    for side, context, batch in speed.PRESETS["gpu"].decode:
        found.setdefault(side.name, []).append((context, batch, context * batch * 2**30 // side.context(2**30, 1, 2)))
    assert len(found) == 5 and sum(map(len, found.values())) == len(speed.PRESETS["gpu"].decode) == 27
    for size in (2**24, 2**26, 2**28, 2**30):
        for cases in found.values():
            assert any(batch == 16 and abs(used - size) <= 0.002 * size for _, batch, used in cases)
    assert not any(abs(used - 2**29) <= 0.002 * 2**29 for _, _, used in found["GQA n_KV=8"])  # control
    assert (16384, 64) in {case[:2] for case in found["latents 64/64"]} & {case[:2] for case in found["MHA"]}


def decoded(side: str, mebibytes: int, share: float, backend: str = "triton") -> dict:
    """A row of a GPU run."""
    case = {"context": mebibytes, "batch": 16, "side": side, "backend": backend, "cache_megabytes": mebibytes * 2**20 / 1e6}
    return case | {"microseconds": 20.0, "microseconds_in_a_row": 16.0, "copy_microseconds": 18.5, "share_of_copy": share}


def test_the_share_of_the_copy_is_judged_by_the_slowest_side_of_our_kernel():
    names = ("latents 128/128", "latents 64/64")
    rows = [decoded(names[0], 64, 0.8), decoded(names[1], 64, 0.71), decoded(names[1], 64, 0.1, "flash")]
    words = "decoding with 64 MiB of cache, latents 128/128 and latents 64/64"
    assert verdict({"decode": rows}, words) == ("0.71", "met")
    missed = f"missed: {targets.FIXED}"
    assert verdict({"decode": [*rows[:1], decoded(names[1], 64, 0.69)]}, words) == ("0.69", missed)  # controls
    assert verdict({"decode": rows[:1]}, words) is None
    assert verdict({"decode": [decoded(name, 256, 0.8) for name in names]}, words) is None
    assert verdict({"decode": [decoded(name, 256, 0.8) for name in names]}, words.replace("64 MiB", "256 MiB"))[1] == missed
    mla = verdict({"decode": [decoded("MLA d_c=512 d_R=64", 64, 0.4)]}, "decoding with 64 MiB of cache, MLA d_c=512 d_R=64")
    assert mla == ("0.4", f"missed: {targets.ROWS}")


def test_the_table_of_decoding_has_shares_alone_and_in_a_row_and_a_copy():
    new = decoded("MHA", 64, 0.8)
    old = {k: v for k, v in decoded("MHA", 32, 0.5).items() if k not in ("microseconds_in_a_row", "copy_microseconds")}
    refused = {key: new[key] for key in ("context", "batch", "backend")} | {"side": "MQA", "refused": "for a reason"}
    lines = speed_report.decode_table([new, old, refused]).splitlines()
    assert lines[4] == "| 64 x 16, MQA | refused |  |  |  |  |"
    assert lines[2] == "| 64 x 16, MHA | 20.0 | 67 | 80% | 100% | 18.5 |" and lines[3].endswith("| 34 | 50% | — | — |")
    first = speed_report.decode_table([old]).splitlines()  # a record that has neither
    assert first[0].endswith("| best: share of copy |") and first[2].endswith("| 34 | 50% |")


def test_decoding_is_timed_at_the_scale_of_the_heads(monkeypatch):
    attend, scales = decoding.attend, set()
    monkeypatch.setattr(decoding, "attend", lambda *a, scale, **o: scales.add(scale) or attend(*a, scale=scale, **o))
    sides = tuple(presets.Side(f"latents {t}/{t}", 1, t, t) for t in (8, 32))
    for width, scale in ((16, 0.25), (64, 0.125)):
        scales.clear()
        preset = dataclasses.replace(
            speed.PRESETS["smoke"], decode=presets.alike(sides, ((9, 1),)), decode_heads=(2, width), repeats=1
        )
        assert all("error" in measure() for _, measure in decoding.decode(preset, "cpu", sections.Limits(1.0, 1.0)))
        assert scales == {scale}  # of latents too
    assert speed.PRESETS["gpu"].decode_heads[1] ** -0.5 == 0.125


def test_a_shape_with_rotary_embedding_is_a_llama():
    shape = dataclasses.replace(SHAPE, rope_base=100.0)
    preset = dataclasses.replace(speed.PRESETS["smoke"], repeats=1, n_layers={SHAPE.name: 1})
    gpt2, llama = (models.timed_model(s, Row("MHA"), 1.0, preset, "cpu") for s in (SHAPE, shape))
    assert gpt2["parameters"] != llama["parameters"] and llama["milliseconds"] > 0
    nameless = dataclasses.replace(preset, shapes=(shape,), n_layers={})
    assert not list(models.models(nameless, "cpu", None))


def test_the_report_says_what_was_measured_alone():
    assert speed_report.short_table([], {}) is None
    committed = records.load(records.COMMITTED, "speed", "gpu")
    of_layers = [r for r in committed if r.method == "layers"]
    whole, part = ({t.name: t.shown() for t in speed_report.speed_tables(found)} for found in (committed, of_layers))
    assert set(part) == {"Speed, in short", "Speed, targets", "Speed, layers"} and "It copies at" not in part["Speed, in short"]
    assert len(whole) == 9 and "It copies at" in whole["Speed, in short"]  # control
    assert len(whole["Speed, in short"].splitlines()) == 2 + 2 + 4
    nothing = [dataclasses.replace(of_layers[0], metrics={"rows": []})]
    assert speed_report.speed_tables(nothing) == []


COMMITTED = committed_records()
SECTIONS = [r for r in COMMITTED if (r.experiment, r.preset) == ("speed", "gpu")]


def test_records_say_before_which_changes_they_were_measured_as_the_history_has_it():
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, encoding="utf-8")
    if git(["git", "rev-parse", "--is-shallow-repository"]).stdout.strip() != "false":
        pytest.skip("no history: not a clone, or a shallow one")

    def within(change: str, commit: str) -> bool:
        return git(["git", "merge-base", "--is-ancestor", change, commit]).returncode == 0

    assert all(within(change, "HEAD") for change in since.CHANGES)
    before = {
        r.method: tuple(c for c in since.CHANGES if not within(c, r.commit)) for r in SECTIONS if r.method in since.TRAINED
    }
    assert before == {r.method: since.changes_since(r) for r in SECTIONS if r.method in since.TRAINED}
    assert since.BEFORE.keys() <= {r.commit[:9] for r in SECTIONS}  # what no record needs any more goes


@pytest.fixture
def old_and_new(monkeypatch) -> tuple[list[records.Record], list[records.Record]]:
    """All records, with a training of layers before one change, and the same ones as measured after it."""
    monkeypatch.setattr(since, "CHANGES", {"0ddba11": "layers sang"})
    monkeypatch.setattr(since, "BEFORE", {"012345678": ("0ddba11",)})

    def at(commit):
        return [dataclasses.replace(r, commit=commit, finished="2026-01-02T03:04") if r in SECTIONS else r for r in COMMITTED]

    return at("0123456789"), at("9876543210")


def test_tables_of_older_code_say_so(old_and_new):
    def shown(found):
        return {t.name: t.shown() for t in speed_report.speed_tables([r for r in found if r.experiment == "speed"])}

    old, new = map(shown, old_and_new)
    for name in ("layers", "models", "curves"):
        assert old[f"Speed, {name}"].endswith("Measured 2026-01-02 at `012345678`, before layers sang (`0ddba11`).")
        assert new[f"Speed, {name}"].endswith("Measured 2026-01-02 at `987654321`.")  # control
    assert old["Speed, decode"].endswith("Measured 2026-01-02 at `012345678`.")  # without a gradient
    assert "Layers: [older code]" in old["Speed, in short"] and "older" not in new["Speed, in short"]
    assert (
        "Of older code, as their tables say: layers, memory." in old["Speed, targets"] and "older" not in new["Speed, targets"]
    )


def test_times_of_steps_of_older_code_say_so_wherever_they_stand(old_and_new):
    old, new = (
        "\n".join([claims.render(found), headline.six_verdicts(found), budgets.budget_tables(found, "table3")[0].body])
        for found in old_and_new
    )
    for words in ("one NVIDIA H200 with [older code]", "(H200, old code)", "LLaMA3-1B, older code"):
        assert words in old and words not in new


def test_a_context_without_multi_head_attention_has_no_ratio():
    rows = [{"tokens": 8, "batch": 2, "row": "Tucker [2,4,4]", "backend": "cudnn", "milliseconds": 3.0}]
    mha = {"tokens": 8, "batch": 2, "row": "MHA", "backend": "cudnn", "milliseconds": 4.0}
    assert "| 3.00 |" in speed_report.context_table(rows) and "| 3.00 (0.75) |" in speed_report.context_table([*rows, mha])
    refused = {"tokens": 8, "batch": 2, "row": "MHA", "backend": "flash", "refused": "too wide"}
    assert speed_report.context_table([*rows, mha, refused]).endswith("| 3.00 (0.75) | 4.00 (1.00) | refused |")


def test_targets_of_a_cpu_are_judged_from_the_records_of_other_experiments():
    def judged(found) -> dict[str, list[str]]:
        (table,) = [t for t in speed_report.gpu_tables(found) if t.name == "Speed, targets"]
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.body.splitlines()]
        return {what: cells for what, *cells in lines if what.startswith("on a CPU")} | {
            "experiments": {r.experiment for r in table.runs}
        }

    def faster(r):
        if r.experiment == "compress_speed":
            sizes = [
                size | {"tensors": {name: 2 * size["factors"][name] for name in ("seconds", "megabytes")}}
                for size in r.metrics["sizes"]
            ]
            return dataclasses.replace(r, metrics={"sizes": sizes})
        return dataclasses.replace(r, wall_seconds=60.0) if r.experiment == "coverage" else r

    compressing, testing = "compressing LLaMA3-1B's layer: times as fast as forming both tensors", "all tests under coverage"
    found = judged(COMMITTED)
    (size,) = [s for r in COMMITTED if r.experiment == "compress_speed" for s in r.metrics["sizes"] if s["d_model"] == 2048]
    assert found[f"on a CPU, {compressing}"][0] == f"{size['tensors']['seconds'] / size['factors']['seconds']:.3g}"
    assert found["experiments"] == {"speed", "compress_speed", "coverage"}
    other = judged([faster(r) for r in COMMITTED])  # control
    assert other[f"on a CPU, {compressing}"] == ["2", "≥ 100", "missed"]
    assert other[f"on a CPU, {testing}, a part of `make test`: minutes"] == ["1", "≤ 8", "met"]
    alone = judged([r for r in COMMITTED if r.experiment == "speed"])
    assert alone == {"experiments": {"speed"}}
    assert speed_report.gpu_tables([r for r in COMMITTED if r.experiment != "speed"]) == []


def test_a_target_that_is_missed_without_a_reason_has_none(monkeypatch):
    sections = gpu_run()
    table = speed_report.targets_table([], sections)
    assert "What the missed ones hang on" not in table.note
    sections["layers"][2]["milliseconds"] = 5.0
    assert "- Mixing a core" in speed_report.targets_table([], sections).note  # control


def test_the_first_lines_of_our_kernel_say_what_it_costs():
    """In words, as the committed record has it: over the best of PyTorch's kernels, in every layer."""
    lines = (ROOT / "tucker_ref" / "kernels" / "latent_attention.py").read_text(encoding="utf-8").split("\n\n")[1]
    said = {
        "megabytes": "between a third and a half of the peak memory",
        "milliseconds": "a third more time to more than twice as much",
    }
    assert all(words in " ".join(lines.split()) for words in said.values()) and "`layer.recompute = True`" in lines
    record = [r for r in COMMITTED if (r.experiment, r.preset) == ("speed", "gpu")]
    sections = {r.method: r.metrics["rows"] for r in record}

    def ratios(what: str) -> list[float]:
        layers = {(r["shape"], r["row"]) for r in sections["layers"] if r["backend"] == targets.KERNEL}
        return [
            targets.layer(sections, *layer, what, kernel=True) / targets.layer(sections, *layer, what, kernel=False)
            for layer in layers
        ]

    def holds() -> bool:
        memory, times = ratios("megabytes"), ratios("milliseconds")
        return min(memory) > 1 / 3 and max(memory) < 0.5 and 1.3 < min(times) < 1.4 and 2 < max(times) < 2.5

    assert holds()
    for what, factor in (("megabytes", 1.5), ("milliseconds", 0.8)):  # controls: another kernel
        kept = sections["layers"]
        sections["layers"] = [r | {what: r[what] * factor} if r["backend"] == targets.KERNEL else r for r in kept]
        assert not holds()
        sections["layers"] = kept


def test_the_report_of_models_names_what_was_refused():
    row = {"model": "GPT-2", "row": "MHA", "parameters": 10**6, "milliseconds": 2.0, "tokens_per_second": 5e3}
    row |= {"share_of_matmul": 0.25, "megabytes": None}
    lines = speed_report.model_table([row, {"model": "GPT-2", "row": "MQA", "refused": "out of memory"}]).splitlines()
    assert "| GPT-2 MHA |" in lines[2] and "25%" in lines[2] and "out of memory" in lines[3]
