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
class Side:
    """What one mechanism caches of a token, as decoding reads it.

    Args:
        name: the mechanism's.
        groups: how many keys and values.
        key, value: their widths.
        shared: values are the first channels of their keys, as in MLA.
    """

    name: str
    groups: int
    key: int
    value: int
    shared: bool = False

    def context(self, cache: int, batch: int, itemsize: int) -> int:
        """How many tokens of each sequence fit into a cache of so many bytes.

        Args:
            cache: bytes.
            batch: sequences.
            itemsize: bytes of a number.
        """
        numbers = self.groups * (self.key + (0 if self.shared else self.value))
        return cache // (batch * numbers * itemsize)


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
        decode: who decodes, after how many tokens, of how many sequences.
        decode_heads: number and width of the heads that decode.
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
    decode: tuple[tuple[Side, int, int], ...]
    decode_heads: tuple[int, int]
    vocab_size: int
    n_layers: dict[str, int]
    dtype: torch.dtype
    matmul: int
    repeats: int
    curves: Curves


def alike(sides: tuple[Side, ...], contexts: tuple[tuple[int, int], ...]) -> tuple[tuple[Side, int, int], ...]:
    """All of them after as many tokens: `contexts` are pairs of context and batch."""
    return tuple((side, *pair) for pair in contexts for side in sides)


def at_caches(sides: tuple[Side, ...], caches: tuple[int, ...], batch: int, itemsize: int) -> tuple[tuple[Side, int, int], ...]:
    """All of them with caches of as many bytes, up to a token of each sequence."""
    return tuple((side, side.context(cache, batch, itemsize), batch) for cache in caches for side in sides)


MIB = 2**20
MHA, LATENTS = Side("MHA", 32, 64, 64), Side("latents 128/128", 1, 128, 128)
NARROW = Side("latents 64/64", 1, 64, 64)  # to a kernel they are the key and the value of MQA
SIDES = (MHA, Side("GQA n_KV=8", 8, 64, 64), NARROW, Side("MLA d_c=512 d_R=64", 1, 576, 512, shared=True), LATENTS)

PRESETS = {
    "smoke": Preset(
        shapes=(Shape("GPT-2", 1, 64, 96, 12, tuple(row.narrowed(8) for row in TABLE2[::3])),),
        backends=("sdpa", "math"),
        latent_backends=(),
        contexts=(32, 64),
        context_rows=(TABLE2[0], TABLE2[6].narrowed(8)),
        stack=2,
        decode=(
            *alike((Side("MHA", 4, 16, 16), Side("latents 32/32", 1, 32, 32)), ((64, 2),)),
            *at_caches((Side("MLA d_c=16 d_R=8", 1, 24, 16, shared=True),), (2**13,), batch=2, itemsize=4),
        ),
        decode_heads=(4, 16),
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
        decode=tuple(
            dict.fromkeys(  # some are both
                at_caches(SIDES, (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB), batch=16, itemsize=2)
                + alike((MHA, LATENTS, NARROW), ((8192, 16), (131072, 1), (16384, 64)))
            )
        ),
        decode_heads=(32, 64),
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
