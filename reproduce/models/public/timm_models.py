"""timm's plain vision transformers: queries, keys and values in one matrix, with or without norms of queries and keys."""

import json
import re
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from ...store.checked import Line, Part
from .adapter import Adapter
from .checkpoint import identity_of
from .inputs import as_trained
from .layers import multi_head
from .opened import CLASS, OpenModel

MOST_CLASSES = 65536  # above the largest public sets
OLDEST = (1, 0, 9)  # the first that was looked at whose pretrained weights are read without unpickling objects


class Arguments(Part):
    """What of a model's arguments its file says."""

    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]


class Public(Part):
    """What a file says of a model of timm."""

    timm: Line
    arguments: Arguments


def open_timm(name: str) -> OpenModel | None:
    """A model by its name; None unless timm is installed and knows the name.  Raises ValueError if it cannot be opened."""
    try:
        import timm
    except ImportError:
        return None
    short = name.removeprefix("timm/")
    if not timm.is_model(short.split(".")[0]):
        return None
    check_version(timm.__version__)
    model = timm.create_model(short, pretrained=True).eval()
    opened = adapted(short, model, {"timm": short, "arguments": {"num_classes": model.num_classes}})
    opened.weights = identity_of(model)
    return opened


def from_description(public: dict) -> OpenModel:
    """The architecture that a file names, with fresh weights. Of the arguments that it gives the number of classes alone is read."""
    import timm

    name, arguments = public["timm"], public["arguments"]
    if not timm.is_model(name.split(".")[0]):  # "hf-hub:" and "local-dir:" lead elsewhere
        raise ValueError(f"timm knows no model {name}")
    return adapted(name, timm.create_model(name, pretrained=False, num_classes=arguments["num_classes"]), public)


def check_version(version: str) -> None:
    """Raise ValueError for a timm that may unpickle what it downloads."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        raise ValueError(f"timm {version} may unpickle weights; {'.'.join(map(str, OLDEST))} or newer does not")


def adapted(name: str, model: nn.Module, public: dict) -> OpenModel:
    """Every attention layer found and read.  Raises ValueError for a model that is no plain vision transformer."""
    blocks, size = getattr(model, "blocks", []), getattr(getattr(model, "patch_embed", None), "img_size", None)
    attentions = {f"blocks.{n}.attn": getattr(block, "attn", None) for n, block in enumerate(blocks)}
    plain = all(isinstance(getattr(a, "qkv", None), nn.Linear) and hasattr(a, "head_dim") for a in attentions.values())
    if not attentions or size is None or not plain:
        raise ValueError("only timm's plain vision transformers are known here")
    if size[0] != size[1]:
        raise ValueError(f"img_size is {size[0]} x {size[1]}: only square images are known here")
    mean, std = (list(model.pretrained_cfg[kind]) for kind in ("mean", "std"))
    pixels = {"factor": 1 / 255, "standard": [mean, std]}
    return OpenModel(
        name,
        model,
        {place: layer_of(attention) for place, attention in attentions.items()},
        lambda model, x: model(as_trained(x, pixels)),
        lambda place, layer: Adapter(layer, causal=False, returns_weights=False),
        {"public": json.dumps(public)},
        hidden=lambda model, x: model.forward_features(as_trained(x, pixels)),
        predicts=CLASS,
        image_size=size[0],
    )


def layer_of(attention: nn.Module) -> nn.Module:
    """The qkv matrix taken apart; weights of another name are refused where the layer is made."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in attention.state_dict().items():
        if name.startswith("qkv."):
            state |= {name.replace("qkv", f"{one}_proj"): part for one, part in zip("qkv", tensor.chunk(3))}
        else:
            state[name.replace("proj.", "o_proj.") if name.startswith("proj.") else name] = tensor
    return multi_head(state, attention.head_dim, attention.scale, eps=getattr(getattr(attention, "q_norm", None), "eps", None))
