"""Compress the attention of a model that others trained, without training: GQA, MLA and Tucker Attention at equal size.

Every size is a share of the model's own cache. The separated MLA of that cache says how many parameters there are; the Tucker rows have
as many, or as large a cache, with the same ranks in all layers or with ranks chosen over the whole model. All know the inputs (--text).
What is lost is judged on --test: bits per byte of a model that predicts the next token, else how far sentence embeddings move.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from tucker_ref import compress, mla_cost, to_gqa
from tucker_ref.compression.model_ranks import choose_model_ranks
from tucker_ref.compression.normed import compress_normed

from ..data.text import Text, check_unread, read_documents, read_tests, standing_in
from ..models.public.inputs import surrounding, whole
from ..models.public.opened import NEXT, OpenModel
from ..models.sizes import count_cached, count_parameters
from ..store.records import append, new_record
from ..train.options import Options
from ..train.public_models import open_model
from .moments import moments
from .samples import Windows, sentence_pairs, spread
from .spectra import WINDOW, WINDOWS, trilinear

TAKES = ("device", "rows", "text", "test", "model")
SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)  # of the model's own cache
TEST_WINDOWS, TEST_WINDOW = 16, 256  # of each text of a model that predicts the next token
PAIRS = 128  # of sentences, of any other
Layers = dict[str, nn.Module]


@dataclass(frozen=True)
class Way:
    """One way to make every layer smaller.

    Attributes:
        label: of the row.
        share: of the model's own cache that it is set beside.
        convert: a layer's place -> the layer, smaller.
        parameters: of all layers; None where they are those of the converted layers.
        ranks: makes those of every layer, where they differ.
    """

    label: str
    share: float
    convert: Callable[[str], nn.Module]
    parameters: int | None = None
    ranks: Callable[[], list] | None = None


def run(options: Options) -> None:
    """One record per row.

    Args:
        options: `model`, `text` to learn the inputs from, `test` to judge by, and `rows` by label.

    Raises:
        ValueError: without a model or a test text, for a model of images, or for layers that are neither multi-head nor grouped-query
            attention.
    """
    if not options.model or not options.test:
        raise ValueError("compress_models needs --model, and --test texts to judge by")
    opened = open_model(options.model, trust_layers=options.trust_layers)
    check_compressible(opened)
    tests, text = read_tests(options.test), read_documents(options.text)
    check_unread(tests, standing_in(text[1]))
    opened.model.to(options.device)
    layers = {place: layer.to(options.device) for place, layer in opened.layers.items()}
    read = spread(opened, text, WINDOWS, WINDOW)
    known = moments(opened, layers, list(read.tokens.to(options.device).split(1)))
    judge = judge_of(opened, tests)
    before, judged = judge(None)
    own = {"attention_parameters": count_parameters(layers.values()), "cache": count_cached(list(layers.values())), **judged}
    tensors = {place: trilinear(layer, known[place]) for place, layer in layers.items()}
    for way in tqdm(chosen(ways(layers, tensors, known), options.rows), f"compress {opened.name}"):
        started = time.perf_counter()
        converted = {place: way.convert(place) for place in layers}
        opened.put(converted)
        _, judged = judge(before)
        metrics = {
            "share": way.share,
            "attention_parameters": way.parameters or count_parameters(converted.values()),
            "cache": count_cached(list(converted.values())),
            **({"ranks": way.ranks()} if way.ranks else {}),
            **judged,
            "before": own,
            **opened.measured(),
        }
        seconds = time.perf_counter() - started
        data = read.describe() | {"tests": list(judged["tests"])}
        record = new_record(
            "compress_models",
            "models",
            way.label,
            opened.config(),
            metrics,
            data=data,
            device=options.device,
            wall_seconds=seconds,
        )
        append(options.records, record, replace=True)
        tqdm.write(f"{opened.name}, {way.label}: {in_words(judged)}, before {in_words(own)}")


def check_compressible(opened: OpenModel) -> None:
    """Raise ValueError for a model of images, for layers that are neither multi-head nor grouped-query attention, and for norms of queries
    and keys of several key heads, or of heads that do not turn."""
    if not opened.takes_text:
        raise ValueError(f"{opened.name} takes images; models of text are compressed here")
    opened.check_trilinear(or_between_norms=True)
    if not opened.config()["n_kv_heads"]:
        raise ValueError(f"{opened.name}: only multi-head and grouped-query attention is compressed here")
    for place, layer in opened.layers.items():
        if layer.qk_norm and not (layer.qk_norm == "head" and layer.rotary and layer.k_proj.out_features == layer.head_dim):
            raise ValueError(
                f"{opened.name}: {place} normalises its queries and keys; such layers are compressed here where they have one key head, "
                "which turns"
            )


def in_words(judged: dict) -> str:
    """For the terminal."""
    return "; ".join(
        f"{name} {', '.join(f'{what} {value:.3f}' for what, value in test.items() if isinstance(value, float))}"
        for name, test in judged["tests"].items()
    )


def chosen(all_ways: list[Way], labels: tuple[str, ...]) -> list[Way]:
    """Those of these labels, or all.  Raises ValueError for a label that none has."""
    if unknown := [label for label in labels if label not in [way.label for way in all_ways]]:
        raise ValueError(f"no row is called {unknown[0]}; there are: {', '.join(way.label for way in all_ways)}")
    return [way for way in all_ways if not labels or way.label in labels]


def ways(layers: Layers, tensors: Layers, known: dict[str, torch.Tensor]) -> list[Way]:
    """All rows that are smaller than the model's own attention.

    Args:
        layers: multi-head or grouped-query attention by place.
        tensors: the same, or what stands between their norms.
        known: second moments of their inputs by place.

    Returns:
        For each share GQA where it divides the key heads, MLA separated and shared, Tucker with all heads and with two thirds of
        them, and ranks by layer; only Tucker and MLA of separated latents for layers with QK-norm.
    """
    first = next(iter(layers.values()))
    d, h, k, normed = first.d_model, first.n_heads, first.head_dim, first.qk_norm is not None
    groups, n = first.k_proj.out_features // k, len(layers)
    own, biases = count_parameters(layers.values()), sum(count_biases(layer) for layer in layers.values())
    rows, outputs = d + bool(first.bias), min(d, h * k)  # of the query mode; as many as the heads together reach
    convert = functools.partial(as_tucker_of, layers, known)
    found = []
    for share in SHARES:
        t = even(groups * k * share)  # of keys, and of values
        budget = n * mla_cost(d, h, t, t, k, shared_kv=False).parameters + biases
        if budget > own:
            continue
        if (heads := int(groups * share)) == groups * share and groups % heads == 0 and not normed:
            label = "MQA" if heads == 1 else f"GQA n_KV={heads}"
            found.append(Way(label, share, lambda place, g=heads: to_gqa(layers[place], g, moment=known[place])))
        mla = f"MLA separated d_c={t}"
        ranks, method = ((min(h, t * t), t, t), (h, min(outputs, h * t), t)), "sthosvd" if h * t < outputs else "hosvd"
        found.append(Way(mla, share, convert(ranks=ranks[0], post=ranks[1], method=method), budget))
        joint = even((budget / n - biases / n - d * h * k) / (2 * d + 3 * h * k) if not normed else 0)
        if joint > 2 and joint <= 2 * t:
            formula = n * mla_cost(d, h, joint, joint, k).parameters + biases
            ranks, method = (
                ((min(h, joint * min(joint, rows)), min(joint, rows), joint), (h, min(outputs, h * joint), joint)),
                "sthosvd" if h * joint < outputs else "hosvd",
            )
            shared = convert(ranks=ranks[0], post=ranks[1], shared_kv=True, method=method)
            found.append(Way(f"MLA shared d_c={joint}", share, shared, formula))
        for r in dict.fromkeys((h, max(1, 2 * h // 3)) if h > 4 else (h,)):
            s = int(((budget - biases) / n / 2 - h * r - d * t) / (d + r * t))
            s = min(s, outputs, r * t)
            if s >= 1 and r <= s * t:  # narrower than that there are not so many heads to tell apart
                found.append(Way(f"Tucker [{r},{s},{t}]", share, convert(ranks=(r, s, t), post=(r, s, t))))
        for what, size in (("parameters", {"max_parameters": budget}), ("cache", {"max_cache": n * 2 * t})):
            ranks = by_layer(tensors, known, size)
            found.append(
                Way(
                    f"Tucker by layer with the {what} of {mla}",
                    share,
                    lambda place, ranks=ranks: convert(by_place=dict(zip(layers, ranks())))(place),
                    ranks=ranks,
                )
            )
    return found


def by_layer(tensors: Layers, known: dict[str, torch.Tensor], size: dict[str, int]) -> Callable[[], list]:
    """Makes the ranks of every layer for a budget of the model, once, when they are asked for: that takes minutes."""
    return functools.cache(lambda: choose_model_ranks(list(tensors.values()), **size, moments=list(known.values())))


def as_tucker_of(
    layers: Layers, known: dict, *, ranks=None, post=None, by_place=None, shared_kv: bool = False, method: str = "hosvd"
):
    """place -> that layer as a Tucker Attention of these ranks, or of those of its place.

    MLA is one too (Thm B.4): all heads, and all outputs that its value latent can reach. So MLA keeps biases and QK-norm here.
    Where these outputs are fewer than all, they are found after the latent: method "sthosvd".
    """

    def convert(place: str) -> nn.Module:
        both = by_place[place] if by_place else (ranks, post)
        layer, moment = layers[place], known[place]
        if layer.qk_norm:
            return compress_normed(layer, *both, moment=moment, method=method)
        return compress(layer, *both, shared_kv=shared_kv, moment=moment, method=method)

    return convert


def count_biases(layer: nn.Module) -> int:
    """Numbers in a layer's biases."""
    return sum(p.numel() for name, p in layer.named_parameters() if name.endswith("bias"))


def even(width: float) -> int:
    """The next even number below, at least 2."""
    return max(2, 2 * int(width / 2))


def judge_of(opened: OpenModel, tests: list[Text]) -> Callable:
    """What the model as it stands makes of the test texts: (its answers from before, None at first) -> (its answers, what a record says).

    opened: predicts the next token, or gives hidden states.
    """
    if opened.predicts == NEXT:
        texts = [spread(opened, text, TEST_WINDOWS, TEST_WINDOW, "--test") for text in tests]
        return lambda before: (None, {"tests": {text.name: losses(opened, text) for text in texts}})
    pairs = [sentence_pairs(opened, text, PAIRS) for text in tests]

    def judge(before):
        found = {name: embeddings(opened, sentences) for name, _, sentences in pairs}
        said = {
            name: {"sha256": sha256, "sentences": len(sentences), **(moved(found[name], before[name]) if before else {})}
            for name, sha256, sentences in pairs
        }
        return found, {"tests": said}

    return judge


@torch.no_grad()
def losses(opened: OpenModel, text: Windows) -> dict:
    """Nats a token, bits a byte, and the nats of each window; every token of the text is predicted once, where a special one stands
    before it."""
    device, nats = next(opened.model.parameters()).device, []
    for window in text.tokens.to(device).split(1):
        logits = opened.logits(opened.model, window[:, :-1])  # (1, n, vocabulary)
        nats.append(F.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item())
    scored = text.tokens[:, 1:].numel()
    return {
        "sha256": text.sha256,
        "tokens": scored,
        "loss": round(sum(nats) / scored, 4),
        "bits_per_byte": round(sum(nats) / math.log(2) / text.n_bytes, 4),
        "windows": [round(loss, 3) for loss in nats],
    }


@torch.no_grad()
def embeddings(opened: OpenModel, sentences: list[str]) -> torch.Tensor:
    """(sentences, d): the mean of the last hidden state over a sentence's tokens, special ones too, on the unit sphere."""
    tokenizer, device = whole(opened.tokenizer or ""), next(opened.model.parameters()).device
    before, after = surrounding(tokenizer)
    found = []
    for sentence in sentences:
        ids = [*before, *tokenizer.encode(sentence, add_special_tokens=False).ids, *after]
        hidden = opened.hidden(opened.model, torch.tensor([ids], device=device))  # (1, n, d)
        found.append(F.normalize(hidden[0].mean(0), dim=0).cpu())
    return torch.stack(found)


def moved(after: torch.Tensor, before: torch.Tensor) -> dict:
    """How far embeddings moved, and whether similarities keep their order.

    Args:
        after, before: (sentences, d) on the unit sphere.

    Returns:
        The mean cosine and the least one of a sentence with itself, and Spearman's rank correlation of the similarities of all pairs.
    """
    from scipy.stats import spearmanr  # half a second, which no other command needs

    cosines = (after * before).sum(1)
    upper = np.triu_indices(len(after), 1)
    similarities = [(x @ x.T).numpy()[upper] for x in (after, before)]
    return {
        "cosine": round(cosines.mean().item(), 4),
        "least_cosine": round(cosines.min().item(), 4),
        "rank_correlation": round(float(spearmanr(*similarities).statistic), 4),
    }
