"""Train the language models of Tables 2 and 3: presets, batches, records, and a file to generate from; `held_out` judges them."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from ..data.prepared import is_prepared, open_prepared
from ..data.text import Text, TextData, load_text, read_tests
from ..models.gpt2 import GPT2
from ..models.language_model import LanguageModel
from ..models.llama import Llama
from ..models.rows import Row, row_of
from ..models.sizes import count_cached, count_parameters
from ..store import schema
from ..store.checked import Above, Part, Size, check, read_json
from ..store.locks import locked
from ..store.saved import built, described, fill, kept, make_room, read_metadata, read_model, write_model
from .dry_run import Plan
from .held_out import UnseenText, measure_unseen, read_unseen, validate
from .loop import Diverged, TrainResult, train
from .observe import is_finite, observation
from .options import Options
from .qk_clip import EVERY, clip_heads
from .recipes import Recipe
from .runs import Failures, Run, override
from .settings import OPTIMIZERS, TrainConfig


@dataclass(frozen=True)
class LanguagePreset:
    """How large and how long.

    Args:
        narrower: by what factor d and all latent widths shrink; heads and head ranks stay.
        n_layers: of the model.
        context: tokens of a sequence.
        vocab_size: entries of the tokenizer.
        validation_tokens: the most held-out tokens that a model is judged on.
        train: settings of the training.
        seeds: one run each.
        keep_models: whether trained models are kept, for `generate` and others.
        learning_rates: each one's own best, in place of that in `train`, by row, or by row and change (`method_of`).
        observe_every: steps between looks at norms and logits (observe.py), 0 for none.
        micro_batch: the most sequences that a worker takes at a time, None for no limit.
        text: the prepared text that has to be named with --text, None if the built-in one will do.
        one_pass: each window of the text is read once a pass (`fresh_windows`); one pass, unless --passes says otherwise.
    """

    narrower: int
    n_layers: int
    context: int
    vocab_size: int
    validation_tokens: int
    train: TrainConfig
    seeds: tuple[int, ...] = (0,)
    keep_models: bool = True
    learning_rates: dict[str, float] = field(default_factory=dict)
    observe_every: int = 0
    micro_batch: int | None = None
    text: str | None = None
    one_pass: bool = False

    def rate(self, row: str, method: str = "") -> float:
        """The peak learning rate of a row.

        Args:
            row: its label.
            method: as `method_of` names it, if it is trained otherwise.
        """
        return self.learning_rates.get(method, self.learning_rates.get(row, self.train.learning_rate))


class ModelConfig(Part):
    """What `build_model` builds a model from."""

    model: Literal["gpt2", "llama"]
    attention: schema.Row
    d_model: Size
    n_heads: Size
    n_layers: Size
    context: Size
    vocab_size: Size
    rope_base: Above | None = None  # of a Llama


def method_of(row: str, recipe: Recipe) -> str:
    """What tables and records call a row that is trained in this way."""
    return f"{row}, {recipe.name}" if recipe.config() else row


def build_model(config: dict) -> LanguageModel:
    """The model that a run's config describes, freshly initialised.

    Args:
        config: as `config_of` makes it, or as read back from JSON.
    """
    row = row_of(config["attention"])
    shape = (config["d_model"], config["n_heads"], config["n_layers"])
    if config["model"] == "gpt2":
        return GPT2(config["vocab_size"], config["context"], *shape, row.build)
    return Llama(config["vocab_size"], *shape, lambda d, h: row.build(d, h, config["rope_base"]))


def settings_of(row: Row, recipe: Recipe, preset: LanguagePreset, options: Options) -> TrainConfig:
    """How this row is trained: by the preset, at its own rate, but for what the command line and the recipe change.

    Args:
        row, recipe: which model, and what is changed in its training.
        preset: the scale.
        options: what the command line says.

    Raises:
        ValueError: for a row with QK-norm whose logits are to be clipped, and for --passes where windows are drawn at random.
    """
    train = dataclasses.replace(preset.train, learning_rate=preset.rate(row.label, method_of(row.label, recipe)))
    if options.passes is not None:
        if not preset.one_pass:
            raise ValueError(f"--passes: --preset {options.preset} draws its windows at random, with replacement")
        steps, warmup = (round(options.passes * n) for n in (train.steps, train.warmup_steps))
        train = dataclasses.replace(train, steps=steps, warmup_steps=warmup)
    settings = recipe.settings(override(train, options))
    if settings.qk_clip and row.qk_norm:
        raise ValueError(f"--qk-clip {settings.qk_clip:g}: QK-norm bounds the logits of {row.label} already; name other --rows")
    return settings


def passes_of(preset: LanguagePreset, options: Options) -> dict:
    """What a record's config says of how often the text is read: nothing where windows are drawn at random."""
    if not preset.one_pass:
        return {}
    return {"passes": int(options.passes)} if options.passes and options.passes > 1 else {"one_pass": True}


def config_of(row: Row, model: dict, preset: LanguagePreset, vocab_size: int) -> dict:
    """What defines this row's model, for its record and for `build_model`.

    Args:
        row: at full size.
        model: as in `train_rows`.
        preset: by how much it is narrower, and how deep.
        vocab_size: of the tokenizer.
    """
    return {
        **model,
        "row": row.config(),
        "attention": row.narrowed(preset.narrower).config(),
        "d_model": model["d_model"] // preset.narrower,
        "n_layers": preset.n_layers,
        "context": preset.context,
        "vocab_size": vocab_size,
    }


def read_text(preset: LanguagePreset, options: Options, tests: Iterable[Text] = ()) -> TextData:
    """The tokens to train on: those of a prepared folder, or of a text that fits into memory.

    Args:
        preset: which text it wants, if one.
        options: paths of the command line.
        tests: as in `load_text`; `read_unseen` looks for them in prepared tokens.

    Raises:
        ValueError: if the preset's text is not named, an option does not go with a prepared one, or the text cannot be read.
    """
    if preset.text and options.text is None:
        raise ValueError(
            f"--preset {options.preset} is trained on {preset.text}: name a folder with --text that "
            f"`python -m reproduce prepare {preset.text} --out FOLDER` wrote"
        )
    if is_prepared(options.text):
        if unused := [name for name in ("validation", "bpe") if getattr(options, name)]:
            raise ValueError(f"--{unused[0]}: {options.text} is prepared, with byte pairs and a held-out part of its own")
        return open_prepared(options.text)
    return load_text(options.text, preset.vocab_size, options.out / "cache", options.validation, options.bpe, tests)


def plan_of(
    experiment: str,
    rows: list[tuple[Row, Recipe]],
    model: dict,
    preset: LanguagePreset,
    options: Options,
    known: tuple,
    ours: tuple,
) -> Plan:
    """What `train_rows` would take, for --dry-run.

    Args:
        experiment, rows, model, preset, options: as in `train_rows`.
        known, ours: settings of the preset `paper` that the paper tells, and those that we chose; other presets are all ours.
    """
    if options.preset != "paper":
        rates = dict.fromkeys(f"{settings_of(row, recipe, preset, options).learning_rate:g}" for row, recipe in rows)
        by_row = ", by row" if len(rates) > 1 else ""
        known, ours = (
            (),
            (f"{OPTIMIZERS[options.optimizer or preset.train.optimizer]} at a peak rate of {' or '.join(rates)}{by_row}",),
        )
        if preset.one_pass:
            times = passes_of(preset, options).get("passes")
            ours += (f"each window of the text read {f'{times} times' if times else 'once'}, in an order of the seed",)
    configs = {row.label: config_of(row, model, preset, preset.vocab_size) for row, _ in rows}
    settings = settings_of(*rows[0], preset, options)
    return Plan(
        experiment=experiment,
        title=f"{experiment}, preset {options.preset},",
        data=options.text or preset.text or "the standard library's source",
        labels=tuple(configs),
        build=lambda label: build_model(configs[label]),
        block=lambda label: build_model(configs[label] | {"n_layers": 1, "vocab_size": 1}).blocks[0],
        settings=settings,
        samples="sequences",
        tokens=preset.context,
        outputs=preset.context * preset.vocab_size,
        seeds=options.seeds or preset.seeds,
        largest_micro_batch=preset.micro_batch,
        shape={name: next(iter(configs.values()))[name] for name in ("model", "d_model", "n_layers", "context", "vocab_size")},
        known=known,
        ours=ours,
    )


def train_rows(
    experiment: str,
    rows: Iterable[tuple[Row, Recipe]],
    model: dict,
    preset: LanguagePreset,
    options: Options,
) -> None:
    """Train every row with every seed, and record each run; those on record are skipped.

    Args:
        experiment: what the records belong to.
        rows: each with what is changed in its training.
        model: the paper's shape (`model`, "gpt2" or "llama"; `d_model`, `n_heads`), and the `rope_base` of a Llama.
        preset: the scale.
        options: what the command line says.

    Raises:
        ValueError: if the text is too short for one window, as `read_text` and `train_one` do, and at the end for runs that failed.
    """
    tests = read_tests(options.test)
    data = read_text(preset, options, tests)
    for part in ("train", "validation"):
        if (length := len(getattr(data, part))) <= preset.context:
            raise ValueError(f"{data.name}: {length} {part} tokens are fewer than one window of {preset.context + 1}")
    unseen = read_unseen(tests, data)
    cases = [
        (row, recipe, settings_of(row, recipe, preset, at_rate))
        for (row, recipe), at_rate in itertools.product(rows, options.at_each_rate())
    ]
    failures = Failures(options.device, RuntimeError)  # of memory, or of a kernel that does not take a row's widths
    for row, recipe, settings in cases:
        changes = recipe.config()
        config = config_of(row, model, preset, data.vocab_size) | {"train": settings.config()}
        config |= {"recipe": changes} if changes else {}
        config |= passes_of(preset, options)
        for seed in options.seeds or preset.seeds:
            run = Run(experiment, options, method_of(row.label, recipe), config, seed, data.describe())
            if not run.is_done():
                # Several workers wait for one another: one that goes on by itself would wait for ever.
                with failures.kept(run.title) if options.workers.count == 1 else contextlib.nullcontext():
                    train_one(run, settings, data, preset, recipe, unseen)
            elif preset.keep_models and options.workers.is_first and not kept(model_path(options.out, run.title), run.identity):
                tqdm.write(
                    f"{run.title}: its model is no longer in {model_path(options.out, run.title).parent}; to train it again, "
                    "name another folder with --records"
                )
    failures.tell()


def train_one(
    run: Run, settings: TrainConfig, data: TextData, preset: LanguagePreset, recipe: Recipe, unseen: list[UnseenText]
) -> None:
    """Train this run's model, record its validation loss, and keep it for `generate`; a run that diverges is on record as such.

    Args:
        run: what is trained, with its config.
        settings: how.
        data: on what.
        preset: how it is judged and observed, and whether it is kept.
        recipe: what is changed.
        unseen: texts that the finished model reads once, after which nothing is decided any more.

    Raises:
        ValueError: for --qk-clip with several workers, and as `train` does.
    """
    config, context = run.config, run.config["context"]

    def fresh():
        torch.manual_seed(run.seed)
        model = build_model(config)
        recipe.prepare(model)
        return model.to(run.options.device)

    if settings.qk_clip and run.options.workers.count > 1:
        raise ValueError("--qk-clip looks at the logits of whole layers; it runs on one worker, without torchrun")
    model = fresh()
    workers = run.options.workers.settled(settings.batch_size, count_parameters([model]), preset.micro_batch)
    passes = config.get("passes", 1)
    windows = fresh_windows(data.train, run.seed, settings, context, passes) if preset.one_pass else None

    def batch_at(step):
        rows, size = workers.rows(settings.batch_size), settings.batch_size
        if windows is None:
            return (batch_of(data.train, step, run.seed, size, context, rows),)
        return (stacked(data.train, windows[step * size : (step + 1) * size][rows], context),)

    def one_sequence(step):
        return batch_at(step)[0][:1, :-1].to(run.options.device)

    def observe(step):
        if preset.observe_every and step % preset.observe_every == 0 and workers.sharding != "fsdp":  # needs whole tensors
            return observation(model, one_sequence(step))

    def clip(step):
        if settings.qk_clip and step % EVERY == 0:
            clip_heads(model, one_sequence(step), settings.qk_clip)

    try:
        result = train(
            model, batch_at, LanguageModel.loss, settings, run.checkpoint, run.title, observe, recipe.optimizer, workers, clip
        )
    except Diverged as error:
        tqdm.write(f"{error}; recorded")
        error.result.observations = list(filter(is_finite, error.result.observations))
        if workers.is_first:
            run.finish({"diverged_at": error.step, **about(model, error.result)}, error.result.seconds)
        return workers.wait()
    model = workers.unsharded(model, fresh)
    if not workers.is_first:
        return workers.wait()
    metrics = validate(model, data, context, workers.micro_batch, preset.validation_tokens, settings.precision, run.title)
    if not math.isfinite(metrics["validation_loss"]):
        tqdm.write(f"{run.title}: after step {settings.steps}, the last one, the loss is no number; recorded as diverged")
        run.finish({"diverged_at": settings.steps, **about(model, result)}, result.seconds)
        return workers.wait()
    if unseen:
        metrics["test"] = measure_unseen(model, unseen, context, workers.micro_batch, settings.precision, run.title)
    tokens_seen = settings.steps * settings.batch_size * context
    if preset.keep_models:
        path, about_run = model_path(run.options.out, run.title), {"run": run.identity, "preset": run.options.preset}
        about_run["validation_loss"] = json.dumps(metrics["validation_loss"])
        with locked(path.parent):  # runs of one title at several rates, side by side, may end at the same time
            make_room(path, run.identity)
            save_model(path, model, config, data.tokenizer, **about_run, data=json.dumps(run.data))
    run.finish(
        {
            **metrics,
            "tokens_seen": tokens_seen,
            "tokens_per_second": round(tokens_seen / result.seconds) if result.seconds and len(result.machines) == 1 else None,
            **about(model, result),
            "workers": workers.describe(settings.batch_size),
        },
        result.seconds,
    )
    workers.wait()


def about(model: LanguageModel, result: TrainResult) -> dict:
    """Of a record's metrics, those that need no validation: sizes, the curve, and what was observed.

    Args:
        model: the trained one.
        result: what its training left behind.
    """
    layers = [block.attention for block in model.blocks]
    return {
        "attention_parameters": count_parameters(layers),
        "cache_per_token": count_cached(layers),
        "curve": result.curve,
        **({"observations": result.observations} if result.observations else {}),
        **({"machines": result.machines} if len(result.machines) > 1 else {}),
    }


def batch_of(
    tokens: np.ndarray, step: int, seed: int, batch_size: int, context: int, rows: slice = slice(None)
) -> torch.Tensor:
    """The random windows of one training step, a function of (seed, step) alone.

    Args:
        tokens: (tokens,), more than `context`.
        step: from 0.
        seed: of the run.
        batch_size: windows in all.
        context: N; a window holds one token more.
        rows: which of them are wanted, of several workers this one's.

    Returns:
        (rows, context + 1) int64.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size=batch_size)[rows]
    return stacked(tokens, starts, context)


def fresh_windows(tokens: np.ndarray, seed: int, settings: TrainConfig, context: int, passes: int = 1) -> np.ndarray:
    """Where the windows of all steps start: the text cut into windows, each taken once, in an order that the seed alone decides.

    Every token is a target once; two windows share the one token where they meet. A further pass takes the windows of the first one
    again, in an order of its own.

    Args:
        tokens: (tokens,).
        seed: of the run.
        settings: how many steps of how many windows.
        context: N; a window holds one token more.
        passes: over how many the steps are spread.

    Returns:
        (windows,) integers.

    Raises:
        ValueError: if there are fewer windows than the run needs.
    """
    count, needed = (len(tokens) - 1) // context, math.ceil(settings.steps * settings.batch_size / passes)
    if count < needed:
        times = "once" if passes == 1 else f"{passes} times"
        raise ValueError(
            f"{settings.steps} steps of {settings.batch_size} windows need {needed * context + 1:,} tokens, each read {times}; the "
            f"text has {len(tokens):,}: at most {count * passes // settings.batch_size} steps"
        )
    first = np.random.default_rng(seed).permutation(count)[:needed]
    again = (np.random.default_rng((seed, number)).permutation(first) for number in range(1, passes))
    return context * np.concatenate([first, *again])


def stacked(tokens: np.ndarray, starts: np.ndarray, context: int) -> torch.Tensor:
    """The windows that start at some places.

    Args:
        tokens: (tokens,).
        starts: (rows,) places of first tokens.
        context: N; a window holds one token more.

    Returns:
        (rows, context + 1) int64.
    """
    return torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))


def model_path(out: Path, title: str) -> Path:
    """Where a trained model is kept; a name without spaces or brackets, since it will be typed in a shell."""
    return out / "models" / f"{re.sub(r'[^A-Za-z0-9_.=]+', '-', title)}.safetensors"


def model_of(out: Path, title: str, preset: str) -> Path | None:
    """The newest model with this title that this preset trained, None if there is none.  Args, Raises: as in `models_of`."""
    return next(models_of(out, title, preset), None)


def models_of(out: Path, title: str, preset: str) -> Iterator[Path]:
    """Models with this title that this preset trained, the newest first: under its name, then those moved aside.

    Args:
        out: as `model_path` takes it.
        title: of a run.
        preset: a file that names none counts as this preset's.

    Yields:
        Their files.

    Raises:
        ValueError: if a file of that name is damaged.
    """
    path = model_path(out, title)
    aside = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"), key=lambda place: -place.stat().st_mtime)
    for place in ([path] if path.exists() else []) + aside:
        if read_metadata(place).get("preset", preset) == preset:
            yield place


def save_model(path: Path, model: LanguageModel, config: dict, tokenizer: str, **more: str) -> None:
    """Weights, config and tokenizer in one safetensors file.

    Args:
        path: the file.
        model: the trained one.
        config: what `build_model` builds it from.
        tokenizer: its JSON, for `tokenizers`.
        more: what else the file should say, such as the run and its preset.
    """
    write_model(path, model, {"config": json.dumps(config), "tokenizer": tokenizer, **more})


def load_model(path: Path) -> tuple[LanguageModel, str, dict]:
    """A model that `save_model` kept.

    Args:
        path: the file.

    Returns:
        The model in evaluation mode, its tokenizer's JSON and its config.

    Raises:
        ValueError: if the file is damaged or holds another model.
    """
    metadata, tensors = read_model(path)
    if not {"config", "tokenizer"} <= set(metadata):
        raise ValueError(f"{path} holds no language model of this program: it names no config and tokenizer")
    with described(path):
        config = read_json(metadata["config"], "its config")
        check(ModelConfig, config, "its config")
        if config["model"] == "llama" and config.get("rope_base") is None:
            raise ValueError("its config has no rope_base, from which a Llama's frequencies come")
        tokens = Tokenizer.from_str(metadata["tokenizer"]).get_vocab().values()
        if max(tokens, default=0) >= config["vocab_size"]:
            raise ValueError(f"its tokenizer makes token {max(tokens):,}, beyond a vocabulary of {config['vocab_size']:,}")
    model = built(path, lambda: build_model(config), config["n_layers"])
    return fill(model, metadata, tensors, path), metadata["tokenizer"], config
