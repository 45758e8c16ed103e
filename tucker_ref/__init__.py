"""Tucker Attention, the reference implementation: one ladder, read top to bottom.

One letter per dimension, in einsum strings, shape comments and docs alike:

    b batch   n query token   m source token   d model width   h head   g key/value group   c head of a group   k head width
    pre-softmax ranks   r head   s query   t key
    post-softmax ranks  u head   o output  v value

Each file is read from its top. A first reading may skip what rungs import from beside them: `checks` (errors in words), `backends`
(kernels by name), `cached_attention` (what the mechanisms do alike), `initialisation`, `recompute`, `no_gradient`, `one_thread`.
"""

# 1  unfold a tensor, multiply along a mode, count ranks (NumPy)
from .tensor_algebra import fold, mode_product, mode_product_einsum, multilinear_rank, unfold

# 2  the Tucker decomposition and three ways to compute it (NumPy)
from .decomposition import TuckerTensor, hooi, hosvd, multi_mode_product, sthosvd, tail_energies

# 3  attention as two third-order tensors: the specification (NumPy)
from .attention_tensors import multi_head_attention, post_softmax_tensor, pre_softmax_tensor, tensor_attention

# 4  softmax(Q K^T * scale + mask) V, one function, backends by name (PyTorch)
from .attend import attend

# 5  rotary position embedding, one frequency per channel pair (PyTorch)
from .rotary import Rotary
from .rope_frequencies import Llama3Scaling

# 6  what each mechanism keeps per token while it generates (PyTorch)
from .cache import Cache

# 7-10  the four mechanisms, one call signature; the last as six lines first, in tucker_naive (PyTorch)
from .mha import MultiHeadAttention
from .gqa import GroupedQueryAttention
from .mla import MultiHeadLatentAttention
from .tucker import TuckerAttention
from .tucker_weights import TuckerWeights
from .norms import LatentNorm

# 11  the theorems as code: every mechanism is a Tucker Attention
from .special_cases import as_tucker

# 12  the ranks that trained layers have, and trained layers compressed to Tucker, GQA and MLA: compression/
from .compression.moments import second_moment
from .compression.spectra import Spectra, energy_rank, entropy_rank, spectra
from .compression.ranks import choose_ranks
from .compression.compress import compress, relative_errors
from .compression.convert import to_gqa, to_mla

# 13  parameters, cache and arithmetic of each mechanism
from .costs import Cost, gqa_cost, mha_cost, mla_cost, tucker_cost

__version__ = "0.1.0"

__all__ = [
    "unfold", "fold", "mode_product", "mode_product_einsum", "multilinear_rank",
    "TuckerTensor", "multi_mode_product", "hosvd", "sthosvd", "hooi", "tail_energies",
    "pre_softmax_tensor", "post_softmax_tensor", "tensor_attention", "multi_head_attention",
    "attend", "Rotary", "Llama3Scaling", "Cache",
    "MultiHeadAttention", "GroupedQueryAttention", "MultiHeadLatentAttention", "TuckerAttention",
    "TuckerWeights", "LatentNorm",
    "as_tucker",
    "spectra", "Spectra", "entropy_rank", "energy_rank", "second_moment",
    "choose_ranks", "compress", "relative_errors", "to_gqa", "to_mla",
    "Cost", "mha_cost", "gqa_cost", "mla_cost", "tucker_cost",
]  # fmt: skip
