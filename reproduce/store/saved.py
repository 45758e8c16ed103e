"""Model files: weights in safetensors, and beside them as JSON what it takes to build the model again. Nothing is ever unpickled."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from tucker_ref import LatentNorm, Rotary, TuckerAttention
from tucker_ref.factors import check_parts
from tucker_ref.initialisation import shapes_alone
from tucker_ref.norms import QKNorm

from .checked import Amount, Part, Real, Size, check, read_json
from .faults import as_one_line
from .files import write_atomically

NORMS = ("query_norm", "key_norm", "value_norm", "q_norm", "k_norm")  # of a Tucker layer
DESCRIBES = ("attention", "config", "public", "tokenizer", "vit")  # of a file's metadata: with them its weights are a model


class Description(Part):
    """Arguments of a class, and no others."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class RotaryShape(Description):
    """As `describe` tells it of a rotary embedding."""

    frequencies: list[Real]
    pairing: str = "half"
    blocks: list[Size] | None = None


class NormShape(Description):
    """As `describe_norm` tells it of a norm: of queries or keys where it names heads, else of a latent."""

    width: Size
    eps: Amount | None
    heads: Size | None = None
    blocks: Size = 1
    count: Size | None = None


class LayerShape(Description):
    """As `describe` tells it of a layer."""

    d_model: Size
    n_heads: Size
    ranks: Annotated[list[Size], Field(min_length=3, max_length=3)]
    post_ranks: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    shared_kv: bool = False
    scale: Real | None = None
    bias: bool = False
    latent_norm: bool = False
    qk_norm: str | None = None
    rotary: RotaryShape | None
    norms: dict[str, NormShape] = {}


def write_model(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Parameters and persistent buffers in one safetensors file, those that are shared once.

    Args:
        path: the file.
        model: whose Tucker layers are described beside their weights, as `attention` of the metadata.
        metadata: what else the file says of it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    replaced = {place: describe(module) for place, module in model.named_modules() if isinstance(module, TuckerAttention)}
    metadata = {**metadata, "attention": json.dumps(replaced)}
    content = safetensors.torch.save(tensors, metadata={**metadata, "seal": seal_of(metadata)})
    write_atomically(path, lambda file: file.write(content))


def seal_of(metadata: dict[str, str]) -> str:
    """What tells one description of a model from another, as 16 hex digits: the same weights fit many, with other heads, say."""
    return hashlib.sha256(json.dumps([metadata.get(name) for name in DESCRIBES]).encode()).hexdigest()[:16]


def read_metadata(path: Path) -> dict[str, str]:
    """What the file says of its model.

    Raises:
        ValueError: as `read_model` does.
    """
    return read_model(path, with_tensors=False)[0]


def read_model(path: Path, with_tensors: bool = True) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file.

    Args:
        path: the file.
        with_tensors: whether they are read.

    Raises:
        ValueError: if the file is damaged or was not written here.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a readable safetensors file: there is no such file")
    with _opened(path) as file:
        names = file.keys() if with_tensors else []
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    if "attention" not in metadata:
        raise ValueError(f"{path} was not saved by this program: it does not describe its model")
    return metadata, tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by their names, from its head alone.

    Raises:
        ValueError: as `read_model` does.
    """
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no dict)


@contextmanager
def _opened(path: Path):
    """The file, of safetensors.  Raises ValueError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def built(path: Path, build: Callable[[], nn.Module], layers: int) -> nn.Module:
    """The model that a file describes, made only when the file is known to hold its weights.

    Args:
        path: the file.
        build: makes the model, without the file's Tucker layers.
        layers: how many attention layers it is said to have.

    Returns:
        What `build` makes, freshly initialised.

    Raises:
        ValueError: if its weights have other names or shapes than the file's, or it cannot be built.
    """
    shapes = read_shapes(path)
    if layers > len(shapes):
        raise ValueError(f"{path} describes a model of {layers:,} layers; its {len(shapes):,} tensors are too few for them")
    with described(path):
        with shapes_alone():
            skeleton = put_layers(build(), read_metadata(path))
        own = {name: tuple(tensor.shape) for name, tensor in _tensors(skeleton).items()}
    if own != shapes:
        raise ValueError(f"{path}: its weights do not fit the model that it describes")
    with described(path):
        return build()


def put_layers(model: nn.Module, metadata: dict[str, str]) -> nn.Module:
    """The same model with the Tucker layers that a file's metadata describe in their places, freshly initialised.

    Raises ValueError for what describes no layer, and for a place that the model does not have.
    """
    described_layers = read_json(metadata["attention"], "its attention")
    check(Part, described_layers, "its attention")
    places = dict(model.named_modules())
    for place, description in described_layers.items():
        if place == "" or place not in places:
            raise ValueError(f"its attention describes a layer at {place!r}, where the model has none")
        check(LayerShape, description, "its attention", place)
        model.set_submodule(place, layer_of(description))
    return model


def fill(model: nn.Module, metadata: dict[str, str], tensors: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """The model with the file's Tucker layers in their places and its weights.

    Args:
        model: as its config builds it.
        metadata, tensors: as `read_model` gives them.
        path: where they came from, for messages.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: if they do not fit, the description is not the one that was written with them, which older files do not say, or
            one of them is not finite.
    """
    if metadata.get("seal") not in (None, seal_of(metadata)):
        raise ValueError(f"{path}: the description of its model was changed after it was written; its weights may be another's")
    with described(path):
        put_layers(model, metadata)
    own = _tensors(model)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{path}: its weights do not fit the model that it describes")
    for name, tensor in own.items():
        check_kind(f"{path}: {name}", tensors[name].dtype, tensor.dtype)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: NaN or infinity is in {name}")
    return model.eval()


def check_kind(what: str, kept: torch.dtype, own: torch.dtype) -> None:
    """Raise ValueError where a file keeps a tensor as other numbers than a model's own: they would be taken for what they stand for.

    Args:
        what: names the tensor.
        kept, own: of the file and of the model.
    """
    if kept != own and not (kept.is_floating_point and own.is_floating_point and kept.itemsize > 1):
        raise ValueError(f"{what} is {kept} in the file, and {own} in the model that it describes")


def described(path: Path) -> AbstractContextManager[None]:
    """Whatever a file's metadata make go wrong while a model is built from them becomes one kind of error.

    Args:
        path: the file.

    Raises:
        ValueError: naming it.
    """
    return as_one_line(lambda error: f"{path} describes no model that can be built: {type(error).__name__}: {error}")


def make_room(path: Path, run: str) -> None:
    """Whatever another run has kept under this name moves to a name with that run's id.

    Args:
        path: where a model is to be written.
        run: the id of the run that writes it.
    """
    if path.exists() and (other := run_of(path)) != run:
        aside = path.with_stem(f"{path.stem}-{other}")
        with suppress(FileNotFoundError):  # another run of this name may make room at the same time
            path.rename(aside)
            tqdm.write(f"{path} was the model of another run, which is in {aside} now")


def kept(path: Path, run: str) -> Path | None:
    """Where the model of a run is that was kept under a name, if it is there.

    Args:
        path: the name.
        run: the run's id.
    """
    places = (path, path.with_stem(f"{path.stem}-{run}"))
    return next((place for place in places if place.exists() and run_of(place) == run), None)


def run_of(path: Path) -> str:
    """The id of the run whose model a file holds; "unknown" of a damaged file, or one that does not say."""
    try:
        return read_metadata(path).get("run", "unknown")
    except ValueError:
        return "unknown"


def describe(layer: TuckerAttention) -> dict:
    """The arguments that build a layer of this shape.  Raises ValueError for one that computes more than they say (`check_parts`)."""
    check_parts(layer)
    rotary = layer.rotary
    return {
        "d_model": layer.d_model,
        "n_heads": layer.n_heads,
        "ranks": layer.ranks,
        "post_ranks": layer.post_ranks,
        "shared_kv": layer.shared_kv,
        "scale": layer.scale,
        "bias": layer.bias,
        "latent_norm": layer.latent_norm,
        "qk_norm": layer.qk_norm,
        "rotary": rotary and {"frequencies": rotary.frequencies.tolist(), "pairing": rotary.pairing, "blocks": rotary.blocks},
        "norms": {name: describe_norm(norm) for name in NORMS if not isinstance(norm := getattr(layer, name), nn.Identity)},
    }


def describe_norm(norm: nn.Module) -> dict:
    """The arguments that build a norm of this kind."""
    if isinstance(norm, QKNorm):
        return {"width": norm.width, "heads": norm.heads, "blocks": norm.blocks, "count": norm.count, "eps": norm.eps}
    return {"width": norm.normalised, "eps": norm.eps}


def layer_of(description: dict) -> TuckerAttention:
    """A fresh layer of the shape that `describe` tells."""
    shape = {name: value for name, value in description.items() if name != "norms"}
    rotary = shape["rotary"]
    layer = TuckerAttention(**{**shape, "rotary": rotary and Rotary(**rotary)})
    if "norms" in description:  # which older files do not have: theirs are as the layer makes them
        for name in NORMS:
            setattr(layer, name, norm_of(description["norms"].get(name)))
    return layer


def norm_of(description: dict | None) -> nn.Module:
    """A fresh norm of the kind that `describe_norm` tells; none is the identity."""
    if description is None:
        return nn.Identity()
    if "heads" in description:
        return QKNorm(**description)
    return LatentNorm(description["width"], eps=description["eps"])


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, each once, and the buffers that belong to the state."""
    parameters, state = dict(model.named_parameters()), model.state_dict()
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in state}
