"""What is timed, at toy size and on a GPU."""

from dataclasses import dataclass

import torch

from ...models.rows import TABLE2, TABLE3, Row
from ..table3 import ROPE_BASE


@dataclass(frozen=True)
class Shape:
    """One layer in training.

    Args:
        name: of the model that has it.
        batch: sequences.
        tokens: of each sequence.
        d_model, n_heads: of the layer.
        rows: those of its table.
        rope_base: of the rotary embedding, None without one.
    """

    name: str
    batch: int
    tokens: int
    d_model: int
    n_heads: int
    rows: tuple[Row, ...]
    rope_base: float | None = None


@dataclass(frozen=True)
class Curves:
    """One layer against its sizes, one of which is varied at a time.

    Args:
        shape: the layer from which they start, with the rows that are followed.
        values: what each of "d", "n_H" and "N" takes in its turn.
        decode_batch: sequences that decode one token.
    """

    shape: Shape
    values: dict[str, tuple[int, ...]]
    decode_batch: int


@dataclass(frozen=True)
class Preset:
    """What is timed.

    Args:
        shapes: layers in training.
        backends: of every layer.
        latent_backends: more of them, for Tucker Attention.
        contexts: lengths in tokens at which `context_rows` are timed.
        context_rows: of the last shape; stacks of them show how much memory training takes.
        stack: how many layers such a stack has.
        decode: pairs of context in tokens and batch.
        decode_heads: number and width of the heads that decode.
        decode_latents: widths of the latents that decode.
        vocab_size: of whole models.
        n_layers: of whole models, by the name of their shape.
        dtype: of everything that is timed.
        matmul: rows and columns of the matrices that give the device's rate.
        repeats: timings of each, of which the median counts.
        curves: of one layer.
    """

    shapes: tuple[Shape, ...]
    backends: tuple[str, ...]
    latent_backends: tuple[str, ...]
    contexts: tuple[int, ...]
    context_rows: tuple[Row, ...]
    stack: int
    decode: tuple[tuple[int, int], ...]
    decode_heads: tuple[int, int]
    decode_latents: tuple[int, ...]
    vocab_size: int
    n_layers: dict[str, int]
    dtype: torch.dtype
    matmul: int
    repeats: int
    curves: Curves


PRESETS = {
    "smoke": Preset(
        shapes=(Shape("GPT-2", 1, 64, 96, 12, tuple(row.narrowed(8) for row in TABLE2[::3])),),
        backends=("sdpa", "math"),
        latent_backends=(),
        contexts=(32, 64),
        context_rows=(TABLE2[0], TABLE2[6].narrowed(8)),
        stack=2,
        decode=((64, 2),),
        decode_heads=(4, 16),
        decode_latents=(32,),
        vocab_size=64,
        n_layers={"GPT-2": 2},
        dtype=torch.float32,
        matmul=256,
        repeats=3,
        curves=Curves(
            Shape("toy", 1, 16, 48, 4, (Row("MHA"), Row("Tucker", ranks=(2, 8, 8)))),
            {"d": (24, 48, 96), "n_H": (4, 8, 12), "N": (16, 32, 64)},
            decode_batch=1,
        ),
    ),
    "gpu": Preset(
        shapes=(
            Shape("GPT-2", 32, 1024, 768, 12, TABLE2),
            Shape("LLaMA", 4, 4096, 2048, 32, TABLE3, ROPE_BASE),
        ),
        backends=("cudnn", "flash"),
        latent_backends=("triton",),
        contexts=(1024, 2048, 4096, 8192, 16384),
        context_rows=(TABLE3[0], TABLE3[5], TABLE3[7]),
        stack=8,
        decode=((8192, 16), (131072, 1), (16384, 64)),
        decode_heads=(32, 64),
        decode_latents=(128, 64),
        vocab_size=50_304,
        n_layers={"GPT-2": 12, "LLaMA": 16},
        dtype=torch.bfloat16,
        matmul=8192,
        repeats=20,
        # Heads stay between 16 and 128 wide, where every kernel takes them.
        curves=Curves(
            Shape("LLaMA", 2, 4096, 2048, 32, (Row("MHA"), Row("Tucker", ranks=(8, 64, 64))), ROPE_BASE),
            {"d": (512, 1024, 2048, 4096), "n_H": (16, 32, 64, 128), "N": (1024, 2048, 4096, 8192, 16384)},
            decode_batch=16,
        ),
    ),
}
