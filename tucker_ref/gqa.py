"""Rung 8. Grouped-query attention (Ainslie et al. 2023): heads in a group share one key and one value (PyTorch).

Multi-query attention (Shazeer 2019) is the case of a single group, n_kv_heads = 1.
"""

from torch import nn

from .checks import check_groups
from .mha import MultiHeadAttention
from .norms import QKNorm
from .rotary import Rotary


class GroupedQueryAttention(MultiHeadAttention):
    """Multi-head attention with a narrower k_proj and v_proj; head h reads group h // (n_heads // n_kv_heads).

    Nothing in the forward pass changes: `attend` hands each key/value head to its group.

    Args:
        d_model: d.
        n_heads: n_H.
        n_kv_heads: n_KV, a divisor of n_H.
        head_dim, bias, rotary, qk_norm: as in MultiHeadAttention.

    Raises:
        ValueError: as MultiHeadAttention does, and if n_kv_heads does not divide n_heads.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool | str = False,
        rotary: Rotary | None = None,
        qk_norm: str | None = None,
    ):
        super().__init__(d_model, n_heads, head_dim=head_dim, bias=bias, rotary=rotary, qk_norm=qk_norm)
        self.n_kv_heads = n_kv_heads = check_groups(n_kv_heads, self.n_heads)
        self.k_proj = nn.Linear(self.d_model, n_kv_heads * self.head_dim, bias=bool(bias))
        self.v_proj = nn.Linear(self.d_model, n_kv_heads * self.head_dim, bias=bool(bias))
        self.k_norm = QKNorm.of(qk_norm, self.head_dim, n_kv_heads)
        self.reset_parameters()
