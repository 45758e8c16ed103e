"""How a section's rows are gone through and kept, and the section that needs no layer: the device's own limits."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ...store.checked import Part, check, read_json
from ...store.files import write_atomically
from ...train.runs import Failures
from .presets import Preset
from .timing import Case, median_ms


class Partial(Part):
    """What there is of a section that was stopped."""

    config: dict
    rows: list[dict]
    seconds: float


def through(name: str, cases: Iterator[Case], partial: Path, config: dict, device: str) -> tuple[list[dict], float]:
    """The rows of a section, each printed and kept in a file as soon as it is there.

    Args:
        name: of the section.
        cases: its rows.
        partial: the file. Rows that it holds of the same cases under the same config are not measured again.
        config: of the record.
        device: as torch names it.

    Returns:
        All rows, and the seconds that they took.

    Raises:
        ValueError: for a file that is damaged, and at the end where a row could not be measured.
    """
    kept, failures = _kept(partial, config), Failures(device)
    rows, started = [], time.perf_counter()
    for case, measure in tqdm(cases, f"speed {name}"):
        row = next((row for row in kept.rows if case.items() <= row.items()), None)
        if is_new := row is None:
            with failures.kept(f"{name}, {in_words(case)}"):
                row = {**case, **measure()}
        if row is None:
            continue
        tqdm.write(f"{name}: {in_words(row)}")
        rows.append(row)
        if is_new:
            later = [row for row in kept.rows if row not in rows]
            seconds = kept.seconds + time.perf_counter() - started
            state = json.dumps({"config": config, "rows": rows + later, "seconds": seconds})
            write_atomically(partial, lambda file, state=state: file.write(state.encode()))
    failures.tell()
    return rows, kept.seconds + time.perf_counter() - started


def in_words(measured: dict) -> str:
    """One line of names and values."""
    return ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in measured.items())


def _kept(partial: Path, config: dict) -> Partial:
    if partial.exists():
        where = f"{partial}: delete it to start this section again; it"
        kept = check(Partial, read_json(partial.read_text(encoding="utf-8"), where), where)
        if kept.config == config:
            return kept
    return Partial(config=config, rows=[], seconds=0.0)


@dataclass(frozen=True)
class Limits:
    """What the device can do at most.

    Args:
        copy: gigabytes (10^9 bytes) a second, read and written.
        matmul: teraflops (10^12 operations a second) in a matrix product.
    """

    copy: float
    matmul: float


def limits(preset: Preset, device: str) -> Limits:
    """Measure a copy and a matrix product.

    Args:
        preset: size and type of the matrices.
        device: as torch names it.
    """
    n = preset.matmul
    source = torch.empty(16 * n * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source), preset, device) / 1e6
    a, b = (torch.randn(n, n, device=device, dtype=preset.dtype) for _ in range(2))
    return Limits(copy, 2 * n**3 / median_ms(lambda: a @ b, preset, device) / 1e9)


def limit_rows(_preset: Preset, _device: str, rates: Limits) -> Iterator[Case]:
    """The limits as rows of the record, in the signature of the other sections."""
    yield {"what": "copy"}, lambda: {"gigabytes_per_second": rates.copy}
    yield {"what": "matmul"}, lambda: {"teraflops": rates.matmul}
