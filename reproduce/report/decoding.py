"""One more token on a CPU: cache bytes and milliseconds by row and context."""

from ..store.records import Record
from .markdown import Table, markdown


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
