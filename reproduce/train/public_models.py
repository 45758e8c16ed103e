"""Models opened for a look at their attention: those trained here, and public ones in the formats of transformers and timm.

Every attention layer appears as a layer of `tucker_ref`, and another layer can be put in its place. Public weights are read from
safetensors files, or with `weights_only=True`; code that a checkpoint brings along is never run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, Rotary

from ..store.saved import described, fill, read_metadata, read_model, write_model
from .language import load_model
from .vision import load_vit

TEXT, IMAGES = ("gpt2", "llama", "mistral", "qwen2"), ("vit",)  # what transformers calls the model types known here
ATTENTION = ("GPT2Attention", "LlamaAttention", "MistralAttention", "Qwen2Attention", "ViTAttention")


@dataclass
class OpenModel:
    """A model whose attention can be looked at and replaced.

    Args:
        name: what a record calls it.
        model: in evaluation mode.
        layers: each attention layer, as one of `tucker_ref`, by its place in `model`.
        logits: (model, inputs) -> logits.
        wrap: an attention layer -> what the model calls in its place.
        metadata: what a file of its weights must say to be opened again.
        context: the longest text it takes, in tokens; None for images.
        image_size: side of its images in pixels, None for text.
        tokenizer: its JSON, for `tokenizers`.
        run: the id of the run that trained it here, if one did.
    """

    name: str
    model: nn.Module
    layers: dict[str, nn.Module]
    logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    wrap: Callable[[nn.Module], nn.Module]
    metadata: dict[str, str]
    context: int | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    run: str | None = None

    def config(self) -> dict:
        """What a record says of it; of a model that was trained here, of which run."""
        return {"model": self.name, **shape_of(self.layers), **({"run": self.run} if self.run else {})}

    def put(self, layers: dict[str, nn.Module]) -> None:
        """Put attention layers in their places.

        Args:
            layers: by place, as in `layers`.
        """
        for place, layer in layers.items():
            self.model.set_submodule(place, self.wrap(layer))

    def save(self, path: Path) -> None:
        """One safetensors file that `open_model` opens again."""
        write_model(path, self.model, {**self.metadata, "name": self.name})


class Adapter(nn.Module):
    """A layer of `tucker_ref` where a transformers or timm model calls its own attention.

    Args:
        attention: the layer.
        causal: the rule where the model gives no mask.
        returns_weights: whether the model expects a pair, as transformers does; the weights are None then.
    """

    def __init__(self, attention: nn.Module, causal: bool, returns_weights: bool):
        super().__init__()
        self.attention, self.causal, self.returns_weights = attention, causal, returns_weights

    def forward(
        self, hidden_states, attention_mask=None, *, attn_mask=None, position_ids=None, past_key_values=None, **_others
    ):
        """The layer on these hidden states.

        Args:
            hidden_states: (b, n, d).
            attention_mask: as SDPA takes it, boolean or added to the logits, the causal rule included; None for that rule alone.
            attn_mask: timm's name for it.
            position_ids: (n,), (1, n) or (b, n).
            past_key_values: must be None.

        Returns:
            (b, n, d), in a pair with None where the model expects one.

        Raises:
            ValueError: if the model brings a cache of its own.
        """
        attention_mask = attn_mask if attention_mask is None else attention_mask
        if past_key_values is not None:
            raise ValueError("a replaced attention layer keeps no transformers cache; call the model with use_cache=False")
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask >= 0  # zero where a query may look, hugely negative elsewhere
        positions = position_ids
        if positions is not None and positions.ndim == 2 and len(positions) == 1:
            positions = positions[0]
        causal = self.causal and attention_mask is None
        y = self.attention(hidden_states, causal=causal, mask=attention_mask, positions=positions)
        return (y, None) if self.returns_weights else y


def open_model(name: str) -> OpenModel:
    """A model by its file or name.

    Args:
        name: a .safetensors file written here, a folder or hub name that transformers knows, or a timm name.

    Raises:
        ValueError: if nothing is found there, or a kind of model or attention that is not known here.
    """
    path = Path(name)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        return _open_public_file(path) if "public" in metadata else _open_vit(path) if "vit" in metadata else _open_own(path)
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2:  # hub names are NAME or OWNER/NAME
            raise ValueError(f"--model {name}: no such file or folder")
        if opened := _open_timm(name):
            return opened
    return _open_transformers(name)


def configured(name: str) -> tuple[str, int] | None:
    """Name and image size of what `open_model` would open, from its configuration alone, without a weight.

    Args:
        name: as there.

    Returns:
        None where that takes opening it: files, timm's models, models of text, and what cannot be opened.
    """
    if Path(name).suffix == ".safetensors":
        return None
    try:
        config = _transformers(name).AutoConfig.from_pretrained(name)
    except Exception:  # whatever it is, `open_model` says it better
        return None
    return (_known_as(name), config.image_size) if config.model_type in IMAGES else None


def _known_as(name: str) -> str:
    """A folder's own name, wherever it lies; a hub name as it is."""
    return Path(name).name if Path(name).exists() else name


def shape_of(layers: dict[str, nn.Module]) -> dict:
    """What the layers have in common, for the record.

    Args:
        layers: as in `OpenModel`, at least one.
    """
    first = next(iter(layers.values()))
    head_dim = getattr(first, "head_dim", 0)
    keys = first.k_proj.out_features // head_dim if hasattr(first, "k_proj") else 0
    return {
        "d_model": first.d_model,
        "n_heads": first.n_heads,
        "n_kv_heads": keys,
        "head_dim": head_dim,
        "bias": getattr(first, "bias", False),
        "rotary": first.rotary is not None,
        "n_layers": len(layers),
    }


def _open_own(path: Path) -> OpenModel:
    model, tokenizer, config = load_model(path)
    layers = {f"blocks.{n}.attention": block.attention for n, block in enumerate(model.blocks)}
    metadata = {"config": json.dumps(config), "tokenizer": tokenizer}
    return OpenModel(
        path.stem, model, layers, _call, lambda layer: layer, metadata,
        context=config["context"], tokenizer=tokenizer, run=read_metadata(path).get("run"),
    )  # fmt: skip


def _open_vit(path: Path) -> OpenModel:
    model, metadata = load_vit(path)
    layers = {f"blocks.{n}.attention": block.attention for n, block in enumerate(model.blocks)}
    side = json.loads(metadata["vit"])["image_size"]
    return OpenModel(
        path.stem, model, layers, _call, lambda layer: layer, {"vit": metadata["vit"]},
        image_size=side, run=metadata.get("run"),
    )  # fmt: skip


def _call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def _open_public_file(path: Path) -> OpenModel:
    """The architecture from the file's metadata, with fresh weights, then Tucker layers and weights from the file."""
    metadata, tensors = read_model(path)
    with described(path):
        public = json.loads(metadata["public"])
        if "timm" in public:
            import timm

            opened = _timm_model(
                public["timm"], timm.create_model(public["timm"], pretrained=False, **public["arguments"]), public
            )
        else:
            transformers = _transformers(path)
            config = transformers.AutoConfig.for_model(**public["config"])
            model = getattr(transformers, public["class"])._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
            opened = _transformers_model(metadata["name"], model, metadata.get("tokenizer"), public.get("pixels"))
        places = json.loads(metadata["attention"])  # of the Tucker layers inside their adapters
        opened.put({place.removesuffix(".attention"): opened.layers[place.removesuffix(".attention")] for place in places})
    fill(opened.model, metadata, tensors, path)
    opened.layers = {p: getattr(opened.model.get_submodule(p), "attention", layer) for p, layer in opened.layers.items()}
    return opened


def _transformers(name):
    try:
        import transformers
    except ImportError:
        raise ValueError(f"--model {name}: public models need transformers: pip install 'tucker-ref[public]'") from None
    return transformers


def _open_transformers(name: str) -> OpenModel:
    transformers = _transformers(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in TEXT + IMAGES:
            raise ValueError(f"its model type is {config.model_type}; known here are {', '.join(TEXT + IMAGES)}")
        of = transformers.AutoModelForCausalLM if config.model_type in TEXT else transformers.AutoModelForImageClassification
        model = of.from_pretrained(name, weights_only=True, attn_implementation="sdpa", dtype=torch.float32)
        tokenizer = pixels = None
        if config.model_type in TEXT:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str()
        else:
            pixels = _pixels_of(transformers, name)
    except Exception as error:  # whatever a damaged or missing checkpoint makes the library raise
        raise ValueError(f"--model {name} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    return _transformers_model(_known_as(name), model.eval(), tokenizer, pixels)


def _pixels_of(transformers, name: str) -> list | None:
    """Mean and standard deviation of each channel, in [0, 1], that this vision transformer was trained with, where it says so."""
    try:
        said = transformers.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:  # no such file beside the model
        return None
    return [said["image_mean"], said["image_std"]] if {"image_mean", "image_std"} <= said.keys() else None


def _standardised(x: torch.Tensor, pixels: list | None) -> torch.Tensor:
    """Images in [-1, 1], (b, channels, side, side), as a model takes them; pixels: as `_pixels_of` gives them, None for [-1, 1]."""
    if pixels is None:
        return x
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in pixels)  # (channels, 1, 1)
    return ((x + 1) / 2 - mean) / std


def _transformers_model(name: str, model: nn.Module, tokenizer: str | None, pixels: list | None = None) -> OpenModel:
    config, is_text = model.config, model.config.model_type in TEXT
    if is_text:
        config.use_cache = False
    rotary = _rotary_of(model)
    layers = {place: _layer_of(module, rotary) for place, module in model.named_modules() if type(module).__name__ in ATTENTION}
    public = {"class": type(model).__name__, "config": config.to_dict()} | ({"pixels": pixels} if pixels else {})
    metadata = {"public": json.dumps(public)} | ({"tokenizer": tokenizer} if tokenizer else {})
    return OpenModel(
        name,
        model,
        layers,
        lambda model, x: model(x if is_text else _standardised(x, pixels)).logits,
        lambda layer: Adapter(layer, causal=is_text, returns_weights=True),
        metadata,
        context=config.max_position_embeddings if is_text else None,
        image_size=None if is_text else config.image_size,
        tokenizer=tokenizer,
    )


def _rotary_of(model: nn.Module) -> Rotary | None:
    """The model's own frequencies.  Raises ValueError where they change with the length of the text."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            if module.rope_type not in ("default", "linear", "llama3"):
                raise ValueError(f"its rotary embedding is of type {module.rope_type}; known are default, linear and llama3")
            return Rotary(module.inv_freq.double(), "half")
    return None


def _layer_of(attention: nn.Module, rotary: Rotary | None) -> nn.Module:
    """A layer of `tucker_ref` with copies of this module's weights."""
    if type(attention).__name__ == "GPT2Attention":
        state = {"o_proj.weight": attention.c_proj.weight.T, "o_proj.bias": attention.c_proj.bias}
        for name, weight, bias in zip("qkv", attention.c_attn.weight.T.chunk(3), attention.c_attn.bias.chunk(3)):
            state |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
    else:
        state = attention.state_dict()
    return _multi_head(state, attention.head_dim, attention.scaling, rotary)


def _multi_head(state: dict[str, torch.Tensor], head_dim: int, scale: float, rotary: Rotary | None) -> nn.Module:
    """MHA or GQA with these projections; biases that are missing beside others become zeros."""
    queries, d_model = state["q_proj.weight"].shape
    keys = len(state["k_proj.weight"])
    bias = True if "o_proj.bias" in state else "qkv" if "q_proj.bias" in state else False
    options = dict(head_dim=head_dim, bias=bias, rotary=rotary)
    if keys == queries:
        layer = MultiHeadAttention(d_model, queries // head_dim, **options)
    else:
        layer = GroupedQueryAttention(d_model, queries // head_dim, keys // head_dim, **options)
    layer.scale = scale
    missing, unexpected = layer.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("bias") for name in missing):
        raise ValueError(f"its attention holds {', '.join(unexpected or missing)}, which is not known here")
    return layer.eval()


def _open_timm(name: str) -> OpenModel | None:
    """None unless timm is installed and knows the name."""
    try:
        import timm
    except ImportError:
        return None
    short = name.removeprefix("timm/")
    if not timm.is_model(short.split(".")[0]):
        return None
    try:
        model = timm.create_model(short, pretrained=True).eval()
    except Exception as error:  # as above
        raise ValueError(f"--model {name} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    return _timm_model(short, model, {"timm": short, "arguments": {"num_classes": model.num_classes}})


def _timm_model(name: str, model: nn.Module, public: dict) -> OpenModel:
    blocks = getattr(model, "blocks", [])
    if not blocks or any(not hasattr(block, "attn") or not hasattr(block.attn, "qkv") for block in blocks):
        raise ValueError(f"--model {name}: only timm's plain vision transformers are known here")
    layers = {}
    for n, block in enumerate(blocks):
        attention, state = block.attn, {}
        for part in ("weight", "bias"):
            if getattr(attention.qkv, part) is not None:
                for projection, tensor in zip("qkv", getattr(attention.qkv, part).chunk(3)):
                    state[f"{projection}_proj.{part}"] = tensor
            if getattr(attention.proj, part) is not None:
                state[f"o_proj.{part}"] = getattr(attention.proj, part)
        state |= {f"{kind}.{k}": v for kind in ("q_norm", "k_norm") for k, v in getattr(attention, kind).state_dict().items()}
        layers[f"blocks.{n}.attn"] = _multi_head(state, attention.head_dim, attention.scale, None)
    pixels = [list(model.pretrained_cfg[kind]) for kind in ("mean", "std")]
    return OpenModel(
        name,
        model,
        layers,
        lambda model, x: model(_standardised(x, pixels)),
        lambda layer: Adapter(layer, causal=False, returns_weights=False),
        {"public": json.dumps(public)},
        image_size=model.patch_embed.img_size[0],
    )
