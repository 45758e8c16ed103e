"""A model that was opened for a look at its attention: the model, its attention layers by their places, and what it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ...store.saved import write_model
from .adapter import layer_caches

NEXT, MASKED, CLASS, NOTHING = "the next token", "masked tokens", "a class", "nothing"  # what a model's output predicts


@dataclass
class OpenModel:
    """A model whose attention can be looked at and replaced.

    Args:
        name: what a record calls it.
        model: in evaluation mode.
        layers: each attention layer, as one of `tucker_ref`, by its place in `model`.
        logits: (model, inputs) -> logits; features, the last hidden state as a rule, where the model predicts nothing.
        wrap: (place, layer) -> what stands in that place.
        metadata: what a file of its weights must say to be opened again.
        hidden: (model, inputs, options) -> the last hidden state, None for models that were trained here.
        predicts: what the logits are for: NEXT, MASKED, CLASS or NOTHING.
        context: the longest text it takes, in tokens; None for images.
        image_size: side of its images in pixels, None for text.
        vocabulary: rows of its embedding, None for images.
        tokenizer: its JSON, for `tokenizers`.
        no_tokenizer: why there is none, for a model of text.
        run: the id of the run that trained it here, if one did.
        weights: what tells it from another model of the same name, elsewhere (`checkpoint.identity`).
        agreement: how far it differs with its own layers put back; None where that was not asked.
        remarks: what else a record must say of it.
    """

    name: str
    model: nn.Module
    layers: dict[str, nn.Module]
    logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    wrap: Callable[[str, nn.Module], nn.Module]
    metadata: dict[str, str]
    hidden: Callable[..., torch.Tensor] | None = None
    predicts: str = NEXT
    context: int | None = None
    image_size: int | None = None
    vocabulary: int | None = None
    tokenizer: str | None = None
    no_tokenizer: str = ""
    run: str | None = None
    weights: str | None = None
    agreement: dict | None = None
    remarks: dict = field(default_factory=dict)

    @property
    def takes_text(self) -> bool:
        """Or images."""
        return self.image_size is None

    def config(self) -> dict:
        """What a record says of it, and by which it is known: by the run that trained it here, elsewhere by its weights."""
        known = {"run": self.run} if self.run else {"weights": self.weights} if self.weights else {}
        return {"model": self.name, **shape_of(self.layers), **known, **self.remarks}

    def measured(self) -> dict:
        """What a record's metrics say of the opening."""
        return {"opening": self.agreement} if self.agreement else {}

    def check_trilinear(self, *, or_between_norms: bool = False) -> None:
        """Raise ValueError, naming the layer, where norms stand between the weights: such a layer has no tensors.

        or_between_norms: norms of queries and keys are no hindrance, since what stands between them is looked at.
        """
        options = {"latent_norm": "latents"} | ({} if or_between_norms else {"qk_norm": "queries and keys"})
        for place, layer in self.layers.items():
            for option, what in options.items():
                if getattr(layer, option, None):
                    raise ValueError(
                        f"{self.name}: {place} normalises its {what}. As a layer it is a Tucker Attention with norms, exactly "
                        "(`as_tucker`), but it has no attention tensor whose ranks could be looked at or cut"
                    )

    def put(self, layers: dict[str, nn.Module]) -> None:
        """Put attention layers in their places.

        Args:
            layers: by place, as in `layers`.
        """
        for place, layer in layers.items():
            self.model.set_submodule(place, self.wrap(place, layer))

    def new_cache(self, batch: int, max_tokens: int):
        """A cache with which transformers' own `generate` runs on the layers that were put here.

        Args:
            batch: how many sequences.
            max_tokens: how many tokens of each there is room for.

        Returns:
            What `generate` takes as past_key_values.
        """
        return layer_caches([self.model.get_submodule(place).attention for place in self.layers], batch, max_tokens)

    def save(self, path: Path) -> None:
        """One safetensors file that `open_model` opens again."""
        write_model(path, self.model, {**self.metadata, "name": self.name})


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
