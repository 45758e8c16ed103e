"""What the GPU's commands do, at toy size on the pretended device: a program, since a process keeps that device (second_device.py).

    python tests/on_second_device.py FOLDER

It writes FOLDER/said.json: by the name of each body the error that it ended with, or nothing.
"""

import dataclasses
import hashlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np
import second_device
import torch

from reproduce.experiments import (
    compress_models,
    figure3,
    figure3_tiny,
    generation_speed,
    heal,
    spectra,
    speed,
    table2,
    table3,
    two_gpus,
)
from reproduce.models.rows import Row
from reproduce.store import records
from reproduce.train import loop
from reproduce.train.options import Options
from reproduce.trust import opening

heal.WINDOWS = compress_models.WINDOWS = compress_models.TEST_WINDOWS = spectra.WINDOWS = 2  # of each text
compress_models.PAIRS = 3
DEVICE, FOLDER = second_device.NAME, Path(sys.argv[1])
SHORT = dict(batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=1, precision="bfloat16", compiled=False)
IMAGES = "gpu-tiny-imagenet"
TUCKER = Row("Tucker", ranks=(3, 6, 4), post_ranks=(3, 2, 4))


def options(preset: str, place: str, **more) -> Options:
    return Options(preset, FOLDER / place, FOLDER / place / "records", device=DEVICE, **more)


def texts() -> dict:
    """Three texts, as the options name them."""
    paths = [FOLDER / f"{name}.txt" for name in ("text", "validation", "test")]
    for path in paths:
        count = 6 if path.stem == "validation" else 300
        lines = (
            f"Of {path.stem} this line says {n * n} here. Another line follows the line before it now." for n in range(count)
        )
        path.write_text("\n".join(lines), encoding="utf-8")
    text, validation, test = map(str, paths)
    return {"text": text, "validation": validation, "test": (test,)}


def small(module, preset: str, narrower: int, precision: str = "bfloat16", **more) -> str:
    """A language preset at toy size."""
    found = module.PRESETS[preset]
    train = dataclasses.replace(found.train, steps=2, **SHORT | {"precision": precision})
    sizes = dict(n_layers=1, context=16, vocab_size=300, validation_tokens=64, micro_batch=1, seeds=(0,))
    module.PRESETS[preset] = dataclasses.replace(found, narrower=narrower, train=train, **sizes, **more)
    return preset


def trained_kept_and_looked_at():
    preset = small(table2, "gpu-fresh-optimizers", 64, observe_every=1)
    spectra.PRESETS[preset], spectra.WINDOW = table2.PRESETS[preset], 16
    given = options(preset, "language", rows=("MHA",), **texts() | {"validation": None})
    save, saved = loop._save, []

    def stopping(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 1:
            raise InterruptedError

    loop._save = stopping
    try:
        table2.run(given)
    except InterruptedError:
        table2.run(given)  # goes on from the checkpoint
    table2.run(dataclasses.replace(given, optimizer="adamw", learning_rates=(1e-3,), qk_clip=0.01))
    spectra.run(dataclasses.replace(given, test=()))
    assert len(records.load(given.records, "spectra")) == 2 and len(saved) == 4


def llamas():
    """The same losses as on the CPU, from the same weights; control: from others another loss."""
    preset, losses = small(table3, "gpu-fresh", 16, "float32", observe_every=0), []
    for device, seed in ((DEVICE, 0), ("cpu", 0), ("cpu", 1)):
        given = options(preset, f"llama {device} {seed}", rows=("Tucker [32,128,64]",), seeds=(seed,), **texts())
        table3.run(dataclasses.replace(given, device=device))
        (found,) = records.load(given.records, "table3", preset)
        losses.append(found.metrics["test"]["test.txt"]["loss"])
    there, here, other = losses
    assert abs(there - here) < 1e-5 * here < 1e-3 * here < abs(other - here)


def workers():
    place = FOLDER / "two"
    place.mkdir()
    case = two_gpus.PRESETS["smoke"]["table2"]
    shorter = dataclasses.replace(case.preset, train=dataclasses.replace(case.preset.train, steps=2))
    two_gpus.PRESETS["smoke"]["table2"] = dataclasses.replace(case, preset=shorter)
    given = {"preset": "smoke", "device": DEVICE, "micro_batch": 2, "text": texts()["text"], "bpe": None, "out": str(place)}
    written, plain = [], loop._save
    loop._save = lambda path, *rest: written.append(path) or plain(path, *rest)
    try:
        for lasting in (False, True):
            two_gpus.worker(place, given | {"case": "table2", "lasting": lasting})
            assert (place / "result.json").exists() and len(written) == lasting
    finally:
        loop._save = plain


def healed_and_compressed():
    architectures = {(a.name, a.which): a for a in opening.ARCHITECTURES}
    opening.save(architectures["GPT-2", ""], FOLDER / "gpt2")
    opening.save(architectures["BERT", "without a head"], FOLDER / "bert")
    preset = heal.PRESETS["gpu"]
    heal.PRESETS["gpu"] = dataclasses.replace(
        preset, train=dataclasses.replace(preset.train, steps=2, **SHORT), window=24, micro_batch=1, rates=(1e-3,), judged=2
    )
    label = "MLA separated d_c=24"
    heal.run(options("gpu", "heal", model=str(FOLDER / "gpt2"), rows=(heal.AS_IT_IS, label), **texts()))
    for kind in ("gpt2", "bert"):
        read = {name: texts()[name] for name in ("text", "test")}
        given = options("smoke", kind, model=str(FOLDER / kind), **read)
        compress_models.run(dataclasses.replace(given, rows=(label,)))
    spectra.run(dataclasses.replace(given, test=()))


def images(place="images", starts=("hosvd", "moment", "hooi")):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 6
    np.savez(FOLDER / "images.npz", x_train=x, y_train=y, x_test=255 - x, y_test=y)
    found = PRESETS_OF_IMAGES
    preset = dataclasses.replace(
        found,
        rows=(TUCKER, Row("GQA", n_kv_heads=2)),
        **{part: dataclasses.replace(getattr(found, part), **SHORT | {"batch_size": 8}) for part in ("pretrain", "finetune")},
        **dict(image_size=8, n_classes=6, images=24, patch_size=4, d_model=16, n_heads=4, n_layers=1, held_out=6),
        **dict(pretrain_epochs=1, epochs=1, pretrain_rates=(1e-3,), rates=(1e-3,), seeds=(0, 1)),
    )
    figure3.PRESETS[IMAGES] = figure3_tiny.PRESETS[IMAGES] = preset
    for start in starts:
        figure3.run(options(IMAGES, place, start=start, images=str(FOLDER / "images.npz")))


PRESETS_OF_IMAGES = figure3_tiny.PRESETS[IMAGES]


def generation():
    preset = generation_speed.PRESETS["smoke"]
    changes = dict(batches=(2,), contexts=(16,), steps=3, repeats=1, shapes=preset.shapes[:1])
    generation_speed.PRESETS["smoke"] = dataclasses.replace(preset, **changes)
    generation_speed.run(options("smoke", "generation"))


def timed():
    speed.PRESETS["smoke"] = dataclasses.replace(speed.PRESETS["smoke"], repeats=1)
    speed.run(options("smoke", "speed", rows=("memory", "step", "curves")))


# Controls: each must fail.


def read_by_numpy():
    """As it was when it ended a run on a GPU."""
    hashed = lambda model: hashlib.sha256(next(model.parameters()).detach().numpy()).hexdigest()  # noqa: E731
    plain, figure3_tiny.weights_hash = figure3_tiny.weights_hash, hashed
    try:
        images("read by NumPy", starts=("moment",))
    finally:
        figure3_tiny.weights_hash = plain


def mixed():
    plain, heal.Study.loss = heal.Study.loss, lambda self, attention, tokens: plain(self, attention, tokens.cpu())
    heal.run(options("gpu", "mixed", model=str(FOLDER / "gpt2"), rows=(heal.AS_IT_IS,), **texts()))


def of_another_generator():
    torch.randn(2, device=DEVICE, generator=torch.Generator())


BODIES = (trained_kept_and_looked_at, llamas, workers, healed_and_compressed, images, generation, timed)
CONTROLS = (read_by_numpy, mixed, of_another_generator)

if __name__ == "__main__":
    said = {}
    for body in (*BODIES, *CONTROLS):
        try:
            body()
            said[body.__name__] = ""
        except Exception:
            said[body.__name__] = traceback.format_exc()
    (FOLDER / "said.json").write_text(json.dumps(said), encoding="utf-8")
