"""Generate text with caches: greedy, by temperature, or from the likeliest tokens that hold a share top_p of the probability."""

from collections.abc import Iterator

import torch

from ..store.checked import check_memory
from .decoding import Decoder
from .language_model import LanguageModel
from .sizes import count_cached


def next_token(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: (b, vocab).
        temperature: divides the logits; 0, or what float32 rounds to it, takes the likeliest token.
        top_p: where it is below 1, the fewest likeliest tokens are kept whose probabilities reach it together (Holtzman et al.
            2020), the likeliest one always.
        generator: of the random choice, on the logits' device.

    Returns:
        (b,).
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits.float()
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)  # no overflow when cold
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
    ordered = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)  # the likeliest one stays, however small top_p is
    choice = torch.multinomial(ordered, 1, generator=generator)  # (b, 1)
    return order.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every prompt.

    Shorter prompts are padded on the left: a mask hides the padding, and positions count from each prompt's first token.

    Args:
        model: a trained language model.
        prompts: token numbers, at least one each; prompts may differ in length.
        max_new_tokens: how many are added to each prompt.
        temperature: at least 0, as in `next_token`.
        top_p: in (0, 1], as there.
        seed: of the random choices.

    Yields:
        (b,), one token per prompt.

    Raises:
        ValueError: for an empty prompt, another temperature or top_p, or more tokens than the model has positions for, or this
            machine memory.
        FloatingPointError: where the logits are not finite.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; generation needs at least one token to continue")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    longest = max(map(len, prompts))
    total = longest + max_new_tokens
    if model.context is not None and total > model.context:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones are {total}; this model has positions for {model.context}"
        )
    cached = 4 * len(prompts) * total * count_cached(block.attention for block in model.blocks)  # bytes, in float32
    check_memory(cached, f"caching {len(prompts)} x {total:,} tokens")
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)  # (b,)
    tokens = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts], device=device)  # (b, n)
    places = torch.arange(longest, device=device) - padding[:, None]  # (b, n), negative in the padding
    seen, places = (places >= 0)[:, None, None], places.clamp(min=0)  # (b, 1, 1, n)
    padded = bool(padding.any())
    caches = model.new_caches(len(prompts), total)
    logits = model(tokens, caches=caches, **(dict(mask=seen, positions=places) if padded else {}))[:, -1]  # (b, vocab)
    decoder = Decoder(model, caches, padding if padded else None)
    if max_new_tokens > 1:
        decoder.capture()
    for end in range(longest, total):
        if end > longest:
            decoder.step()
            logits = decoder.logits
        if not logits.isfinite().all():
            raise FloatingPointError(f"the model's logits hold NaN or infinity after {end} tokens; are its weights finite?")
        chosen = next_token(logits, temperature, top_p, generator)
        decoder.tokens.copy_(chosen[:, None])
        yield chosen
