"""The decode benchmark refuses to time what is wrong, and records what the cache really holds."""

import dataclasses

import pytest
import torch

from reproduce.experiments import decode
from reproduce.models.rows import TABLE2
from reproduce.report import query, results
from reproduce.store import records
from reproduce.train.options import Options


def test_a_layer_that_decodes_wrongly_is_not_timed():
    layer = decode.build(TABLE2[0], "cpu")
    decode.check("MHA", layer)

    def forgets(x, cache=None, **options):
        return type(layer).forward(layer, x, **options)

    layer.forward = forgets
    with pytest.raises(ValueError, match="MHA: decoding differs .* it is not timed"):
        decode.check("MHA", layer)


def test_every_row_is_recorded_with_the_bytes_of_table_2(tmp_path, monkeypatch):
    monkeypatch.setitem(decode.PRESETS, "smoke", decode.Preset(contexts=(8, 16), batch=2, repeats=3))
    decode.run(Options("smoke", tmp_path, tmp_path))
    found = records.load(tmp_path, "decode")
    assert [r.method for r in found] == [row.label for row in TABLE2]
    for row, record in zip(TABLE2, found):
        assert record.metrics["cache_bytes_per_token"] == row.cost(768, 12).cache_bytes(1, bytes_per_number=4)
        assert set(record.metrics["milliseconds"]) == {"8", "16"}


@torch.no_grad()
def test_mla_is_timed_in_its_absorbed_form():
    assert decode.build(TABLE2[3], "cpu").absorb


def test_times_of_two_runs_stand_in_two_tables():
    """A ratio to multi-head attention is one within a run; other commands and devices have another."""
    committed = [r for r in records.load(records.COMMITTED, "decode") if r.preset == "smoke"]
    elsewhere = [dataclasses.replace(r, device="another device") for r in committed]
    assert query.by_command(committed + elsewhere) == [committed, elsewhere]
    drawn = results.render(committed + elsewhere)
    assert drawn.count("**Decoding") == 2 and "another device" in drawn
    assert results.render(committed).count("**Decoding") == 1  # control
