"""What GPT-2 and Llama share: a token embedding that is also the output matrix, blocks, a final norm, and caches."""

import torch
import torch.nn.functional as F
from torch import nn

from tucker_ref import Cache


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, and the embedding once more as the output matrix.

    Args:
        vocab_size: entries of the tokenizer.
        d_model: d.
        blocks: of width d.
        final_norm: before the output.
        context: the longest sequence that has positions, None if there is no such limit.
    """

    def __init__(
        self, vocab_size: int, d_model: int, blocks: list[nn.Module], final_norm: nn.Module, context: int | None = None
    ):
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.output_loss = output_loss
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def compile_parts(self, **options) -> None:
        """torch.compile where it pays: one compilation that all blocks share, and one of the output.

        That takes seconds, where the model as one graph takes a minute, and the logits are then never stored in float32.

        Args:
            options: as torch.compile takes them.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, **options)
        self.output_loss = torch.compile(output_loss, **options)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the first block reads.

        Args:
            tokens: (b, n) integers.
            positions: (n,) or (b, n), for models that learn a vector for each.

        Returns:
            (b, n, d).
        """
        return self.token_embedding(tokens)

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        caches: list[Cache] | None = None,
        backend: str = "sdpa",
    ) -> torch.Tensor:
        """What the output matrix reads.

        Args:
            tokens: (b, n) integers.
            mask, positions, backend: as the attention layers take them.
            caches: one per block, as `new_caches` makes them; the tokens follow those that are cached.

        Returns:
            (b, n, d), normalised.
        """
        start = caches[0].length if caches else 0
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device) if positions is None else positions
        x = self.embed(tokens, places)  # (b, n, d)
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=positions, cache=caches[i] if caches else None, backend=backend)
        return self.final_norm(x)

    def forward(self, tokens: torch.Tensor, **options) -> torch.Tensor:
        """Logits (b, n, vocab_size).

        Args:
            tokens, options: as in `hidden`.
        """
        return F.linear(self.hidden(tokens, **options), self.token_embedding.weight)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of predicting each token from those before it, in nats.

        Args:
            windows: (b, n + 1) integers.

        Returns:
            A scalar.
        """
        return self.output_loss(self.hidden(windows[:, :-1]), self.token_embedding.weight, windows[:, 1:])

    def new_caches(self, batch: int, max_tokens: int) -> list[Cache]:
        """One empty cache per block.

        Args:
            batch: b, sequences.
            max_tokens: the most that each will hold.
        """
        return [block.attention.new_cache(batch, max_tokens) for block in self.blocks]


def output_loss(hidden: torch.Tensor, output_matrix: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, taken in float32.

    Args:
        hidden: (b, n, d).
        output_matrix: (vocab, d).
        targets: (b, n) integers.

    Returns:
        A scalar.
    """
    return cross_entropy(F.linear(hidden, output_matrix), targets)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same of logits that are there already.  logits: (b, n, vocab).  targets: (b, n) integers."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
