"""Models opened for a look at their attention: those trained here, and public ones in the formats of transformers and timm.

Every attention layer appears as a layer of `tucker_ref`, and another layer can be put in its place. Public models are compared
with themselves at every opening (`models/public/agreement`). Public weights are read from safetensors files, or with
`weights_only=True`; code that a checkpoint brings along is never run.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import nn

from ..data.images import load_images
from ..models.public import agreement, checkpoint, inputs, timm_models, transformers_models
from ..models.public.families import IMAGE_TYPES
from ..models.public.opened import CLASS, OpenModel
from ..store.checked import Part, check, read_json
from ..store.faults import as_one_line, is_of_a_file
from ..store.saved import described, fill, read_metadata, read_model
from .language import load_model
from .vision import as_input, load_vit

SENTENCES = (  # of one length in no vocabulary, cut to the shorter one
    "Attention is a product of matrices, and a matrix of low rank is a product of two narrow ones; the heads of a layer share more "
    "than they know.",
    "In 1966 Ledyard Tucker wrote a box of numbers as a smaller box and three matrices, one for each of its sides, and called the "
    "smaller box the core.",
)
LONGEST = 24  # tokens of the comparison


def open_model(name: str, *, trust_layers: bool = False, head: bool = True) -> OpenModel:
    """A .safetensors file written here, a folder or hub name that transformers knows, or a timm name.

    Args:
        name: as --model takes it.
        trust_layers: skip the comparison of a public model with itself; its records say so.
        head: False where a classifier will be replaced, and may be missing.

    Raises:
        ValueError: if nothing is found there, for a kind of model, attention or option that is not known here, for weights that are
            missing or belong to nothing, and for layers that compute something else than the model's own.
    """
    path = Path(name)
    if path.suffix == ".safetensors" and not path.is_dir():
        metadata = read_metadata(path)
        if "public" in metadata:
            return _open_public_file(path, trust_layers)
        opened = _open_vit(path) if "vit" in metadata else _open_own(path)
        return opened if opened.run else replace(opened, weights=checkpoint.identity(name))
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):  # hub names are NAME or OWNER/NAME
        raise ValueError(f"--model {name}: no such file or folder")
    with _opening(name):
        opened = None if path.exists() else timm_models.open_timm(name)
    if opened is None:
        checkpoint.library(name)
        with _opening(name):
            opened = transformers_models.open_folder(name, head)
    with _opening(name):
        _compare(opened, trust_layers)
    return opened


def _opening(name: str) -> AbstractContextManager[None]:
    """Whatever a damaged or missing checkpoint makes a library raise becomes one line."""
    return as_one_line(lambda error: f"--model {name} cannot be opened: {_said(error)}")


def _said(error: Exception) -> str:
    """In one line, without the advice of some libraries to trust what is in a file."""
    if isinstance(error, UnpicklingError):
        return "a file of its weights holds more than tensors, and is not unpickled; save them as safetensors"
    if "trust_remote_code" in str(error):
        return "it brings code of its own (auto_map), which is never run, and transformers has none for it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):  # a library did not expect such values
        return f"its library makes nothing of what its files say ({type(error).__name__}: {line})"
    return line


def configured(name: str) -> tuple[str, int] | None:
    """Name and image size of what `open_model` would open, from its configuration alone, without building it.

    None where that takes opening it: files, timm's models, models of text, and what cannot be opened.
    """
    if Path(name).suffix == ".safetensors":
        return None
    try:
        config = checkpoint.config_of(name)
    except Exception as error:
        if is_of_a_file(error):  # `open_model` says it better
            return None
        raise
    if config.model_type not in IMAGE_TYPES:
        return None
    return transformers_models.known_as(name), transformers_models.image_size_of(config)


def _compare(opened: OpenModel, trust_layers: bool) -> None:
    """The rule of every opening, or a remark for the record that it was left out."""
    if trust_layers:
        opened.remarks |= agreement.TRUSTED
    else:
        inputs = sample(opened)
        opened.agreement = agreement.as_record(agreement.compare_again(opened, inputs))
        agreement.compare_far(opened, inputs)


def sample(opened: OpenModel) -> torch.Tensor:
    """Two sentences in the model's tokens, (2, n), or two handwritten digits as it takes images, (2, channels, side, side)."""
    if opened.takes_text:
        length = min(LONGEST, opened.context)
        encode = inputs.whole(opened.tokenizer).encode if opened.tokenizer else None
        rows = [encode(sentence).ids if encode else [] for sentence in SENTENCES]
        if min(map(len, rows)) < length:  # no tokenizer, or one that does not know these letters: any tokens
            rows = [[7919 * n for n in range(start, start + length)] for start in (0, length)]
        return torch.tensor([row[:length] for row in rows]) % opened.vocabulary
    data = load_images(None)
    return images_for(opened, torch.from_numpy(data.x_test[:2]), data.pixel_range)


def images_for(opened: OpenModel, images: torch.Tensor, pixel_range: float) -> torch.Tensor:
    """images (b, side, side, channels) scaled to the side and the channels that the model takes, (b, channels, side, side) in [-1, 1].

    Raises ValueError for colours where it sees none.
    """
    channels = next(p for p in opened.model.parameters() if p.ndim == 4).shape[
        1
    ]  # of the patch embedding, (d, channels, side, side)
    images = as_input(images, pixel_range)
    if images.shape[1] not in (1, channels):
        raise ValueError(
            f"{opened.name} takes images of {channels} channel{'s' * (channels > 1)}; these have {images.shape[1]}"
        )
    images = F.interpolate(images, (opened.image_size, opened.image_size), mode="bilinear", align_corners=False)
    return images.expand(-1, channels, -1, -1)


def _open_own(path: Path) -> OpenModel:
    model, tokenizer, config = load_model(path)
    layers = {f"blocks.{n}.attention": block.attention for n, block in enumerate(model.blocks)}
    metadata = {"config": json.dumps(config), "tokenizer": tokenizer}
    return OpenModel(
        path.stem, model, layers, _call, lambda _place, layer: layer, metadata, context=config["context"],
        vocabulary=config["vocab_size"], tokenizer=tokenizer, run=read_metadata(path).get("run"),
    )  # fmt: skip


def _open_vit(path: Path) -> OpenModel:
    model, metadata = load_vit(path)
    layers = {f"blocks.{n}.attention": block.attention for n, block in enumerate(model.blocks)}
    side = json.loads(metadata["vit"])["image_size"]
    return OpenModel(
        path.stem, model, layers, _call, lambda _place, layer: layer, {"vit": metadata["vit"]}, predicts=CLASS,
        image_size=side, run=metadata.get("run"),
    )  # fmt: skip


def _call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def _open_public_file(path: Path, trust_layers: bool) -> OpenModel:
    """The architecture from the file's metadata, compared with fresh weights, then Tucker layers and weights from the file."""
    metadata, tensors = read_model(path)
    with described(path):
        public = read_json(metadata["public"], "its public")
        check(Part, public, "its public")
        check(timm_models.Public if "timm" in public else transformers_models.Public, public, "its public")
        if "timm" in public:
            opened = timm_models.from_description(public)
        else:
            name = metadata.get("name", path.stem)
            opened = transformers_models.from_description(name, public, metadata.get("tokenizer"))
        _compare(opened, trust_layers)
        described_layers = read_json(metadata["attention"], "its attention")
        check(Part, described_layers, "its attention")
        places = [place.removesuffix(".attention") for place in described_layers]  # of the adapters that hold Tucker layers
        if unknown := sorted(set(places) - opened.layers.keys()):
            raise ValueError(f"its attention describes a layer at {unknown[0]!r}, where the model has none")
        opened.put({place: opened.layers[place] for place in places})
    fill(opened.model, metadata, tensors, path)
    opened.layers = {p: getattr(opened.model.get_submodule(p), "attention", layer) for p, layer in opened.layers.items()}
    opened.weights = checkpoint.identity(str(path))
    return opened
