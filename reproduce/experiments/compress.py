"""Compress the attention of a trained model: error in weights, in logits and outputs, and in what the model then predicts, by rank.

Every layer is converted without any training, once for the weights alone and once knowing what inputs it sees. Public models come
by name or folder through transformers or timm; without --model, those that table2 and table3 trained in the same output folder.
"""

import hashlib
import os
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from tucker_ref import gqa_cost, relative_errors

from ..data.images import load_images
from ..data.text import read_documents, train_and_held_out
from ..models.public.inputs import surrounding, whole
from ..models.public.opened import CLASS, MASKED, NEXT, OpenModel
from ..models.rows import Row
from ..models.sizes import count_cached, count_parameters
from ..store.records import append, new_record
from ..train.language import model_of
from ..train.options import Options
from ..train.public_models import images_for, open_model
from ..train.runs import selected
from .moments import moments
from .samples import check_reads_text

TAKES = ("device", "rows", "text", "validation", "images", "model", "compression")
BATCHES = 6  # to learn the inputs from, and as many others to measure on
WINDOWS, WINDOW = 8, 128  # a batch of text: windows, and tokens in each
IMAGES = 32  # a batch of images
MASKS = ("[MASK]", "<mask>")  # BERT's, RoBERTa's
HIDDEN_SHARE = 7  # every seventh token is hidden from a model that was trained to guess such tokens
NOT_ASKED = -100  # a target that is none
SCORES = ("loss", "top1", "agreement", "similarity")


def run(options: Options) -> None:
    """One record per model and row, and the compressed model itself where `options.save` names a file.

    Args:
        options: `model` names one model, else those that table2 and table3 left in `out` are compressed. `ranks` are triples
            of Tucker ranks in place of the default rows. `save` needs a model and exactly one triple.

    Raises:
        ValueError: if `save` comes without these or names no .safetensors file of its own, or if there is no model.
    """
    if options.save and len(options.ranks) != 1:
        raise ValueError("--save keeps one compressed model; give exactly one triple of --ranks with it")
    if options.save and not options.model:
        raise ValueError("--save keeps one compressed model; say of which with --model")
    if options.save:  # looked at before the work, not after it
        if options.save.is_dir() or os.path.realpath(options.save) == os.path.realpath(options.model):
            raise ValueError(f"--save {options.save}: a folder, or the model itself; name another file")
        if options.save.suffix != ".safetensors":
            raise ValueError(f"--save {options.save}: its name must end in .safetensors")
        options.save.parent.mkdir(parents=True, exist_ok=True)
    for name in [options.model] if options.model else own_models(options):
        compress_model(open_model(name, trust_layers=options.trust_layers), options)


def own_models(options: Options) -> list[str]:
    """The multi-head models of table2 and table3 in the output folder.

    Args:
        options: of whose seeds the first counts, seed 0 if there is none.

    Returns:
        Their paths, at least one.

    Raises:
        ValueError: if there is none.
    """
    seed = options.seeds[0] if options.seeds else 0
    paths = [model_of(options.out, f"{experiment} MHA seed {seed}", options.preset) for experiment in ("table2", "table3")]
    kept = [str(path) for path in paths if path]
    if not kept:
        raise ValueError(f"{options.out / 'models'} holds no multi-head model; run table2 first, or name a model with --model")
    return kept


@dataclass(frozen=True)
class Samples:
    """Batches of inputs that calibrate, and others that test.

    Args:
        name: of the data.
        sha256: of its content.
        calibration: token ids (windows, tokens), or images (images, channels, height, width), per batch.
        test: the same, of inputs that the calibration does not hold.
        targets: what each test batch should predict: token ids of the same shape, or one class per image; none for a model that
            predicts nothing.
        unit: what is counted, "tokens" or "images".
        begins_with: the special tokens before every window.
    """

    name: str
    sha256: str
    calibration: list[torch.Tensor]
    test: list[torch.Tensor]
    targets: list[torch.Tensor]
    unit: str
    begins_with: tuple[str, ...] = ()

    def describe(self) -> dict:
        """What a record says of the data."""
        count = [
            sum(batch.numel() if self.unit == "tokens" else len(batch) for batch in part)
            for part in (self.calibration, self.test)
        ]
        begins = {"begins_with": list(self.begins_with)} if self.begins_with else {}
        return {
            "name": self.name,
            "sha256": self.sha256,
            "unit": self.unit,
            "calibration": count[0],
            "test": count[1],
            **begins,
        }


def compress_model(opened: OpenModel, options: Options) -> None:
    """Convert every layer to every row, in every way; a record per row.

    Args:
        opened: the model; its attention is put back into it, converted.
        options: `text` or `images` as the model takes them, `rows` by label, `ranks`, `device`, `records` and `save`.

    Raises:
        ValueError: if text is given to a model of images or the other way round, or for a label that no row has.
    """
    takes, *others = ("text", "images") if opened.takes_text else ("images", "text", "validation")
    given = [other for other in others if getattr(options, other)]
    if options.model and given:  # of several models, ours, each takes what it can use
        raise ValueError(f"--{given[0]}: {opened.name} takes {takes}, not {others[0]}")
    opened.check_trilinear()
    data = text_samples(opened, options) if opened.takes_text else image_samples(opened, options)
    opened.model.to(options.device)
    layers = {place: layer.to(options.device) for place, layer in opened.layers.items()}
    known, seen = (moments(opened, layers, batches) for batches in (data.calibration, data.test))
    before = predictions(opened, data)
    config = opened.config()
    rows = selected([Row("Tucker", ranks=ranks) for ranks in options.ranks] or default_rows(config), options.rows)
    preset = "models" if options.model else options.preset
    for row in tqdm(rows, f"compress {opened.name}"):
        ways = {}
        for way in ("plain", "aware", *(["mean"] if row.mechanism == "GQA" else [])):
            converted = {
                place: row.converted(layer, mean=way == "mean", moment=known[place] if way == "aware" else None)
                for place, layer in layers.items()
            }
            opened.put(converted)
            ways[way] = {
                "weights": mean_errors(layers, converted, dict.fromkeys(layers)),
                "inputs": mean_errors(layers, converted, seen),
                **quality(opened, data, before),
            }
            if options.save and way == "aware":
                opened.save(options.save)
        metrics = {
            "attention_parameters": count_parameters(converted.values()),
            "cache_per_token": count_cached([next(iter(converted.values()))]),
            "ways": ways,
            **opened.measured(),
            "before": {"attention_parameters": count_parameters(layers.values()), **score(before, data)},
        }
        append(
            options.records,
            new_record("compress", preset, row.label, config, metrics, data=data.describe(), device=options.device),
            replace=True,
        )
        tqdm.write(f"{opened.name}, {row.label}: " + "; ".join(f"{way} {in_words(measured)}" for way, measured in ways.items()))
    if options.save:
        print(f"the activation-aware version is in {options.save}; --model {options.save} opens it again")


def default_rows(shape: dict) -> list[Row]:
    """Tucker, MLA and GQA at several budgets below the layer's own, the smaller ones in the proportions of Table 2.

    Args:
        shape: of the layer: `n_heads`, `d_model`, `n_kv_heads` (0 of a layer that has no such heads), `head_dim` and `bias`.

    Returns:
        Rows with fewer parameters than the layer has.

    Raises:
        ValueError: for a layer that is neither multi-head nor grouped-query attention.
    """
    h, d, g, width = shape["n_heads"], shape["d_model"], shape["n_kv_heads"], shape["head_dim"]
    if g == 0:
        raise ValueError("only multi-head and grouped-query layers have rows by default; give --ranks for this model")
    t = g * width  # width of all keys

    def even(width: float) -> int:
        return max(2, 2 * int(width / 2))

    ranks = [
        (heads, min(even(d / share), h * width, heads * even(t / share)), even(t / share))
        for heads, share in ((h, 4), (max(1, 2 * h // 3), 6), (max(1, 2 * h // 3), 8), (max(1, 2 * h // 3), 12))
    ]
    rows = [Row("Tucker", ranks=(r, s, t)) for r, s, t in ranks if r <= s * t and t <= min(d, r * s)]
    if not shape["bias"]:  # MLA has none
        rows += [Row("MLA", latent=even(t / share), shared_kv=shared) for shared in (False, True) for share in (2, 4, 6)]
    divisors = [n for n in range(g // 2, 0, -1) if g % n == 0]
    rows += [Row("GQA", n_kv_heads=n) for n in divisors[:3]]
    own = gqa_cost(d, h, g, width).parameters
    return [row for row in rows if row.cost(d, h, width).parameters < own]


def text_samples(opened: OpenModel, options: Options) -> Samples:
    """Windows of text, some documents to calibrate and the held-out ones to test, in the model's own tokens.

    Each begins, and ends, with the special tokens that the model was trained to see there.

    Args:
        opened: whose tokenizer and context count.
        options: `text` and `validation` name files in place of the built-in text.

    Raises:
        ValueError: if there is not one window of either, or no tokenizer.
    """
    check_reads_text(opened)
    (name, train), (_, held_out) = train_and_held_out(read_documents(options.text), options.validation)
    tokenizer, digest = whole(opened.tokenizer), hashlib.sha256()
    first, last = surrounding(tokenizer)
    last = [] if opened.predicts == NEXT else last  # a window of text that goes on does not end
    ahead = int(opened.predicts == NEXT)  # one token behind each window, which the last one in it should predict
    stretch = min(WINDOW, opened.context) + ahead - len(first) - len(last)  # tokens of the text in a window
    needed = BATCHES * WINDOWS * stretch

    def windows(chosen: list[str], source: str) -> torch.Tensor:
        tokens: list[int] = []
        for document in chosen:
            if len(tokens) >= needed:
                break
            digest.update(document.encode() + b"\0")
            tokens += tokenizer.encode(document, add_special_tokens=False).ids
        usable = min(needed, len(tokens) // stretch * stretch)
        if usable == 0:
            raise ValueError(f"{source} holds fewer than one window of {stretch} tokens")
        if max(tokens) >= opened.vocabulary:
            raise ValueError(
                f"{opened.name}: its tokenizer makes token {max(tokens)}, beyond the {opened.vocabulary} of its embedding"
            )
        rows = np.array(tokens[:usable]).reshape(-1, stretch)
        ends = [np.tile(special, (len(rows), 1)).astype(rows.dtype) for special in (first, last)]
        return torch.from_numpy(np.concatenate([ends[0], rows, ends[1]], axis=1))

    calibration = windows(train, name)
    inputs, targets = questions(opened, tokenizer, windows(held_out, options.validation or f"the held-out part of {name}"))
    calibration = calibration[:, : calibration.shape[1] - ahead]
    begins = tuple(map(tokenizer.id_to_token, first))
    return Samples(name, digest.hexdigest(), list(calibration.split(WINDOWS)), inputs, targets, "tokens", begins)


def questions(opened: OpenModel, tokenizer: Tokenizer, test: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and what the model should say of them, batch by batch: the next token, or every token that was hidden from it.

    test: (windows, tokens). Without anything to say there are no targets.
    """
    if opened.predicts == NEXT:
        inputs, targets = test[:, :-1], test[:, 1:]
    elif opened.predicts == MASKED and (mask := next(filter(None, map(tokenizer.token_to_id, MASKS)), None)):
        hidden = torch.arange(test.shape[1]) % HIDDEN_SHARE == HIDDEN_SHARE - 1
        inputs, targets = test.masked_fill(hidden, mask), test.masked_fill(~hidden, NOT_ASKED)
    else:
        return list(test.split(WINDOWS)), []
    return list(inputs.split(WINDOWS)), list(targets.split(WINDOWS))


def image_samples(opened: OpenModel, options: Options) -> Samples:
    """Images, training ones to calibrate and test ones to test, scaled to the side and the channels that the model takes.

    Args:
        opened: whose image size and patch embedding count.
        options: `images` names a file in place of the built-in digits.
    """
    data = load_images(options.images)

    def batches(x: np.ndarray) -> list[torch.Tensor]:
        images = torch.from_numpy(x[: BATCHES * IMAGES])
        return list(images_for(opened, images, data.pixel_range).split(IMAGES))

    targets = torch.from_numpy(data.y_test[: BATCHES * IMAGES]).split(IMAGES) if opened.predicts == CLASS else []
    return Samples(data.name, data.sha256, batches(data.x_train), batches(data.x_test), list(targets), "images")


def mean_errors(layers: dict, converted: dict, moment_of: dict) -> list[float]:
    """Relative errors before and after the softmax, as means over layers.

    Args:
        layers, converted: what was there and what takes its place, by place.
        moment_of: second moments (d, d) by place that weigh the errors; None weighs all inputs alike.

    Returns:
        Two numbers: of the pre-softmax and of the post-softmax tensors.
    """
    errors = [relative_errors(layer, converted[place], moment_of[place]) for place, layer in layers.items()]
    return [statistics.mean(side) for side in zip(*errors)]


@torch.no_grad()
def predictions(opened: OpenModel, data: Samples) -> torch.Tensor:
    """Log-probabilities on the test inputs; features where the model predicts nothing.

    Returns:
        (inputs, classes) or (inputs, d), on the CPU in float32; every token of a text is an input.
    """
    device = next(opened.model.parameters()).device
    outputs = (opened.logits(opened.model, x.to(device)) for x in data.test)
    flat = [output.reshape(-1, output.shape[-1]).float() for output in outputs]
    return torch.cat([x.log_softmax(-1).cpu() if data.targets else x.cpu() for x in flat])


def score(predicted: torch.Tensor, data: Samples) -> dict:
    """How well predictions meet the targets.

    Args:
        predicted: log-probabilities, (inputs, classes).
        data: whose targets count.

    Returns:
        `loss` in nats per token that was asked for, `top1` as a share for images; nothing where the model has other classes than
        the data, or predicts nothing.
    """
    if not data.targets:
        return {}
    targets = torch.cat([t.flatten() for t in data.targets])
    if data.unit == "tokens":
        return {"loss": F.nll_loss(predicted, targets, ignore_index=NOT_ASKED).item()}
    return {"top1": (predicted.argmax(1) == targets).float().mean().item()} if predicted.shape[1] == targets.max() + 1 else {}


def quality(opened: OpenModel, data: Samples, before: torch.Tensor) -> dict:
    """Score after the conversion, and how often the likeliest class is still the one from before; of features their cosine with it.

    Args:
        opened: the converted model.
        data: whose tests count.
        before: `predictions` of the model as it was.

    Returns:
        `agreement` as a share, and what `score` gives; of features `similarity`.
    """
    predicted = predictions(opened, data)
    if not data.targets:
        return {"similarity": F.cosine_similarity(predicted, before).mean().item()}
    return {"agreement": (predicted.argmax(1) == before.argmax(1)).float().mean().item(), **score(predicted, data)}


def in_words(measured: dict) -> str:
    """One way of conversion on one line, for the terminal."""
    (w, w_post), (x, x_post) = measured["weights"], measured["inputs"]
    quality = ", ".join(f"{name} {measured[name]:.3f}" for name in SCORES if name in measured)
    return f"W {w:.3f}, W~ {w_post:.3f}, logits {x:.3f}, outputs {x_post:.3f}, {quality}"
