"""What others decode with: multi-head attention over a static cache in plain PyTorch as in gpt-fast, and transformers' `generate`."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .language_model import LanguageModel


class PlainAttention(nn.Module):
    """Multi-head attention that holds its own static cache; nothing of it is from `tucker_ref`.

    Args:
        d_model, n_heads: d and n_H.
        rope_base: of the usual rotary embedding, None without one.
        batch, max_tokens: of the cache.
        dtype: of the cache, from the start: in a wider one it might not fit.
    """

    def __init__(
        self, d_model: int, n_heads: int, rope_base: float | None, batch: int, max_tokens: int, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.n_heads, width = n_heads, d_model // n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.turns = rope_base is not None
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, n_heads, max_tokens, width, dtype=dtype), persistent=False)
        angles = torch.arange(max_tokens, dtype=torch.float64)[:, None] * (rope_base or 1.0) ** -(
            torch.arange(0, width, 2, dtype=torch.float64) / width
        )
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_tokens, width / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def reset_parameters(self, std: float, output_gain: float) -> None:
        """As MultiHeadAttention."""
        nn.init.normal_(self.qkv.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std * output_gain)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x: (b, h, n, width), halves paired.  positions: (n,)."""
        (a, b), cos, sin = x.chunk(2, dim=-1), self.cos[positions], self.sin[positions]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: torch.Tensor, *, mask, positions, **_ignored) -> torch.Tensor:
        """x: (b, n, d).  mask: (n, max_tokens).  positions: (n,), which are places too.  Returns: (b, n, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, n, width) each
        if self.turns:
            q, k = self.turned(q, positions), self.turned(k, positions)
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        z = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        return self.o_proj(z.transpose(1, 2).flatten(2))

    @staticmethod
    @torch.no_grad()
    def share(plain: LanguageModel, ours: LanguageModel) -> None:
        """Give the model with MultiHeadAttention the weights of the one with PlainAttention."""
        state = {}
        for name, value in plain.state_dict().items():
            if name.endswith("qkv.weight"):
                state |= {name.replace("qkv", f"{one}_proj"): part for one, part in zip("qkv", value.chunk(3))}
            else:
                state[name] = value
        ours.load_state_dict(state)


class PlainDecoder:
    """A model of PlainAttention, a step of which is one compiled function.

    Args:
        model: with caches of its own.
        compiled: by torch.compile(mode="reduce-overhead"), which makes CUDA graphs by itself.
    """

    beforehand = 0

    def __init__(self, model: LanguageModel, compiled: bool):
        self.model, cache = model, model.blocks[0].attention.k_cache
        self.place = torch.zeros(1, dtype=torch.long, device=cache.device)
        self.tokens = torch.zeros(len(cache), 1, dtype=torch.long, device=cache.device)
        self.logits = torch.empty(0)

        def called(tokens: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask = torch.arange(cache.shape[2], device=place.device) <= place[:, None]
            logits = model(tokens, mask=mask, positions=place)[:, -1]
            return logits, logits.argmax(dim=-1, keepdim=True)

        self.called = torch.compile(called, mode="reduce-overhead", fullgraph=True, dynamic=False) if compiled else called

    def streams(self) -> Iterator[torch.Tensor]:
        """All that is cached."""
        for block in self.model.blocks:
            yield from (block.attention.k_cache, block.attention.v_cache)

    def capture(self) -> None:
        """Nothing: the compiler does, in the first calls."""

    def rewind(self, place: int) -> None:
        """Go on from there."""
        self.place.fill_(place)

    @torch.no_grad()
    def step(self) -> None:
        """One token of every sequence."""
        self.logits, chosen = self.called(self.tokens, self.place)
        self.tokens.copy_(chosen)
        self.place += 1

    def write(self, steps: int) -> None:
        """So many of them."""
        for _ in range(steps):
            self.step()


class TransformersDecoder:
    """`generate` of transformers, greedy, with its static cache, which holds all but the last token of the prompt.

    Args:
        setting: its `shape` (d_model, n_heads, n_layers, rope_base), `batch` and `context`.
        vocab_size: of the model.
        dtype, device: of the model.
    """

    beforehand = 1  # the first token of a call is not made by what it compiles

    def __init__(self, setting, vocab_size: int, dtype: torch.dtype, device: str):
        import transformers

        shape = setting.shape
        sizes = dict(vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        config: transformers.PretrainedConfig
        if shape.rope_base is None:
            config = transformers.GPT2Config(
                n_positions=setting.context, n_embd=shape.d_model, n_layer=shape.n_layers, n_head=shape.n_heads, **sizes
            )
        else:
            config = transformers.LlamaConfig(
                hidden_size=shape.d_model, intermediate_size=4 * shape.d_model, num_hidden_layers=shape.n_layers,
                num_attention_heads=shape.n_heads, max_position_embeddings=setting.context, tie_word_embeddings=True, **sizes,
            )  # fmt: skip
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
        self.cache = transformers.StaticCache(config=config, max_cache_len=setting.context)
        width = shape.d_model // shape.n_heads
        self.cache.early_initialization(setting.batch, shape.n_heads, width, dtype, torch.device(device))
        self.tokens = torch.zeros(setting.batch, setting.context, dtype=torch.long, device=device)
        self.place = 0

    def streams(self) -> Iterator[torch.Tensor]:
        """All that is cached."""
        for layer in self.cache.layers:
            yield from (layer.keys, layer.values)

    def capture(self) -> None:
        """Nothing: `generate` compiles by itself, in its first call."""

    def rewind(self, place: int) -> None:
        """Go on from there."""
        self.place = place
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(place - 1)

    @torch.no_grad()
    def write(self, steps: int) -> None:
        """So many tokens of every sequence after the place."""
        prompt = self.tokens[:, : self.place]
        options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, past_key_values=self.cache)
        self.model.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, **options)
