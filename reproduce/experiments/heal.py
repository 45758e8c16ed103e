"""Heal a model that others trained: convert its attention to half the cache, train the attention alone, and see how much comes back.

A public causal model (--model) gets the attention of each row of `compress_models` that has half of its cache: GQA, MLA and Tucker
Attention, made with what the layers read in --text. Then the attention is trained on that text to predict the next token; everything else
is frozen. Every row is trained at three rates (--learning-rate for others), and the loss on held-out text (--validation) picks one. The
texts of --test are read before the conversion, after it, and once by the model that was picked. The row "as it is" is the control:
the unconverted model, trained in the same way, so that what the text itself teaches is not taken for healing.

    python -m reproduce heal --model models/gemma-270m --text train.txt --validation val.txt --test test.txt --preset gpu --device cuda

A row takes up where it was stopped when the command is repeated: until it is on record each rate has a checkpoint of its own, and what
is known of its rates stands in a small file beside them.
"""

import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.text import read_documents, read_tests
from ..models.language_model import cross_entropy
from ..models.public.opened import NEXT, OpenModel
from ..models.sizes import count_cached, count_parameters
from ..store.checked import Part, check, read_json
from ..store.files import write_atomically
from ..store.schema import RateDiverged, RateEnded
from ..train.loop import Diverged, train
from ..train.options import Options
from ..train.public_models import open_model
from ..train.runs import Run, override
from ..train.settings import TrainConfig
from .compress_models import Way, check_compressible, chosen, losses, ways
from .moments import moments
from .samples import Corpus, Windows, corpus, spread
from .spectra import WINDOW, WINDOWS, trilinear

TAKES = ("device", "rows", "seeds", "training", "text", "validation", "test", "model")
SHARE = 1 / 2  # of the model's own cache
AS_IT_IS = "as it is"  # the control
ELSEWHERE = "with the parameters"  # in the label of a row that saves parameters, and hardly any cache
ATTENTION_ONLY = dict(final_share=0.1, weight_decay=0.0, beta1=0.9, beta2=0.95)


@dataclass(frozen=True)
class Preset:
    """One scale.

    Args:
        train: how; its rate is one of `rates`.
        window: tokens of a sequence, special ones included.
        micro_batch: the most sequences at a time: logits over a large vocabulary take more than all layers.
        rates: peak rates, one run at each.
        judged: windows of each held-out and test text.
    """

    train: TrainConfig
    window: int
    micro_batch: int
    rates: tuple[float, ...] = (5e-5, 2e-4, 8e-4)
    judged: int = 128


PRESETS = {
    # Says that a command works, in minutes on a CPU.
    "smoke": Preset(
        TrainConfig(steps=20, batch_size=4, learning_rate=0.0, warmup_steps=5, log_every=5, checkpoint_every=10, **ATTENTION_ONLY),
        window=64,
        micro_batch=4,
        judged=8,
    ),
    # 20M tokens: 1,220 steps of 32 sequences of 512.
    "gpu": Preset(
        TrainConfig(
            steps=1220, batch_size=32, learning_rate=0.0, warmup_steps=60, precision="bfloat16", log_every=20, checkpoint_every=200,
            **ATTENTION_ONLY,
        ),
        window=512,
        micro_batch=16,
    ),
}  # fmt: skip


def run(options: Options) -> None:
    """One record per row and seed.

    Args:
        options: `model`, `text`, `validation` and `test`; `rows` by label; `seeds`; rates and steps.

    Raises:
        ValueError: without a model or a test text, for a model that predicts something else than the next token or whose attention
            cannot be converted, and for a text that is too short.
    """
    if not options.model or not options.test:
        raise ValueError("heal needs --model, and --test texts to judge by")
    opened = open_model(options.model, trust_layers=options.trust_layers)
    check_compressible(opened)
    if opened.predicts != NEXT:
        raise ValueError(f"{opened.name} predicts {opened.predicts}; healing is training on the next token")
    study = Study.of(opened, options)
    layers = {
        place: copy.deepcopy(layer).cpu() for place, layer in opened.layers.items()
    }  # converted there, trained on the device
    known = {place: moment.cpu() for place, moment in moments(opened, layers, list(study.read.tokens.split(1))).items()}
    tensors = {place: trilinear(layer, known[place]) for place, layer in layers.items()}
    control = Way(AS_IT_IS, 1.0, lambda place: copy.deepcopy(layers[place]))
    halved = [way for way in ways(layers, tensors, known) if way.share == SHARE and ELSEWHERE not in way.label]
    rows = chosen([control, *halved], options.rows)
    runs = [(way, study.run_of(way.label, seed)) for seed in options.seeds or (0,) for way in rows]
    if left := [(way, this) for way, this in runs if not this.is_done()]:
        before = study.judged()
        before |= {"attention_parameters": count_parameters(layers.values()), "cache": count_cached(list(layers.values()))}
        for way, this in left:
            study.heal(way, this, before)


class Attention(nn.Module):
    """All attention layers of a model and nothing else of it: what is trained, and what a checkpoint holds.

    Args:
        layers: in the order of the model.
    """

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(layers)


class Known(Part):
    """What there is of the rates of a row that was stopped."""

    rates: list[RateEnded | RateDiverged]


@dataclass
class Study:
    """A model, its texts, and how it is trained.

    Args:
        opened: on the device, all of it frozen.
        options: what the command line decides.
        preset: the scale.
        settings: of the training, but for the rate.
        text: to train on, and to choose by.
        read: windows of it, which the layers read before they are converted.
        tests: what is read before, between and after.
    """

    opened: OpenModel
    options: Options
    preset: Preset
    settings: TrainConfig
    text: Corpus
    read: Windows
    tests: list[Windows]

    @classmethod
    def of(cls, opened: OpenModel, options: Options) -> "Study":
        """Texts read and the model frozen.  Raises ValueError as `corpus` and `spread` do."""
        preset = PRESETS[options.preset]
        settings = override(preset.train, options)
        windows = settings.steps * settings.batch_size
        tests, text = read_tests(options.test), read_documents(options.text)
        trains = corpus(opened, text, options.validation, windows, preset.window, preset.judged, tests)
        judges = [spread(opened, test, preset.judged, preset.window, "--test") for test in tests]
        opened.model.to(options.device).requires_grad_(False)
        return cls(opened, options, preset, settings, trains, spread(opened, text, WINDOWS, WINDOW), judges)

    @property
    def rates(self) -> tuple[float, ...]:
        """Those that are tried."""
        return self.options.learning_rates or self.preset.rates

    def run_of(self, label: str, seed: int) -> Run:
        """The run of one row."""
        train = {name: value for name, value in self.settings.config().items() if name != "learning_rate"}
        healing = {**train, "window": self.text.tokens.shape[1], "rates": list(self.rates), "judged": self.preset.judged}
        data = {
            "name": self.text.name,
            "sha256": self.text.sha256,
            "unit": "tokens",
            "tokens": self.text.tokens.numel(),
            "validation": self.text.held_out.describe(),
            "tests": [test.name for test in self.tests],
        }
        return Run("heal", self.options, label, self.opened.config() | {"healing": healing}, seed, data)

    def heal(self, way: Way, this: Run, before: dict) -> None:
        """Convert, train at every rate, and record what the best one reaches.

        Args:
            way: how the layers are converted.
            this: the run to record.
            before: what the model was judged to be, and its sizes.
        """
        started = time.perf_counter()
        converted = {place: way.convert(place).to(self.options.device) for place in self.opened.layers}
        self.opened.put(converted)
        metrics = {
            "share": way.share,
            "attention_parameters": way.parameters or count_parameters(converted.values()),
            "cache": count_cached(list(converted.values())),
            **({"ranks": way.ranks()} if way.ranks else {}),
            "trained_parameters": count_parameters(converted.values()),
            "tokens_seen": self.text.tokens[:, 1:].numel(),
            "before": before,
            "converted": self.judged(),
            **self.opened.measured(),
        }
        metrics["rates"], healed = self.tried(this, converted)
        if healed is not None:
            self.opened.put(dict(zip(converted, healed.blocks)))
            metrics["chosen"] = preferred(metrics["rates"])
            metrics["healed"] = self.judged()
        this.finish(metrics, time.perf_counter() - started)
        for file in (self.known(this), *(self.checkpoint(this, rate) for rate in self.rates)):
            file.unlink(missing_ok=True)
        tqdm.write(f"{this.title}: {in_words(metrics)}")

    def tried(self, this: Run, converted: dict[str, nn.Module]) -> tuple[list[dict], Attention | None]:
        """Every rate, and the attention of the one that held-out text prefers.

        What is known of a rate stays in a small file until the row is on record. Where that is all that is left of the one that is
        preferred, as on another machine, it alone is trained again.

        Args:
            this: the run.
            converted: the layers to start from, by place.

        Returns:
            What a record says of each rate; and the layers, None where all rates break off.

        Raises:
            ValueError: for a file that is damaged.
        """
        file = self.known(this)
        known, held = known_rates(file), dict[float | None, Attention]()

        def attempt(rate: float) -> None:
            attention = Attention([copy.deepcopy(layer) for layer in converted.values()])
            self.opened.put(dict(zip(converted, attention.blocks)))
            known[rate] = self.train(attention, this, rate)
            state = json.dumps({"rates": ordered()}).encode()
            write_atomically(file, lambda target: target.write(state))
            if preferred(ordered()) == rate:
                held.clear()
                held[rate] = attention

        def ordered() -> list[dict]:
            return [known[rate] for rate in self.rates if rate in known]

        for rate in self.rates:
            if rate not in known:
                attempt(rate)
        while (best := preferred(ordered())) not in (None, *held):
            attempt(best)
        return ordered(), held.get(best)

    def train(self, attention: Attention, this: Run, rate: float) -> dict:
        """One rate: what a record says of it.

        Args:
            attention: the layers, which stand in the model; trained in place.
            this: the run.
            rate: peak.
        """
        settings = dataclasses.replace(self.settings, learning_rate=rate)
        rows = self.text.tokens[np.random.default_rng(this.seed).permutation(len(self.text.tokens))]  # (windows, tokens)
        size = settings.batch_size
        attention.requires_grad_(True)
        title = f"{this.title} rate {rate:g}"
        workers = self.options.workers.settled(size, count_parameters([attention]), self.preset.micro_batch)
        try:
            result = train(
                attention, lambda step: (rows[step * size : (step + 1) * size].long(),), self.loss, settings,
                self.checkpoint(this, rate), title, workers=workers,
            )  # fmt: skip
        except Diverged as error:
            tqdm.write(f"{error}; recorded")
            return {"learning_rate": rate, "diverged_at": error.step, "curve": error.result.curve}
        attention.requires_grad_(False)
        loss = losses(self.opened, self.text.held_out)["loss"]
        if not math.isfinite(loss):  # of weights that the last step spoiled
            return {"learning_rate": rate, "diverged_at": settings.steps, "curve": result.curve}
        return {"learning_rate": rate, "validation_loss": loss, "curve": result.curve, "seconds": round(result.seconds, 1)}

    def loss(self, _attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
        """Of the next token, nats; the model calls the attention.  tokens: (b, n)."""
        logits = self.opened.logits(self.opened.model, tokens[:, :-1])  # (b, n - 1, vocabulary)
        return self.cross_entropy(logits, tokens[:, 1:])

    @functools.cached_property
    def cross_entropy(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The loss; compiled on a GPU, where logits of a large vocabulary are then never written in float32."""
        return torch.compile(cross_entropy, dynamic=False) if self.options.device.startswith("cuda") else cross_entropy

    def checkpoint(self, this: Run, rate: float) -> Path:
        """Where a rate's training stands until its row is on record."""
        return this.checkpoint.with_stem(f"{this.checkpoint.stem}-rate-{rate:g}")

    def known(self, this: Run) -> Path:
        """What is known of its rates until the row is on record."""
        return this.checkpoint.with_suffix(".json")

    def judged(self) -> dict:
        """The losses of the model as it stands: on held-out text, and on each test text with those of every window."""
        tests = {test.name: losses(self.opened, test) for test in self.tests}
        return {"validation_loss": losses(self.opened, self.text.held_out)["loss"], "tests": tests}


def known_rates(file: Path) -> dict[float, dict]:
    """By rate what `Study.tried` left of a row that was stopped; nothing where it left none.  Raises ValueError for a damaged file."""
    if not file.exists():
        return {}
    where = f"{file}: delete it to try all rates again; it"
    said = read_json(file.read_text(encoding="utf-8"), where)
    check(Known, said, where)
    return {rate["learning_rate"]: rate for rate in said["rates"]}


def preferred(rates: list[dict]) -> float | None:
    """The rate with the lowest loss on held-out text, the first of several; None where all broke off.  rates: as a record has them."""
    ended = [rate for rate in rates if "validation_loss" in rate]
    return min(ended, key=lambda rate: rate["validation_loss"])["learning_rate"] if ended else None


def in_words(metrics: dict) -> str:
    """For the terminal: bits per byte of every test text before, after the conversion, and healed."""
    states, texts = [state for state in ("before", "converted", "healed") if state in metrics], []
    for name in metrics["before"]["tests"]:
        said = (f"{state} {metrics[state]['tests'][name]['bits_per_byte']:.3f}" for state in states)
        texts.append(f"{name} {', '.join(said)}")
    return f"{'; '.join(texts)} bits per byte" + ("" if "healed" in metrics else "; diverged at every rate")
