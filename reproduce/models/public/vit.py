"""Vision transformers: ViT, DeiT, DINOv2 with or without registers, SigLIP. Layer scale stands outside the attention."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import CLASS


def layer_of(attention: nn.Module, _turning: Turning | None) -> nn.Module:
    return multi_head(attention.state_dict(), attention.head_dim, attention.scaling)


def siglip_layer_of(attention: nn.Module, _turning: Turning | None) -> nn.Module:
    state = {name.replace("out_proj", "o_proj"): tensor for name, tensor in attention.state_dict().items()}
    return multi_head(state, attention.head_dim, attention.scale)


VIT = Family(
    types=("vit", "deit", "dinov2", "dinov2_with_registers"),
    head="AutoModelForImageClassification",
    predicts=CLASS,
    attention=("ViTAttention", "DeiTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention"),
    layer_of=layer_of,
    other_heads=("DeiTForImageClassificationWithTeacher",),
    without_head={name: name for name in ("Dinov2Model", "Dinov2WithRegistersModel")},  # as they are published
    unused=r"(vit\.|deit\.)?pooler\.",
)
SIGLIP = Family(
    types=("siglip", "siglip_vision_model"),
    head="AutoModelForImageClassification",
    predicts=CLASS,
    attention=("SiglipAttention",),
    layer_of=siglip_layer_of,
    without_head={
        "SiglipVisionModel": "SiglipVisionModel",
        "SiglipModel": "SiglipVisionModel",
    },  # of two towers that which sees
    unused=r"text_model\.|logit_(scale|bias)$",
)
