"""Generation: tokens a second of whole models with random weights, at several batches and contexts, beside what others write with.

Four ways: "static, sdpa" and "static, triton" are `models.decoding.Decoder` with that backend, blocks compiled, a CUDA graph a step;
"PyTorch" is multi-head attention over a static cache in plain PyTorch, compiled as a whole with mode="reduce-overhead", as gpt-fast has
it; "transformers" is its `generate` with a static cache. Each way but the last is compared with the model without a cache in float64
first. No prompt is computed: caches are filled with random numbers, and only the last tokens of the context are written. GPT-2 is
built with as many learned positions as the context has tokens. The preset gpu took twelve minutes on one H200 whose compiler found all code
in its caches on disk, and we expect it to take less than an hour without them. Every setting is recorded when it ends, and the same command
goes on where it was stopped. With two GPUs one command with `--rows GPT-2 --device cuda:0` and one with `--rows LLaMA --device cuda:1` may
run at the same time.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..models.decoding import Decoder
from ..models.gpt2 import GPT2
from ..models.language_model import LanguageModel
from ..models.llama import Llama
from ..models.plain_decoding import PlainAttention, PlainDecoder, TransformersDecoder
from ..models.rows import TABLE2, TABLE2_BESIDE, TABLE3, Row
from ..store.records import append, device_in_words, done, new_record, run_id
from ..train.options import Options
from ..train.runs import Failures, check_labels
from .speed.sections import in_words
from .speed.timing import let_memory_go, refused_for_memory
from .table3 import ROPE_BASE

GATES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative error in logits that may still be timed
OTHERS = ("PyTorch", "transformers")


@dataclass(frozen=True)
class Shape:
    """One model.

    Args:
        name: what tables call it.
        d_model, n_heads, n_layers: as in `Block`.
        rows: its kinds of attention, multi-head attention among them.
        rope_base: of the rotary embedding; None for GPT-2.
    """

    name: str
    d_model: int
    n_heads: int
    n_layers: int
    rows: tuple[Row, ...]
    rope_base: float | None = None


@dataclass(frozen=True)
class Preset:
    """What is timed.

    Args:
        shapes: whole models.
        backends: of ours, the fastest first.
        contexts: lengths of the cache in tokens.
        batches: sequences written at once.
        vocab_size: of every model.
        dtype: of weights and caches.
        steps: tokens that are timed together, the last of the context.
        repeats: timings, of which the median counts.
    """

    shapes: tuple[Shape, ...]
    backends: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    vocab_size: int
    dtype: torch.dtype
    steps: int
    repeats: int


TAKES = ("device", "rows")
LLAMA_ROWS = (*TABLE3[:3], Row("MLA", latent=128, shared_kv=True, rope_dim=64), TABLE3[3], TABLE3[5], TABLE3[7])
PRESETS = {
    "smoke": Preset(
        shapes=(
            Shape("GPT-2", 96, 12, 2, (TABLE2[0], TABLE2[6].narrowed(8))),
            Shape("LLaMA", 128, 32, 2, (TABLE3[0], LLAMA_ROWS[3].narrowed(16)), ROPE_BASE),
        ),
        backends=("sdpa",),
        contexts=(32,),
        batches=(1, 2),
        vocab_size=64,
        dtype=torch.float32,
        steps=12,
        repeats=3,
    ),
    "gpu": Preset(
        shapes=(
            Shape("GPT-2", 768, 12, 12, (*TABLE2[:2], TABLE2_BESIDE[0], TABLE2[3], TABLE2[4], TABLE2[6])),
            Shape("LLaMA", 2048, 32, 16, LLAMA_ROWS, ROPE_BASE),
        ),
        backends=("triton", "sdpa"),
        contexts=(1024, 16384, 131072),
        batches=(1, 16, 64),
        vocab_size=50_304,
        dtype=torch.bfloat16,
        steps=32,
        repeats=3,  # 32 steps together hardly vary
    ),
}


@dataclass(frozen=True)
class Setting:
    """One model, written with in one way.

    Args:
        shape, row: of the model.
        way: "static, " and a backend, or one of OTHERS.
        context, batch: of the cache.
    """

    shape: Shape
    row: Row
    way: str
    context: int
    batch: int

    @property
    def label(self) -> str:
        """What `--rows` calls it and others of its row."""
        return f"{self.shape.name} {self.row.label}"


def settings(preset: Preset) -> Iterator[Setting]:
    """All of them, in the order in which they run: way by way, so that a run which is cut short has all rows in the first.

    Args:
        preset: what is timed.
    """
    for way in (*(f"static, {backend}" for backend in preset.backends), *OTHERS):
        for shape in preset.shapes:
            for row in shape.rows:
                if way not in OTHERS or row.mechanism == "MHA":
                    yield from (Setting(shape, row, way, n, b) for n in preset.contexts for b in preset.batches)


def run(options: Options) -> None:
    """One record per setting; those on record are skipped.

    Args:
        options: `rows` are models such as "GPT-2", or models and rows such as "GPT-2 MHA", all if empty.

    Raises:
        ValueError: for a row that is not there, and at the end where a setting could not be measured.
    """
    preset, failures = PRESETS[options.preset], Failures(options.device)
    everything = list(settings(preset))
    check_labels("row", options.rows, dict.fromkeys(name for s in everything for name in (s.shape.name, s.label)))
    wanted = [s for s in everything if {s.shape.name, s.label} & set(options.rows) or not options.rows]
    passed: dict[tuple, dict | None] = {}
    for setting in tqdm(wanted, "generation_speed"):
        started = time.perf_counter()
        what = "generation_speed", options.preset, setting.row.label, config_of(setting, preset, options.device)
        if done(options.records, run_id(*what, seed=None, data=None)):
            continue
        name, metrics = f"{setting.label}, {setting.way}, {setting.context:,} x {setting.batch}", None
        with failures.kept(name):
            metrics = compared_and_measured(setting, preset, options.device, passed)
        if metrics is not None:
            tqdm.write(f"{name}: {in_words(metrics)}")
            record = new_record(*what, metrics, device=options.device, wall_seconds=time.perf_counter() - started)
            append(options.records, record, replace=True)
    failures.tell()


def compared_and_measured(setting: Setting, preset: Preset, device: str, passed: dict[tuple, dict | None]) -> dict | None:
    """What a record says of a setting.

    Args:
        setting, preset, device: as in `measured`.
        passed: what the gate said of each label and way, None where it broke off, which is not tried again; what is new is added.
    """
    key = setting.label, setting.way
    if key not in passed:
        passed[key] = None
        passed[key] = gated(setting, preset, device)
    said = passed[key]
    return said if said is None or "refused" in said else measured(setting, preset, device) | said


def config_of(setting: Setting, preset: Preset, device: str) -> dict:
    """What defines a setting, for its record."""
    shape = setting.shape
    return {
        "model": shape.name,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "rope_base": shape.rope_base,
        "vocab_size": preset.vocab_size,
        "row": setting.row.config(),
        "way": setting.way,
        "context": setting.context,
        "batch": setting.batch,
        "steps": preset.steps,
        "repeats": preset.repeats,
        "prompt": "random numbers in the cache",
        "precision": str(preset.dtype).removeprefix("torch."),
        "device": device_in_words(device),
    }


def build(setting: Setting, vocab_size: int, device: str, dtype: torch.dtype) -> LanguageModel:
    """The model of a setting with random weights, MLA in its absorbed form, "PyTorch" with an attention of its own."""
    shape = setting.shape

    def attention(d_model: int, n_heads: int):
        if setting.way == "PyTorch":
            return PlainAttention(d_model, n_heads, shape.rope_base, setting.batch, setting.context, dtype)
        layer = setting.row.build(d_model, n_heads, shape.rope_base)
        if setting.row.mechanism == "MLA":
            layer.absorb = True
        return layer

    sizes = shape.d_model, shape.n_heads, shape.n_layers, attention
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(vocab_size, *sizes) if shape.rope_base else GPT2(vocab_size, setting.context, *sizes)
    return model.to(dtype).eval()


def decoder_of(setting: Setting, model: LanguageModel, device: str) -> Decoder | PlainDecoder:
    """What steps, compiled on a GPU, its caches empty."""
    torch.compiler.reset()
    if setting.way == "PyTorch":
        return PlainDecoder(model, compiled=device.startswith("cuda"))
    if device.startswith("cuda"):
        model.compile_parts(dynamic=False)
    caches = model.new_caches(setting.batch, setting.context)
    return Decoder(model, caches, backend=setting.way.removeprefix("static, "), greedy=True)


@torch.no_grad()
def gated(setting: Setting, preset: Preset, device: str) -> dict:
    """Compare two layers of the model, token by token, with the model without a cache in float64.

    Args:
        setting: whose shape, row and way count.
        preset: whose type the way runs in.
        device: as torch names it.

    Returns:
        `error` and, of a way that runs in float64 too, `error_float64`, relative ones of the logits; or `refused` with the reason;
        nothing of transformers.
    """
    if setting.way == "transformers":
        return {} if importlib.util.find_spec("transformers") else {"refused": "transformers is not installed"}
    small = dataclasses.replace(setting, shape=dataclasses.replace(setting.shape, n_layers=2), context=40, batch=2)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    weights = build(small, 256, device, preset.dtype)  # rounded once
    expected = build(dataclasses.replace(small, way=""), 256, device, torch.float64)
    PlainAttention.share(weights, expected) if setting.way == "PyTorch" else expected.load_state_dict(weights.state_dict())
    reference, errors = expected(tokens), {}
    for name, dtype in (("error_float64", torch.float64), ("error", preset.dtype)):
        if setting.way == "static, triton" and dtype == torch.float64:
            continue  # its sums are float32
        model, logits = build(small, 256, device, dtype), []
        model.load_state_dict(weights.state_dict())
        decoder = decoder_of(small, model, device)
        decoder.capture()
        for n in range(40):
            decoder.tokens.copy_(tokens[:, n : n + 1])
            decoder.step()
            logits.append(decoder.logits.to(torch.float64, copy=True))  # a graph writes into the same memory at each step
        errors[name] = ((torch.stack(logits, dim=1) - reference).norm() / reference.norm()).item()
        if not errors[name] < GATES[dtype]:
            return {"refused": f"differs from the model without a cache by {errors[name]:.1e} in {dtype}"}
    return errors


@torch.no_grad()
def measured(setting: Setting, preset: Preset, device: str) -> dict:
    """Tokens a second, and what is kept.

    Args:
        setting: what is timed.
        preset: how.
        device: as torch names it.

    Returns:
        `milliseconds` of a token, `tokens_per_second` of all sequences, `parameters` and `cache_megabytes`; or `refused` where memory does
        not hold it.
    """
    let_memory_go(device)
    try:
        if setting.way == "transformers":
            decoder = TransformersDecoder(setting, preset.vocab_size, preset.dtype, device)
        else:
            decoder = decoder_of(setting, build(setting, preset.vocab_size, device, preset.dtype), device)
        for stream in decoder.streams():
            stream.normal_()
        milliseconds = timed(decoder, setting.context - preset.steps, preset, device)
    except RuntimeError as error:
        return refused_for_memory(error)
    return {
        "milliseconds": milliseconds,
        "tokens_per_second": 1e3 * setting.batch / milliseconds,
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "cache_megabytes": sum(stream.nbytes for stream in decoder.streams()) / 1e6,
    }


def timed(decoder, start: int, preset: Preset, device: str) -> float:
    """Median milliseconds of a token, of so many runs over the last places of the cache.

    Args:
        decoder: with `rewind`, `capture` and `write`, and how many tokens `beforehand` are left out, by difference.
        start: where each run begins.
        preset: steps and repeats.
        device: as torch names it.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)

    def seconds(steps: int) -> float:
        decoder.rewind(start)
        wait()
        began = time.perf_counter()
        decoder.write(steps)
        wait()
        return time.perf_counter() - began

    decoder.rewind(start)
    decoder.capture()
    seconds(preset.steps)  # warms up
    all_steps = statistics.median(seconds(preset.steps) for _ in range(preset.repeats))
    few = statistics.median(seconds(decoder.beforehand) for _ in range(preset.repeats))
    return 1e3 * (all_steps - few) / (preset.steps - decoder.beforehand)
