"""Vision Transformer (Dosovitskiy et al. 2021): patches, a class token, learned positions, non-causal pre-norm blocks."""

import torch
from torch import nn

from .block import AttentionFactory, Block


class ViT(nn.Module):
    """A vision transformer with any attention, which classifies by its class token.

    Args:
        image_size: side of the square images in pixels, a multiple of patch_size.
        patch_size: side of a patch in pixels.
        channels: 1 for grey, 3 for colour.
        n_classes: logits of an image.
        d_model, n_heads, n_layers, attention: as in `Block`.

    Raises:
        ValueError: if patches do not tile the image.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        n_classes: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        attention: AttentionFactory,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}; it must divide image_size = {image_size}")
        n_tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embedding = nn.Conv2d(channels, d_model, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(d_model))
        self.position_embedding = nn.Parameter(torch.empty(n_tokens, d_model))
        std = 0.02 * (768 / d_model) ** 0.5  # 0.02 at ViT-B's width, larger where the model is narrower
        self.blocks = nn.ModuleList(
            Block(d_model, n_heads, n_layers, attention, causal=False, std=std) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, n_classes)
        nn.init.normal_(self.position_embedding, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def compile_parts(self, **options) -> None:
        """torch.compile of the blocks, one compilation for all of them.

        Args:
            options: as torch.compile takes them.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, **options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits.

        Args:
            images: (b, channels, side, side).

        Returns:
            (b, n_classes).
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (b, n - 1, d)
        x = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1)  # (b, n, d)
        x = x + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x[:, 0]))
