"""A model of transformers as an OpenModel: from a folder or hub name, or from a file that `OpenModel.save` wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...store.checked import Line, Part, check
from ...store.faults import is_of_a_file
from ...store.files import called
from . import checkpoint, inputs
from .adapter import Adapter
from .families import family_of
from .family import Family
from .layers import Turning, turning_of
from .opened import CLASS, NOTHING, OpenModel


class Config(Part):
    """What a file keeps of config.json; the rest transformers checks."""

    model_type: Line


class Public(Part):
    """What a file says of a model of transformers."""

    config: Config
    pixels: dict[str, Any] | list[Any] | None = None


def open_folder(name: str, head: bool = True) -> OpenModel:
    """A folder or hub name.  head: False where a classifier will be replaced.  Raises whatever a damaged checkpoint makes."""
    checkpoint.check_folder(name)
    config = checkpoint.config_of(name)
    family = family_of(config)
    check_options(family, config)
    model = checkpoint.load_weights(name, family, config, head)
    pixels, more = None, {}
    if family.predicts == CLASS:
        pixels = inputs.pixels_of(name, _image_part(config).num_channels)
    else:
        try:
            more["tokenizer"] = inputs.tokenizer_of(name)
        except Exception as error:
            if not is_of_a_file(error):
                raise
            # Spectra need none; what does need one says why there is none.
            more["no_tokenizer"] = str(error).strip().split("\n")[0]
    opened = adapted(known_as(name), model, family, pixels, **more)
    opened.weights = checkpoint.identity(name)
    if getattr(config, "auto_map", None):
        opened.remarks["code"] = f"its own (auto_map), not run: opened as transformers' {type(model).__name__}"
    return opened


def from_description(name: str, public: dict, tokenizer: str | None) -> OpenModel:
    """The architecture that a file describes, with fresh weights.  Raises ValueError for one that is not known here."""
    config = checkpoint.library(name).AutoConfig.for_model(**public["config"])
    family = family_of(config)
    check_options(family, config)
    of = checkpoint.class_of(family, public.get("class", ""))
    checkpoint.check_size(config, lambda: checkpoint.fresh(of, family, config))
    model = checkpoint.fresh(of, family, config)
    pixels = public.get("pixels")
    if isinstance(pixels, list):  # as older files have them: mean and std alone
        pixels = {"factor": 1 / 255, "standard": pixels}
    if pixels is not None:
        check(inputs.Pixels, pixels, "its pixels")
    return adapted(name, model.eval(), family, pixels, tokenizer=tokenizer)


def known_as(name: str) -> str:
    """A folder's own name, wherever it lies; a hub name as it is."""
    return called(name) if Path(name).exists() else name


def check_options(family: Family, config) -> None:
    """Raise ValueError for images that are not squares."""
    if family.predicts == CLASS:
        size = _image_part(config).image_size
        if not isinstance(size, int):
            height, width = size
            if height != width:
                raise ValueError(f"image_size is {height} x {width}: only square images are known here")


def _image_part(config):
    """SigLIP's configuration has one for each tower."""
    return getattr(config, "vision_config", config)


def image_size_of(config) -> int:
    size = _image_part(config).image_size
    return size if isinstance(size, int) else size[0]


def adapted(name: str, model: nn.Module, family: Family, pixels: dict | None, **more) -> OpenModel:
    """Every attention layer found and read.  pixels: as `inputs.pixels_of` gives them; more: what else is known of it."""
    config, has_head = model.config, type(model).__name__ not in family.without_head.values()
    is_text = family.predicts != CLASS
    config.return_dict = True
    if is_text:
        config.use_cache = False
        config.tie_word_embeddings = config.tie_word_embeddings and _tied(model)
    modules = {place: module for place, module in model.named_modules() if type(module).__name__ in family.attention}
    turnings = {place: turning_of(model, module, family.pairing(config)) for place, module in modules.items()}
    layers = {place: family.layer_of(module, turnings[place]) for place, module in modules.items()}
    if not layers:
        raise ValueError("it has no attention layer")
    limits = [turning.limit for turning in turnings.values() if turning and turning.limit]
    public = {"class": type(model).__name__, "config": config.to_dict()} | ({"pixels": pixels} if pixels else {})
    metadata = {"public": json.dumps(public)} | ({"tokenizer": more["tokenizer"]} if more.get("tokenizer") else {})

    def called(model: nn.Module, x: torch.Tensor, **options):
        return model(x if is_text else inputs.as_trained(x, pixels), **options)

    def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return called(model, x).logits if has_head else called(model, x).last_hidden_state

    return OpenModel(
        name,
        model,
        layers,
        logits,
        wrapping(family, modules, turnings),
        metadata,
        hidden=lambda model, x, **more: called(model, x, output_hidden_states=True, **more).hidden_states[-1],
        predicts=(family.predicts if sees_the_past_alone(config) else NOTHING) if has_head else NOTHING,
        context=min([context_of(config), *limits]) if is_text else None,
        image_size=None if is_text else image_size_of(config),
        vocabulary=model.get_input_embeddings().num_embeddings if is_text else None,
        **more,
    )


def _tied(model: nn.Module) -> bool:
    """Whether no head of its own stands in the file of a model whose head may be its embedding."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def wrapping(family: Family, modules: dict[str, nn.Module], turnings: dict[str, Turning | None]):
    """(place, layer) -> what stands in that place."""
    indices = {place: n for n, place in enumerate(modules)}
    norms = {place: family.norm_of(module) for place, module in modules.items()}
    causal = {place: getattr(module, "is_causal", False) for place, module in modules.items()}

    def wrap(place: str, layer: nn.Module) -> Adapter:
        turning = turnings[place]
        return Adapter(layer, causal[place], True, norms[place], indices[place], turning and turning.limit)

    return wrap


def sees_the_past_alone(config) -> bool:
    """What predicts the next token must not have seen it; decoders can be made to see the whole text (is_causal)."""
    return getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)


def context_of(config) -> int:
    """RoBERTa's positions count from behind its padding token.  Raises ValueError where no token has a position."""
    skipped = 0
    if config.model_type.endswith("roberta"):
        if config.pad_token_id is None:
            raise ValueError("pad_token_id is null: its positions count from there")
        skipped = config.pad_token_id + 1
    if config.max_position_embeddings <= skipped:
        raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}; it must be above {skipped}")
    return config.max_position_embeddings - skipped
