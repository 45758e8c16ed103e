"""What goes on inside a model while it trains: norms of weights and gradients by kind, sizes of activations, the largest logit."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """While it is entered, every call of PyTorch's attention is seen.

    Args:
        see: called with (q, k, v, z, scale): queries, keys and values as in `attend`, the result, and what multiplies the logits.
    """

    def __init__(self, see: Callable[..., None]):
        super().__init__()
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            self.see(*args, result, kwargs["scale"])
        return result


@torch.no_grad()
def watch(model: nn.Module, tokens: torch.Tensor, see: Callable[..., None]) -> None:
    """Run the model as it trains, in bfloat16 but not compiled, and see its attention.

    Args:
        model: a language model.
        tokens: (1, n) integers.
        see: as in `Watching`, called once a layer in their order.
    """
    eager = torch.compiler.set_stance("force_eager")
    with Watching(see), eager, torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        model.hidden(tokens)


def largest_logits(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest |logit| of each head where a query may look, under the causal rule.

    Args:
        q: (b, h, n, k).
        k: (b, g, n, k), where g divides h.
        scale: multiplies the logits.

    Returns:
        (h,) float32.
    """
    share = q.shape[1] // k.shape[1]  # heads of a group
    heads = (  # one at a time: n x n numbers
        (q[:, head].float() @ k[:, head // share].float().mT * scale).tril().abs().max() for head in range(q.shape[1])
    )
    return torch.stack(list(heads))


def observation(model: nn.Module, tokens: torch.Tensor) -> dict:
    """Norms of attention weights and of the gradients they hold now, over all layers, and sizes of one sequence's activations.

    Args:
        model: a language model, after a backward pass.
        tokens: (1, n) integers.

    Returns:
        `gradients` and `weights`: a norm by the parameter's name; `activations`: of q, k, v and z the largest root mean square of
        all layers; `largest_logit`: over layers, heads and tokens, scaled as in the softmax.
    """
    gradients, weights = {}, {}
    for block in model.blocks:
        for name, parameter in block.attention.named_parameters():
            for total, tensor in ((weights, parameter.detach()), (gradients, parameter.grad)):
                total[name] = total.get(name, 0.0) + tensor.float().square().sum()
    largest: dict[str, torch.Tensor] = {}

    def see(q, k, v, z, scale):
        for name, tensor in (("q", q), ("k", k), ("v", v), ("z", z)):
            _keep_larger(largest, name, tensor.float().square().mean().sqrt())
        _keep_larger(largest, "logit", largest_logits(q, k, scale).max())

    watch(model, tokens, see)
    logit = largest.pop("logit")
    return {
        "gradients": {name: _digits(total.sqrt()) for name, total in gradients.items()},
        "weights": {name: _digits(total.sqrt()) for name, total in weights.items()},
        "activations": {name: _digits(size) for name, size in largest.items()},
        "largest_logit": _digits(logit),
    }


def is_finite(seen: dict) -> bool:
    """Whether an observation holds numbers only, which records want."""
    return all(is_finite(value) if isinstance(value, dict) else math.isfinite(value) for value in seen.values())


def _keep_larger(largest: dict, name: str, value: torch.Tensor) -> None:
    largest[name] = value if name not in largest else torch.maximum(largest[name], value)


def _digits(value: torch.Tensor) -> float:
    return float(f"{value.item():.4g}")
