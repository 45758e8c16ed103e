"""The book's interactive page: plain HTML and JavaScript beside this file, and the numbers that they show, computed here.

`conf.py` writes the numbers when the book is built. `write` makes the same page alone, without Sphinx, for the test of it.
"""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_image

from reproduce.report.query import BUDGETS, mean_loss, settled
from reproduce.store.records import COMMITTED, load
from tucker_ref import Rotary, hosvd

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"  # what the parts load, all of it from `_static`
PARTS = ("ranks.html", "photograph.html", "rope.html")
NUMBERS = "interactive_numbers.js"
LATENT = 8  # channels of the turned query and key


def measured(table: str) -> dict:
    """Mean losses of one table's rows that no run broke off, with what each row takes in one layer.

    Args:
        table: "table2" or "table3".
    """
    groups = {row: runs for row, runs in settled(load(COMMITTED), table).items() if mean_loss(runs) is not None}
    shape = groups["MHA"][0].config
    rows = [
        {
            "row": row,
            "config": runs[0].config["row"],
            "parameters": runs[0].attention_parameters // shape["n_layers"],
            "cache": runs[0].metrics["cache_per_token"] // shape["n_layers"],
            "loss": mean_loss(runs),
            "seeds": len(runs),
        }
        for row, runs in groups.items()
    ]
    title = BUDGETS[table].title.partition(", ")[2]
    return {"title": title, "d": shape["d_model"], "n_H": shape["n_heads"], "n_layers": shape["n_layers"], "rows": rows}


def photograph() -> np.ndarray:
    """Lesson 00's, (row, column, colour), whole numbers from 0 to 255."""
    return load_sample_image("china.jpg")[::3, ::3]


def numbers() -> dict:
    """All that the page shows and does not compute itself. Arrays are base64, row by row: bytes, and floats of four bytes."""
    photo, rng = photograph(), np.random.default_rng(0)
    factors = hosvd(photo / 255.0, photo.shape).factors
    return {
        "measured": [measured("table2"), measured("table3")],
        "photograph": {
            "shape": photo.shape,
            "pixels": _base64(photo),
            "factors": [_base64(factor.astype("<f4")) for factor in factors],
        },
        "rope": {
            "frequencies": Rotary.latent(LATENT).frequencies.tolist(),
            "query": rng.standard_normal(LATENT).tolist(),
            "key": rng.standard_normal(LATENT).tolist(),
        },
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def write_numbers(folder: Path) -> None:
    """The numbers as a script, for pages that are opened from a disk may load scripts but no data."""
    (folder / NUMBERS).write_text(f"const NUMBERS = {json.dumps(numbers())};\n", encoding="utf-8")


def write(folder: Path) -> Path:
    """The page alone, with all that it loads.

    Args:
        folder: an empty one.

    Returns:
        The page's file.
    """
    shutil.copytree(STATIC, folder / "_static")
    write_numbers(folder / "_static")
    parts = "\n".join((FOLDER / part).read_text(encoding="utf-8") for part in PARTS)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Interactive</title>'
    )
    page = folder / "interactive.html"
    page.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{parts}</body></html>', encoding="utf-8")
    return page
