"""Beyond the paper: every mechanism is an exact Tucker Attention under rotary embeddings, biases and masks.

The cells are those of `reproduce.experiments.exactness`; the matrix of their worst errors is printed at the end of the test run.
"""

import pytest
import torch
from conftest import MATRIX
from helpers import DIFFERENT, EXACT

from reproduce.experiments import exactness
from reproduce.experiments.exactness import (
    MASKS,
    PATHS,
    cells,
    controls,
    error,
    mask_of,
    prefill_and_decode,
    relative,
    tokens,
    whole_sequence,
)
from reproduce.store import records
from reproduce.train.options import Options
from tucker_ref import MultiHeadLatentAttention, as_tucker

# Only causal orders can be decoded.
MASKS_AND_PATHS = [(mask, path) for path in PATHS for mask in MASKS if path == PATHS[0] or mask in ("causal", "padded")]
CELLS = {cell.name: cell for cell in cells()}
EVERY_ORDER = pytest.mark.parametrize(  # every line that they run is run under the causal mask
    "mask, path",
    [pytest.param(*order, marks=[] if order[0] == "causal" else pytest.mark.no_cover) for order in MASKS_AND_PATHS],
)


@EVERY_ORDER
@pytest.mark.parametrize("name", CELLS)
def test_as_tucker_is_exact(name, mask, path):
    layer = CELLS[name].build()
    worst = error(layer, as_tucker(layer), mask, path)
    MATRIX[name, f"{mask}, {'decoded' if path != PATHS[0] else 'whole'}"] = worst
    assert worst < EXACT


@EVERY_ORDER
@pytest.mark.parametrize("name", CELLS)
def test_every_control_misses(name, mask, path):
    cell = CELLS[name]
    layer = cell.build()
    for what, spoil in controls(cell).items():
        tucker = as_tucker(layer)
        spoil(tucker)
        missed = error(layer, tucker, mask, path)
        assert missed > DIFFERENT, what
        MATRIX[name, "least control"] = min(missed, MATRIX.get((name, "least control"), float("inf")))


@pytest.mark.parametrize("name", [name for name in CELLS if not CELLS[name].absorb])
def test_decoding_a_layer_is_the_layer(name):
    """The cache of the original layers themselves, under a causal and a padding mask."""
    layer, x = CELLS[name].build(), tokens()
    for mask in ("causal", "padded"):
        options = mask_of(mask)
        assert relative(prefill_and_decode(layer, x, options), whole_sequence(layer, x, options)) < EXACT


@pytest.mark.parametrize("name", [name for name in CELLS if CELLS[name].absorb])
def test_absorbed_and_plain_mla_agree(name):
    absorbed = CELLS[name].build()
    plain = CELLS[name.removesuffix(", absorbed")].build()
    assert absorbed.absorb and not plain.absorb
    for mask in MASKS:
        assert error(plain, absorbed, mask, "whole sequence") < EXACT


def test_norms_put_mla_outside_def_2_1():
    """With RMSNorm the latents are not linear in x: the converted layer carries the norms, and without them it is another one."""
    layer = CELLS["MLA shared, RoPE none, latent norm"].build()
    assert isinstance(layer, MultiHeadLatentAttention)
    for eps in (0.5, 1e-6):
        layer.q_a_layernorm.eps = layer.kv_a_layernorm.eps = eps
        tucker = as_tucker(layer)
        assert tucker.latent_norm and error(layer, tucker, "causal", "whole sequence") < EXACT
        tucker.query_norm.eps = tucker.key_norm.eps = 0.25
        assert error(layer, tucker, "causal", "whole sequence") > DIFFERENT
    tucker.query_norm = tucker.key_norm = torch.nn.Identity()
    assert error(layer, tucker, "causal", "whole sequence") > DIFFERENT


def test_a_run_records_every_cell(monkeypatch, tmp_path):
    monkeypatch.setattr(exactness, "cells", lambda: list(CELLS.values())[:2])
    exactness.run(Options("smoke", tmp_path, tmp_path))
    (record,) = records.load(tmp_path, "exactness", "float64")
    for cell in record.metrics["cells"]:
        assert max(cell["errors"].values()) < EXACT < DIFFERENT < min(cell["controls"].values())
    assert [cell["name"] for cell in record.metrics["cells"]] == list(CELLS)[:2]
