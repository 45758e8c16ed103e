"""Rung 12c. What is known of a layer's inputs: their second moment, and its square root (PyTorch).

With a moment M = E[x x^T] = R^T R the norm |R W_h R^T| is the root mean square of the logits x^T W_h y on such inputs. To truncate
R W_h R^T instead of W_h keeps what matters for them instead of what is large in the weights.
"""

import torch

from ..cached_attention import CachedAttention
from ..checks import check_number


def second_moment(layer: CachedAttention, x: torch.Tensor, damping: float = 1e-6) -> torch.Tensor:
    """Mean of x~ x~^T over tokens, where x~ is [x, 1] for a layer with biases; what `compress` and others take as `moment`.

    Args:
        layer: whose inputs they are; only its width and biases count.
        x: (..., d), what the layer receives on typical data.
        damping: added to the diagonal, as a share of its mean, so that directions which the sample lacks still count a little.

    Returns:
        (D, D), float64, where D is d, or d + 1 with biases.

    Raises:
        ValueError: for what is no tensor of real numbers, another width, no tokens, NaN or infinity, or a damping that is not finite and at
            least 0.
    """
    if not isinstance(x, torch.Tensor) or x.is_complex():
        raise ValueError(
            f"x is {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}; it must be a tensor of real numbers"
        )
    if x.ndim == 0 or x.shape[-1] != layer.d_model or x.numel() == 0 or not x.isfinite().all():
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be finite and not empty, with d_model = {layer.d_model} as its last size"
        )
    damping = check_number("damping", damping, 0.0, allowed="finite and at least 0")
    x = x.detach().reshape(-1, layer.d_model).double()
    if getattr(layer, "bias", False):
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    moment = x.T @ x / len(x)
    moment.diagonal().add_(damping * moment.diagonal().mean())
    return moment


def centred(moment: torch.Tensor, mean: torch.Tensor, damping: float = 1e-6) -> torch.Tensor:
    """The moment about the mean. Of keys it is all that counts where nothing turns them: what all keys have in common adds the same
    number to all logits of a query, and the softmax takes it away.

    Args:
        moment: (D, D), from `second_moment`.
        mean: (D,), of the same inputs.
        damping: as in `second_moment`; without it the moment about the mean has no root, since a bias does not vary.

    Returns:
        (D, D), float64.
    """
    about = moment.double() - torch.outer(mean.double(), mean.double())
    about.diagonal().add_(damping * moment.diagonal().mean())
    return about


def root_of(moment: torch.Tensor | None) -> torch.Tensor | None:
    """R with R^T R = moment, upper triangular; None for none.  Raises ValueError for a matrix that has no such root."""
    if moment is None:
        return None
    if not isinstance(moment, torch.Tensor) or moment.ndim != 2 or not moment.is_floating_point():
        raise ValueError("moment is no floating-point matrix; it must come from second_moment")
    if moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moment {tuple(moment.shape)} is not square; it must come from second_moment")
    root, failed = torch.linalg.cholesky_ex(moment.double())
    if failed or not root.isfinite().all():
        raise ValueError(
            f"moment {tuple(moment.shape)} is not positive definite; it must come from second_moment, of inputs that are not all "
            "zeros and, with fewer tokens than channels, with some damping"
        )
    return root.mT
