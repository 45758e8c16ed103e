"""The text or the images that a model takes, as it was trained on them: its tokens, its pixels."""

import functools
from typing import Annotated

import torch
from pydantic import Field
from tokenizers import Tokenizer

from ...store.checked import Part, Real, check, read_json
from .checkpoint import NO_CODE, beside, library

FILE = "tokenizer.json"
SPACE = "\u2581"  # the one token beside special ones that a sentencepiece tokenizer has without its file
RESIZES = ("do_resize", "do_center_crop", "do_convert_rgb")  # framing, and what is so here already
HONOURED = ("do_rescale", "do_normalize")


class Pixels(Part):
    """How images enter a vision transformer, as `pixels_of` gives it."""

    factor: Real
    standard: Annotated[list[list[Real]], Field(min_length=2, max_length=2)] | None


def tokenizer_of(name: str) -> str:
    """JSON for `tokenizers`.  Raises what transformers raises where there is none, ValueError where it knows no token but special ones."""
    tokenizer = library(name).AutoTokenizer.from_pretrained(name, **NO_CODE).backend_tokenizer
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.get_vocab().keys() <= special | {SPACE}:  # made from the class alone, without any file of tokens
        lacks = "its tokenizer.json has no vocabulary" if beside(name, FILE) else f"there is no {FILE}, and no other vocabulary"
        raise ValueError(f"{lacks} in {name}")
    return tokenizer.to_str()


@functools.lru_cache(maxsize=1)  # a large vocabulary takes a second to read
def whole(tokenizer: str) -> Tokenizer:
    """Without the truncation and the padding that many files keep from training: a document is what it is.  Not to be changed."""
    tokenizer = Tokenizer.from_str(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def surrounding(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the model was trained to see before and after every text: BOS, or [CLS] and [SEP]."""
    plain, all_of_it = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((n for n in range(len(all_of_it)) if all_of_it[n : n + len(plain)] == plain), 0)
    return all_of_it[:start], all_of_it[start + len(plain) :]


def pixels_of(name: str, channels: int) -> dict | None:
    """How images enter this vision transformer, where its preprocessor_config.json says so: factor, mean and std.

    The factor multiplies bytes, mean and std (channels,) then standardise them; None for either where the file turns it off.
    Raises ValueError for a step that is not known here.
    """
    path = beside(name, "preprocessor_config.json")
    if path is None:
        return None
    said = read_json(path.read_text(encoding="utf-8"), path.name)
    check(Part, said, path.name)
    for option, value in said.items():
        if option.startswith("do_") and value and option not in RESIZES + HONOURED:
            raise ValueError(f"preprocessor_config.json says {option}, which is not known here")
    standard = None
    if said.get("do_normalize", True):
        if not {"image_mean", "image_std"} <= said.keys():
            raise ValueError("preprocessor_config.json standardises images, and has no image_mean and image_std")
        standard = [_per_channel(said, option, channels) for option in ("image_mean", "image_std")]
    pixels = {"factor": said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0, "standard": standard}
    check(Pixels, pixels, path.name)
    return pixels


def _per_channel(said: dict, option: str, channels: int) -> list[float]:
    """One number per channel, where one may stand for all."""
    values = said[option] if isinstance(said[option], list) else [said[option]] * channels
    if len(values) != channels:
        raise ValueError(f"preprocessor_config.json has {len(values)} numbers in {option}; the model has {channels} channels")
    return values


def as_trained(x: torch.Tensor, pixels: dict | None) -> torch.Tensor:
    """Images in [-1, 1], (b, channels, side, side), as a model takes them; pixels: as `pixels_of` gives them, None for [-1, 1]."""
    if pixels is None:
        return x
    x = (x + 1) * (127.5 * pixels["factor"])
    if pixels["standard"] is None:
        return x
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in pixels["standard"])  # (channels, 1, 1)
    return (x - mean) / std
