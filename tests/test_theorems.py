"""What the experiment `theorems` records: statements that hold to rounding, and controls that are seen."""

import pytest
import torch
from helpers import DIFFERENT, EXACT, TOLERANCE

from reproduce.experiments import theorems
from reproduce.experiments.theorems import RANKS, TURNING, flash, growth, positions, ranks
from reproduce.store import records
from reproduce.train.options import Options


@pytest.mark.parametrize("layer", ranks(), ids=lambda entry: entry["layer"])
def test_ranks_are_the_theorem_s_where_heads_and_latents_are_wide(layer):
    narrow = "narrow" in layer["layer"]
    assert all(a <= b for a, b in zip(layer["found"], layer["theorem"]))
    assert (layer["found"] == layer["theorem"]) == (not narrow)
    assert layer["control"][0] == layer["found"][0] - 1 and layer["control"][3] == layer["found"][3] - 1  # two heads alike


def test_narrow_layers_have_the_ranks_that_their_widths_allow():
    """min(d, n_H d_H) in place of d, and for MLA's outputs min(d, n_H min(d_H, d_c^K))."""
    found = {entry["layer"]: entry["found"] for entry in ranks()}
    assert found["MHA, narrow heads"] == [3, 12, 12] * 2 and found["MQA, narrow heads"] == [6, 12, 2] * 2
    assert found["MLA shared, narrow latent"] == [3, 7, 5, 3, 15, 5]
    assert set(found) == set(RANKS)


def test_positions_that_all_move_change_nothing_and_doubled_distances_do():
    for entry in positions():
        assert entry["error"] < EXACT and entry["control"] > DIFFERENT
    assert [entry["layer"] for entry in positions()] == list(TURNING)


def test_the_flash_kernel_is_right_at_the_layer_s_scale_and_wrong_at_its_own():
    for entry in flash():
        assert entry["error"] < TOLERANCE[torch.float32] and entry["control"] > DIFFERENT


def test_parameters_of_every_width_and_rank_are_counted_on_modules():
    found = growth()
    assert len(found) == 3 * (3 * 3 + 1)
    for entry in found:
        d, r, r1 = (entry.get(name) for name in ("d", "r", "r1"))
        expected = 4 * d**2 if entry["layer"] == "MHA" else 2 * (12 * r1 + 2 * r * d + r1 * r**2)
        assert entry["parameters"] == expected


def test_a_run_records_all_of_it(tmp_path):
    theorems.run(Options("smoke", tmp_path, tmp_path))
    (record,) = records.load(tmp_path, "theorems", "float64")
    assert list(record.metrics) == ["ranks", "positions", "flash", "growth"] and record.config["shifts"] == [1, 7, 1000]
