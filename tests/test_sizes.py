"""Sizes in Tables 2 and 3: the paper's cells against formula and module, and the cells that do not fit."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from reproduce.experiments import figure3, figure3_tiny, table1, table2
from reproduce.models.rows import (
    ALLOCATION_GIVES,
    TABLE2,
    TABLE2_ALLOCATIONS,
    TABLE2_BEST,
    TABLE2_NORMED,
    TABLE3,
    Row,
    labels_of,
)
from reproduce.models.sizes import measure
from reproduce.report.ledger import SIZE_TOLERANCE
from reproduce.train.arguments import labels
from tucker_ref import mla_cost

ROOT = Path(__file__).parent.parent
SLIPS = {("GQA n_KV=4", "cache_mb"), ("MLA separated d_c=128", "size"), ("MLA shared d_c=128", "size")}


def ours(row: Row, column: str) -> float:
    if column == "attention_mb":
        return row.cost(768, 12).parameter_bytes(n_layers=12) / 1e6
    if column == "cache_mb":
        return row.cost(768, 12).cache_bytes(1024, n_layers=12) / 1e6
    return row.cost(2048, 32).parameters * 16 / 1e6


CELLS = [(row, column) for row in TABLE2 + TABLE3 for column in row.paper]


@pytest.mark.parametrize("row, column", CELLS, ids=[f"{row.label}-{column}" for row, column in CELLS])
def test_paper_cell(row, column):
    within = abs(ours(row, column) / row.paper[column] - 1) <= SIZE_TOLERANCE
    assert within == ((row.label, column) not in SLIPS)


def test_both_readings_of_table_3_give_the_same_figures():
    for row in TABLE3:
        cost = row.cost(2048, 32)
        assert cost.parameters * 16 == cost.parameter_bytes(n_layers=8)


@pytest.mark.parametrize("shape", [(768, 12), (2048, 32)])
def test_formulas_are_what_module_and_cache_hold(shape):
    for row in TABLE2 if shape[0] == 768 else TABLE3:
        sizes = measure(row, *shape)
        assert sizes["parameters"] == sizes["counted_parameters"]
        assert sizes["cache_per_token"] == sizes["counted_cache_per_token"]


def test_gqa4_cache_is_12_58_not_12_85():
    by_hand = 2 * 4 * 64 * 1024 * 12 * 2  # keys and values, groups, head width, tokens, layers, bytes
    assert by_hand / 1e6 == pytest.approx(12.58, abs=0.005)
    assert ours(TABLE2[1], "cache_mb") == pytest.approx(12.58, abs=0.005)


def test_mla_93_3_fits_no_formula_of_table_1():
    for shared in (True, False):
        for c_q in (128, 256, 512):
            assert abs(mla_cost(2048, 32, c_q, 128, shared_kv=shared).parameters * 16 / 1e6 - 93.3) > 0.5
    one_rotary_key = 2048 * 32  # our guess: one shared rotary key of width 32, with separated latents
    separated = mla_cost(2048, 32, 128, 128, shared_kv=False).parameters
    assert (separated + one_rotary_key) * 16 / 1e6 == pytest.approx(93.3, abs=0.05)


def test_the_smallest_tucker_row_is_below_ten_per_cent():
    gqa8 = TABLE3[1].cost(2048, 32).parameters
    shares = [row.cost(2048, 32).parameters / gqa8 for row in TABLE3 if row.mechanism == "Tucker"]
    assert [round(100 * share, 1) for share in shares] == [20.0, 12.5, 7.5]


@pytest.mark.parametrize("row", TABLE2, ids=lambda row: row.label)
def test_a_narrowed_row_keeps_its_share_of_the_parameters(row):
    """Scaling all widths but the head's keeps every ratio to MHA, but for the 2 n_H r1 numbers of the head factors."""

    def share(row, mha, d):
        heads = 2 * 12 * row.ranks[0] if row.ranks else 0
        return (row.cost(d, 12).parameters - heads) / mha.cost(d, 12).parameters

    mha = TABLE2[0]
    assert share(row, mha, 768) == share(row.narrowed(4), mha.narrowed(4), 192)
    if row.mechanism != "MHA":
        assert share(row.narrowed(2), mha, 192) != share(row, mha, 768) or row.mechanism == "GQA"  # control: a wrong factor


def test_labels_are_those_of_the_paper_and_unique():
    for table in (TABLE2, TABLE3):
        labels = [row.label for row in table]
        assert len(set(labels)) == len(labels)
    assert TABLE2[-1].label == "Tucker [8,64,64]" and Row("GQA", n_kv_heads=1).label == "MQA"
    assert labels_of(TABLE2, "Tucker") == labels_of(TABLE2)[4:] and len(labels_of(TABLE2, "GQA")) == 2
    assert labels_of(TABLE2_NORMED) == (
        "MHA QK-norm",
        "GQA n_KV=4 QK-norm",
        "GQA n_KV=2 QK-norm",
        "MQA QK-norm",
        "MLA shared d_c=128 latent norms",
        "MLA separated d_c=128 latent norms",
        *(f"Tucker [8,{ranks}] QK-norm" for ranks in ("128,128", "128,64", "64,64")),
    )


LABEL = re.compile(r"M[HQ]A|GQA n_KV=\d+|MLA \w+ d_c=\d+|Tucker \[[\d,]+\]( shared)?")


def unknown_labels(source: str) -> set[str]:
    """Strings of a program that look like a row's label and are none: what they ask for would never be found."""
    vision = [figure3.PRESETS["smoke"], figure3.PRESETS["gpu"], *figure3_tiny.PRESETS.values()]
    tables = (table1.ROWS, table2.ON_GPU_ROWS, TABLE3, *(preset.rows for preset in vision))
    known = {label for rows in tables for label in labels_of(rows)}
    strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return {s for s in strings - known if isinstance(s, str) and LABEL.fullmatch(s)}


def test_labels_that_programs_name_are_those_of_rows():
    files = [path for folder in ("reproduce", "paper_figures") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {path.name: bad for path in files if (bad := unknown_labels(path.read_text(encoding="utf-8")))} == {}
    assert unknown_labels('best = ("MHA", "Tucker [8,64,65]")') == {"Tucker [8,64,65]"}  # control


@pytest.mark.parametrize(
    "row",
    [
        *TABLE2,
        dataclasses.replace(TABLE2[-1], shared_kv=True),
        *TABLE2_NORMED,
        dataclasses.replace(TABLE2[-1], latent_norm=True),
    ],
    ids=lambda row: row.label,
)
def test_every_row_builds_and_runs(row):
    layer = row.narrowed(16).build(48, 12)
    assert layer(torch.randn(2, 5, 48)).shape == (2, 5, 48)


def test_a_normed_row_has_the_gains_and_nothing_else_more():
    gains = {"MHA": 2 * 64, "GQA": 2 * 64, "MLA": 2 * 128, "Tucker": 2 * 128}  # per layer; of what is normalised, its width
    for plain, normed in zip(TABLE2_BEST[:7], TABLE2_NORMED):
        sizes = measure(normed, 768, 12)
        assert normed.cost(768, 12) == plain.cost(768, 12)
        more = gains[plain.mechanism] + (128 if plain.label.startswith("MLA separated") else 0)
        assert sizes["counted_parameters"] - sizes["parameters"] == more
        assert normed.normed() == normed and normed.narrowed(4).normed() == normed.narrowed(4)
    over_all = dataclasses.replace(TABLE2[0], qk_norm="all")
    assert over_all.label == "MHA QK-norm over all heads"
    assert measure(over_all, 768, 12)["counted_parameters"] == 4 * 768**2 + 2 * 768


def test_norms_are_on_record_only_where_there_are_some():
    """A new field in the config of a row without norms would give every run on record another id."""
    for plain, normed in zip(TABLE2_BEST, TABLE2_NORMED):
        assert list(plain.config()) == ["mechanism", "n_kv_heads", "latent", "ranks", "shared_kv"]
        own = {"latent_norm": True} if plain.mechanism == "MLA" else {"qk_norm": "head"}
        assert normed.config() == plain.config() | own
        assert Row(**normed.config()) == normed


def test_norms_that_a_mechanism_does_not_have_are_refused():
    with pytest.raises(ValueError, match="MLA has latent_norm, not qk_norm"):
        Row("MLA", latent=128, qk_norm="head")
    for mechanism in ("MHA", "GQA"):
        with pytest.raises(ValueError, match=f"{mechanism} has no latents: qk_norm, not latent_norm"):
            Row(mechanism, n_kv_heads=4, latent_norm=True)
    with pytest.raises(ValueError, match="Tucker .8,64,64. QK-norm is trained from scratch; no layer is converted to it"):
        TABLE2_NORMED[-1].converted(TABLE2[0].narrowed(4).build(192, 12))
    assert TABLE2[-1].narrowed(4).converted(TABLE2[0].narrowed(4).build(192, 12)).ranks == (8, 16, 16)  # control


def test_each_allocation_has_the_parameters_of_its_row():
    rows = {row.label: row for row in TABLE2 if row.mechanism == "Tucker"}
    assert list(TABLE2_ALLOCATIONS) == list(rows)
    labels = [row.label for allocations in TABLE2_ALLOCATIONS.values() for row in allocations]
    assert len({*labels, *rows}) == len(labels) + len(rows)
    for label, allocations in TABLE2_ALLOCATIONS.items():
        paper = rows[label].cost(768, 12).parameters
        assert len(allocations) == len(ALLOCATION_GIVES) == 9
        for row in allocations:
            size = measure(row, 768, 12)
            assert abs(size["parameters"] / paper - 1) < 0.01, (row.label, size["parameters"] / paper)
            assert size["parameters"] == size["counted_parameters"]
            assert size["cache_per_token"] == size["counted_cache_per_token"]
        for row in allocations[:4]:  # what one tensor gives the other takes
            assert row.cost(768, 12).parameters == paper and row.post_ranks
        others = [r.cost(768, 12).parameters for other, r in rows.items() if other != label]  # control
        assert all(abs(other / paper - 1) > 0.01 for other in others)


PLACES = {
    "query": "pre 1",
    "output": "post 1",
    "heads before": "pre 0",
    "heads after": "post 0",
    "key": "pre 2",
    "value": "post 2",
}
WIDER_AND_NARROWER = (  # in the order of ALLOCATION_GIVES
    ("output", "query"), ("query", "output"), ("heads after", "heads before"), ("heads before", "heads after"),
    ("key, value", "query, output"), ("query, output", "key, value"), ("query, output", "heads before, heads after"),
    ("heads before, heads after", "query, output"), ("query, output", ""),
)  # fmt: skip


def test_each_allocation_gives_to_what_its_words_say():
    assert [words.split(", ")[0] for words in ALLOCATION_GIVES] == [
        "the output mode", "the query mode", "the head mode after the softmax", "the head mode before the softmax", "keys and values",
        "queries and outputs", "queries and outputs", "the head modes", "queries and outputs",
    ]  # fmt: skip
    triples = {row.label: row.ranks for row in TABLE2}
    for label, allocations in TABLE2_ALLOCATIONS.items():
        for row, (wider, narrower) in zip(allocations, WIDER_AND_NARROWER):
            sides = {"pre": row.ranks, "post": row.post_ranks or row.ranks}
            moved = {f"{side} {mode}": own[mode] - triples[label][mode] for side, own in sides.items() for mode in range(3)}
            for names, sign in ((wider, 1), (narrower, -1)):
                places = {PLACES[name] for name in names.split(", ") if name}
                assert {place for place, by in moved.items() if sign * by > 0} == places, (row.label, names)
        assert [row.shared_kv for row in allocations] == [False] * 8 + [True]


def test_a_row_with_two_triples_says_both_and_narrows_both():
    row = Row("Tucker", ranks=(8, 32, 64), post_ranks=(8, 96, 64))
    assert row.label == "Tucker [8,32,64 / 8,96,64]" and row.normed().label == "Tucker [8,32,64 / 8,96,64] QK-norm"
    assert row.config()["post_ranks"] == (8, 96, 64) and Row(**row.config()) == row
    assert "post_ranks" not in Row("Tucker", ranks=(8, 32, 64)).config()
    narrow = row.narrowed(4)
    assert (narrow.ranks, narrow.post_ranks) == ((8, 8, 16), (8, 24, 16))
    layer = narrow.build(192, 12)
    assert (layer.ranks, layer.post_ranks) == (narrow.ranks, narrow.post_ranks)
    converted = narrow.converted(TABLE2[0].narrowed(4).build(192, 12))
    assert (converted.ranks, converted.post_ranks) == (narrow.ranks, narrow.post_ranks)
    assert labels(f"MHA,{row.label}") == ("MHA", row.label)  # as they are typed
    assert "|" not in row.label  # which ends a cell of a table
