"""Sizes at the paper's shapes: Tables 1-3, the paper's numbers beside ours."""

from ..store.records import Record
from .markdown import Table, markdown
from .query import attention_mb, cache_mb, sizes_of
from .words import difference

FORMULAS = {
    "MHA": ("4 d²", "2 d"),
    "MQA": ("2 d² + 2 d_H d", "2 d_H"),
    "GQA n_KV=4": ("2 d² + 2 n_KV d_H d", "2 n_KV d_H"),
    "MLA shared d_c=128": ("d² + 5 d d_c", "d_c"),
    "MLA separated d_c=128": ("d² + 6 d d_c", "2 d_c"),
    "Tucker [8,128,64]": ("2 (n_H r1 + d r2 + d r3 + r1 r2 r3)", "2 r3"),
    "Tucker [8,128,64] shared": ("2 (n_H r1 + d r2 + r1 r2 r3) + d r3", "r3"),
}
OURS = {"MLA separated d_c=128": {"cache"}, "Tucker [8,128,64] shared": {"parameters", "cache"}}  # formulas that we derived


def table1_sizes(records: list[Record]) -> list[Table]:
    """One layer of each kind at GPT-2's shape: formulas against the real module and the real cache."""

    def formulas(label: str) -> list[str]:
        said = zip(("parameters", "cache"), FORMULAS.get(label, ("", "")))
        return [formula + (" (ours)" if column in OURS.get(label, ()) else "") for column, formula in said]

    rows = []
    for r in sizes_of(records):
        counts = ("parameters", "counted_parameters", "cache_per_token", "counted_cache_per_token")
        rows.append([r["label"], *formulas(r["label"]), *(f"{r[name]:,}" for name in counts)])
    header = ["layer", "parameters", "cache per token", "parameters: formula", "module", "cache: formula", "cache object"]
    title = (
        "**Table 1, one layer at GPT-2's shape: each formula against the real module and the real cache.** Width 768, 12 heads."
    )
    return [Table("Table 1", title, markdown(header, rows), records[-1:])]


def table2_sizes(records: list[Record]) -> list[Table]:
    """Table 2's megabytes of attention and of cache, the paper's and ours."""
    shape = records[0].config
    rows = []
    for r in sizes_of(records):
        cells = [r["label"]]
        for column, ours in (("attention_mb", attention_mb(r, shape)), ("cache_mb", cache_mb(r, shape))):
            printed = r["paper"][column]
            cells += [f"{printed:.2f}", f"{ours:.2f}", difference(ours, printed)]
        rows.append(cells)
    title = "**Table 2, GPT-2, sizes at the paper's shape.** 12 layers, 1,024 tokens; BF16, MB = 10⁶ bytes."
    header = ["GPT-2 row", "attention MB: paper", "here", "diff.", "KV cache MB: paper", "here", "diff."]
    return [Table("Table 2, sizes", title, markdown(header, rows), records[-1:])]


def table3_sizes(records: list[Record]) -> list[Table]:
    """Table 3's sizes of attention, the paper's and ours in both readings of its unit."""
    rows = []
    for r in sizes_of(records):
        printed = r["paper"]["size"]
        parameters, megabytes = r["parameters"] * 16 / 1e6, r["parameters"] * 8 * 2 / 1e6
        cells = [
            f"{r['parameters']:,}",
            f"{printed:g}",
            f"{parameters:.1f}",
            f"{megabytes:.1f}",
            difference(parameters, printed),
        ]
        rows.append([r["label"], *cells])
    header = ["LLaMA3-1B row", "parameters a layer", "paper", "10⁶ parameters, 16 layers", "MB in BF16, 8 layers", "diff."]
    title = (
        "**Table 3, LLaMA3-1B, attention sizes at the paper's shape.** Width 2,048, 32 heads. The paper's unit is not certain to us; "
        "the two readings that fit its numbers give the same figures. It has one row of MLA, without saying whether its latents are "
        "shared."
    )
    return [Table("Table 3, sizes", title, markdown(header, rows), records[-1:])]
