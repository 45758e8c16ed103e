"""One layer forward and backward, against the context too, and stacks of layers that keep more or less."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch._functorch.config
from torch import nn

from tucker_ref.own_code import with_own_code

from ...models.decoding import captured
from ...models.rows import Row
from .presets import Preset, Shape
from .sections import Limits
from .timing import Case, gated, kept_megabytes, median_ms, peak_megabytes, refused_for_memory

BUDGET = 0.6  # of what a compiled layer would keep
WAYS = ("plain", "queries again", f"budget {BUDGET}")  # how much a layer keeps for its backward pass


def layers(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Forward and backward of one layer, every row with every backend.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record: what `work` gives, and how to get what `timed_layer` does.
    """
    for shape in preset.shapes:
        for row in shape.rows:
            for backend in preset.backends + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                case = {"shape": shape.name, "row": row.label, "backend": backend, **work(shape, row)}
                yield case, functools.partial(timed_layer, shape, row, backend, preset, device)


def contexts(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Some of the last shape's layers against the length of the context, as many tokens a batch as before.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record, timed by `timed_layer`.
    """
    shape = preset.shapes[-1]
    for n in preset.contexts:
        longer = dataclasses.replace(shape, batch=max(1, shape.batch * shape.tokens // n), tokens=n)
        for row in preset.context_rows:
            for backend in preset.backends[:1] + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                case = {"tokens": n, "batch": longer.batch, "row": row.label, "backend": backend}
                yield case, functools.partial(timed_layer, longer, row, backend, preset, device)


def memory(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Forward and backward of a stack of the last shape's layers: what they keep in between, and what it costs to keep less.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record, `way` being one of WAYS, timed by `timed_stack`.
    """
    shape, stock = preset.shapes[-1], preset.backends[0]
    for row in preset.context_rows:
        ours = preset.latent_backends if row.mechanism == "Tucker" else ()
        for backend, way in [(stock, way) for way in WAYS] + [(kernel, "plain") for kernel in ours]:
            case = {"row": row.label, "backend": backend, "way": way, "layers": preset.stack}
            yield case, functools.partial(timed_stack, shape, row, backend, way, preset, device)


def timed_stack(shape: Shape, row: Row, backend: str, way: str, preset: Preset, device: str) -> dict:
    """Layers on top of one another, each compiled and added to what it read; or why they are not timed.

    Args:
        shape, row, backend: which layers, and how they attend.
        way: of WAYS.
        preset: type, repeats and number of layers.
        device: as torch names it.

    Returns:
        As `timed_layer`, and `kept_megabytes`, which are there between the passes (None on a CPU).
    """
    torch.manual_seed(0)
    with torch.device(device):  # where numbers are drawn at once
        layers = [row.build(shape.d_model, shape.n_heads, shape.rope_base) for _ in range(preset.stack)]
    for layer in layers:
        layer.recompute = way == WAYS[1]
    with torch._functorch.config.patch(activation_memory_budget=BUDGET if way == WAYS[2] else 1.0):
        # Compiled for the comparison too: what the backward pass makes again is decided there.
        if "refused" in (passed := gated(lambda: gate(layers[0], shape.d_model, backend, preset, device, compiled), preset)):
            return passed
        parameters = [p for layer in layers for p in layer.to(preset.dtype).parameters()]
        called = compiled_alike(layers, device)
        x = torch.randn(shape.batch, shape.tokens, shape.d_model, device=device, dtype=preset.dtype, requires_grad=True)
        dy = torch.randn_like(x)

        def forward() -> torch.Tensor:
            y = x
            for layer in called:
                y = y + layer(y, backend=backend)
            return y

        def step() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), [x, *parameters], dy)

        try:
            megabytes = peak_megabytes(step, device)
        except RuntimeError as error:
            return refused_for_memory(error)
        milliseconds = median_ms(step, preset, device, few=True)
        return {
            "milliseconds": milliseconds,
            "megabytes": megabytes,
            "kept_megabytes": kept_megabytes(forward, device),
            **passed,
        }


def compiled(layer: nn.Module, device: str) -> Callable[..., torch.Tensor]:
    """The layer compiled on a GPU, the first of its kind anew; on a CPU the layer itself."""
    if device.startswith("cuda"):
        return torch.compile(layer, fullgraph=True, dynamic=False)
    return layer


def compiled_alike(layers: list[nn.Module], device: str) -> list[Callable[..., torch.Tensor]]:
    """As `compiled`, of layers of one size, which share one compilation."""
    if device.startswith("cuda"):
        call = torch.compile(with_own_code(nn.Module.__call__), fullgraph=True, dynamic=False)
        return [functools.partial(call, layer) for layer in layers]
    return list(layers)


def work(shape: Shape, row: Row) -> dict:
    """What a layer must do at least, forward and backward, under a causal mask.

    Returns:
        `flops`, floating-point operations, and `bytes` that cannot stay unmoved in 16 bits: x, y and their gradients once,
        parameters twice and their gradients once.
    """
    cost, tokens = row.cost(shape.d_model, shape.n_heads), shape.batch * shape.tokens
    flops = 3 * 2 * (cost.projections * tokens + cost.attention * tokens * shape.tokens // 2)
    return {"flops": flops, "bytes": 2 * (4 * tokens * shape.d_model + 3 * cost.parameters)}


def timed_layer(shape: Shape, row: Row, backend: str, preset: Preset, device: str) -> dict:
    """Forward and backward of one layer, or why it is not timed.

    Args:
        shape, row, backend: which layer, and how it attends.
        preset: type and repeats.
        device: as torch names it.

    Returns:
        `milliseconds`, `megabytes` (10^6 bytes, None on a CPU) and relative `error`; or `refused` with the reason.
    """
    torch.manual_seed(0)
    with torch.device(device):
        layer = row.build(shape.d_model, shape.n_heads, shape.rope_base)
    if "refused" in (passed := gated(lambda: gate(layer, shape.d_model, backend, preset, device), preset)):
        return passed
    layer = layer.to(preset.dtype)
    torch.compiler.reset()
    called = compiled(layer, device)
    x = torch.randn(shape.batch, shape.tokens, shape.d_model, device=device, dtype=preset.dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(called(x, backend=backend), [x, *layer.parameters()], dy)

    megabytes = peak_megabytes(step, device)
    return {"milliseconds": median_ms(captured(step, device), preset, device), "megabytes": megabytes, **passed}


def gate(
    layer: nn.Module,
    d_model: int,
    backend: str,
    preset: Preset,
    device: str,
    prepared: Callable[[nn.Module, str], Callable[..., torch.Tensor]] = lambda layer, _: layer,
) -> float:
    """Compare a layer with the reference in float64, on a short sequence of odd length.

    Args:
        layer: left in float64.
        d_model: its width.
        backend: the one to compare.
        preset: whose type the backend runs in.
        device: as torch names it.
        prepared: (layer, device) -> what is called in its place with the backend.

    Returns:
        The worse relative error in output and input gradient.

    Raises:
        ValueError: if the backend refuses the layer.
    """
    x = torch.randn(2, 67, d_model, device=device, dtype=torch.float64)
    dy, results = torch.randn_like(x), []
    torch.compiler.reset()
    for dtype, chosen in ((preset.dtype, backend), (torch.float64, "reference")):
        leaf = x.to(preset.dtype).to(dtype).requires_grad_()
        layer = layer.to(preset.dtype).to(dtype)
        y = (layer if chosen == "reference" else prepared(layer, device))(leaf, backend=chosen)
        y.backward(dy.to(dtype))
        results.append((y.detach().double(), leaf.grad.double()))
        layer.zero_grad()
    torch.compiler.reset()
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))
