"""Speed: layers forward and backward, decoding and whole training steps by backend, beside the device's own limits.

Every layer and every way to decode is compared with the reference before it is timed, and one that differs or is refused has no time.
Ratios are taken within one run. Times are medians over calls that find the L2 cache full of other, clean lines, as the layers before would
leave it. Layers and decoding run as CUDA graphs, so that a small layer's time is not that of launching its kernels; whole models
run as people run them, compiled block by block. A section that is stopped goes on with the row that it was at.
"""

from ...store.records import append, device_in_words, new_record
from ...train.options import Options
from ...train.runs import check_labels
from . import curves, decoding, layers, models
from .presets import PRESETS
from .sections import limit_rows, limits, through

TAKES = ("device", "rows")


def run(options: Options) -> None:
    """One record per section and device.

    Args:
        options: `rows` are names of sections, all if empty.

    Raises:
        ValueError: for a section that is not there.
    """
    preset, device = PRESETS[options.preset], device_in_words(options.device)
    sections = {
        "limits": limit_rows,
        "layers": layers.layers,
        "contexts": layers.contexts,
        "memory": layers.memory,
        "decode": decoding.decode,
        "models": models.models,
        "step": models.steps,
        "curves": curves.curves,
    }
    check_labels("section", options.rows, sections)
    rates = limits(preset, options.device)
    for name, section in sections.items():
        if options.rows and name not in options.rows:
            continue
        config = {"dtype": str(preset.dtype).removeprefix("torch."), "repeats": preset.repeats, "device": device}
        partial = options.out / f"speed-{options.preset}-{name.replace(' ', '-')}.json"
        rows, seconds = through(name, section(preset, options.device, rates), partial, config, options.device)
        record = new_record("speed", options.preset, name, config, {"rows": rows}, device=options.device, wall_seconds=seconds)
        append(options.records, record, replace=True)  # whole sections only: one that is broken off leaves what was there
        partial.unlink(missing_ok=True)
