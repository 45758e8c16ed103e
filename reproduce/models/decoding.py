"""Decoding: one token of every sequence a step, each step the same work on the same memory, and on a GPU one CUDA graph."""

import importlib.util
from collections.abc import Callable, Iterator

import torch

from tucker_ref import Cache
from tucker_ref.held import Held
from tucker_ref.static_cache import StaticCache

from .language_model import LanguageModel


class Decoder:
    """A model that goes on from what its caches hold; weights must not change meanwhile.

    Attributes:
        tokens: (b, 1), what the next step reads.
        logits: (b, vocab), what the last step gave; a step writes them anew.
        place: (1,), where the next token is stored.

    Args:
        model: whose layers they are of.
        caches: one per block, with room for all that is to come; only the decoder may write them from now on.
        padding: (b,), how many of the first places are hidden in each sequence; positions count from the next one.
        backend: how the layers attend; by default what is fastest on the device.
        greedy: each step chooses the likeliest token as what the next one reads.
    """

    logits: torch.Tensor
    beforehand = 0  # tokens that a call of `write` makes otherwise than the rest

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        caches: list[Cache],
        padding: torch.Tensor | None = None,
        *,
        backend: str | None = None,
        greedy: bool = False,
    ):
        weight = model.token_embedding.weight
        self.model, self.padding, self.greedy = model, padding, greedy
        self.backend = fastest(str(weight.device)) if backend is None else backend
        self.place = torch.tensor([caches[0].length], device=weight.device)
        self.caches = [StaticCache(cache, self.place) for cache in caches]
        self.tokens = torch.zeros(caches[0].batch, 1, dtype=torch.long, device=weight.device)
        self.held = Held(model, caches[0].max_tokens, weight.dtype)
        self.step: Callable[[], None] = self._step

    def capture(self) -> None:
        """Make `step` a CUDA graph, on a GPU; there must be room for one token."""
        place, tokens = self.place.clone(), self.tokens.clone()
        self.step = captured(self._step, str(self.place.device))
        self.place.copy_(place)  # it was tried once
        self.tokens.copy_(tokens)

    def streams(self) -> Iterator[torch.Tensor]:
        """All that is cached."""
        for cache in self.caches:
            yield from cache.streams.values()

    def rewind(self, place: int) -> None:
        """Go on from there."""
        self.place.fill_(place)

    def write(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.step()

    @torch.no_grad()
    def _step(self) -> None:
        seen, positions = self.caches[0].seen(), self.place  # (1, m), (1,)
        if self.padding is not None:
            hidden = self.padding[:, None]  # (b, 1)
            seen = seen & (torch.arange(seen.shape[1], device=seen.device) >= hidden)  # (b, m)
            positions = self.place - hidden  # (b, 1)
        options = dict(mask=seen[:, None, None], positions=positions, caches=self.caches, backend=self.backend)
        with self.held:
            self.logits = self.model(self.tokens, **options)[:, -1]
        if self.greedy:
            self.tokens.copy_(self.logits.argmax(dim=-1, keepdim=True))
        self.place += 1


def fastest(device: str) -> str:
    """The backend that decodes fastest there.

    Args:
        device: as torch names it.
    """
    return "triton" if device.startswith("cuda") and importlib.util.find_spec("triton") else "sdpa"


def captured(step: Callable, device: str) -> Callable:
    """The step as a CUDA graph, so that launches cost nothing; the step itself on a CPU.

    Args:
        step: the same work on the same memory at each call. On a GPU it is called once before it is captured.
        device: as torch names it.
    """
    if not device.startswith("cuda"):
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once outside, where capture wants it: workspaces and compilations
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
