"""One more token on a CPU, cache bytes and milliseconds by row and context; and whole models that write, tokens a second."""

from ..store.records import Record
from .markdown import Table, markdown
from .query import grouped

MEMORY = 80e9  # bytes, of the largest batch
BYTES = {"float32": 4, "bfloat16": 2}  # of a number


def decode_runs(records: list[Record]) -> list[Table]:
    """Beside multi-head attention's in the same run."""
    contexts = list(records[0].metrics["milliseconds"])
    mha = next((r.metrics["milliseconds"] for r in records if r.method == "MHA"), None)
    rows = []
    for r in records:
        times = r.metrics["milliseconds"]
        cells = [f"{times[c]:.2f}" + (f" ({times[c] / mha[c]:.2f})" if mha else "") for c in contexts]
        rows.append([r.method, f"{r.metrics['cache_bytes_per_token']:,}", *cells])
    c = records[0].config
    title = (
        f"**Decoding: cache and time of one more token, one layer of GPT-2's shape, {c['precision']}, batch {c['batch']}.** Width "
        f"{c['d_model']}, {c['n_heads']} heads. In milliseconds, and in brackets the ratio to MHA in the same run. One layer, not a model; "
        "these are not the paper's measurements."
    )
    header = ["row", "cache bytes a token", *(f"after {int(c):,} tokens" for c in contexts)]
    note = (
        f"Medians of {c['repeats']} timings, rows in turns. Tucker mixes its core into the heads anew at every step here, which a decoder "
        "needs to do only once per update of the weights."
    )
    return [Table(f"Decoding, {records[0].preset}", title, markdown(header, rows), records, note)]


def generation_tables(records: list[Record]) -> list[Table]:
    """Tokens a second of each model by batch and context, and the largest batch in 80 GB by context.

    Args:
        records: of one preset on one device.
    """
    # Two GPUs write in turns.
    records = sorted(records, key=lambda r: (r.config["model"], not r.config["way"].startswith("static")))
    c = records[0].config
    contexts, batches = (sorted({r.config[name] for r in records}) for name in ("context", "batch"))
    cells = [(n, b) for n in contexts for b in batches]
    speeds, largest = [], []
    for (model, label, way), runs in grouped(records, _line_of).items():
        speeds.append([f"{model} {label}{way}", *(_best(runs, cell) for cell in cells)])
        if not way:  # others keep what multi-head attention keeps
            largest.append([f"{model} {label}", *(_largest(runs, n) for n in contexts)])
    title = (
        f"**Generation: tokens a second of all sequences, whole models with random weights, {c['precision']}, on one "
        f"{records[0].device}.** Columns are context x batch."
    )
    note = (
        f"Medians of {c['repeats']} runs over the last {c['steps']} tokens of the context. No prompt was computed: caches held random "
        "numbers. GPT-2 had as many learned positions as the context has tokens. Ours had blocks compiled and a CUDA graph a step, with "
        "the faster of two attention kernels; PyTorch is the same attention in plain PyTorch, compiled as gpt-fast does; transformers is "
        "its `generate` with a static cache, its first token left out."
    )
    header = ["model", *(f"{n:,} x {b}" for n, b in cells)]
    rooms = "**Generation: largest batch in 80 GB, by arithmetic.** What weights leave of it, over the cache of each sequence."
    why = "Activations of one token and what the allocator keeps are left out."
    return [
        Table(f"Generation, {records[0].preset}", title, markdown(header, speeds), records, note),
        Table(
            f"Generation, largest batch, {records[0].preset}", rooms,
            markdown(["model", *(f"{n:,} tokens" for n in contexts)], largest), records, why,
        ),
    ]  # fmt: skip


def _line_of(record: Record) -> tuple[str, str, str]:
    """Model, row, and who else wrote with it: both of our backends stand in one line."""
    way = record.config["way"]
    return record.config["model"], record.method, "" if way.startswith("static") else f", {way}"


def _best(runs: list[Record], cell: tuple[int, int]) -> str:
    here = [r.metrics for r in runs if (r.config["context"], r.config["batch"]) == cell]
    speeds = [m["tokens_per_second"] for m in here if "refused" not in m]
    reasons = {"out of memory" if m["refused"] == "out of memory" else "refused" for m in here if "refused" in m}
    return f"{max(speeds):,.0f}" if speeds else " or ".join(sorted(reasons)) or "not run"


def _largest(runs: list[Record], context: int) -> str:
    """How many sequences have room in MEMORY beside the weights: any run knows the cache of one."""
    ran = next((r for r in runs if r.config["context"] == context and "refused" not in r.metrics), None)
    if ran is None:
        return "—"
    cache = 1e6 * ran.metrics["cache_megabytes"] / ran.config["batch"]  # bytes of one sequence
    return f"{int((MEMORY - BYTES[ran.config['precision']] * ran.metrics['parameters']) / cache):,}"
