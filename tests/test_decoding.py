"""The decoding loop: the tokens that a growing cache gives, any backend, one compilation for all blocks and steps."""

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error
from test_generation import EVERY, MODELS, VOCABULARY, model_of

from reproduce.models import decoding
from reproduce.models.decoding import Decoder
from reproduce.models.generation import generate, next_token


def continued(model, prompts, steps, seed, temperature=3.0):
    """As `generate` was before: a cache that grows, and cores mixed at every step."""
    generator, longest = torch.Generator().manual_seed(seed), max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts])
    tokens = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts])
    places = torch.arange(longest + steps) - padding[:, None]
    seen, places = (places >= 0)[:, None, None], places.clamp(min=0)
    caches, start, chosen = model.new_caches(len(prompts), longest + steps), 0, []
    for _ in range(steps):
        end = start + tokens.shape[1]
        options = dict(mask=seen[..., :end], positions=places[:, start:end]) if padding.any() else {}
        chosen.append(next_token(model(tokens, caches=caches, **options)[:, -1], temperature, 1.0, generator))
        tokens, start = chosen[-1][:, None], end
    return torch.stack(chosen)


@EVERY
@torch.no_grad()
def test_the_same_tokens_as_with_a_cache_that_grows(name):
    model = model_of(name)
    for prompts in ([[3, 1, 4, 1], [6, 5]], [[3, 1, 4]]):
        written = torch.stack(list(generate(model, prompts, 10, temperature=3.0, seed=1)))
        assert torch.equal(written, continued(model, prompts, 10, 1))
        assert not torch.equal(written, continued(model, prompts, 10, 2))  # control: the choices are random
    assert list(generate(model, prompts, 0)) == [] and len(list(generate(model, prompts, 1))) == 1


@EVERY
@torch.no_grad()
def test_each_step_gives_the_logits_of_all_tokens_at_once_and_chooses(name):
    model, tokens = model_of(name), torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    caches = model.new_caches(2, 12)
    model(tokens[:, :-1], caches=caches)
    decoder, written = Decoder(model, caches, greedy=True), tokens
    decoder.capture()
    decoder.tokens.copy_(tokens[:, -1:])
    for _ in range(2):
        decoder.write(1)
        assert relative_error(decoder.logits, model(written)[:, -1]) < EXACT
        written = torch.cat([written, decoder.tokens], dim=1)
    assert torch.equal(decoder.tokens[:, 0], model(written[:, :-1])[:, -1].argmax(-1))
    decoder.rewind(5)
    decoder.tokens.copy_(tokens[:, -1:])
    decoder.step()
    assert relative_error(decoder.logits, model(tokens)[:, -1]) < EXACT
    decoder.rewind(4)  # control
    decoder.step()
    assert relative_error(decoder.logits, model(tokens)[:, -1]) > DIFFERENT
    assert sum(1 for _ in decoder.streams()) == sum(len(cache.streams) for cache in caches)


@pytest.mark.parametrize("name", ["gpt2 Tucker [8,64,64]", "llama Tucker [32,64,64]", "llama MLA shared d_c=128"])
@torch.no_grad()
def test_all_blocks_and_steps_share_one_compilation(name):
    model, tokens, graphs = model_of(name), torch.randint(0, VOCABULARY, (2, 6)), []
    expected = model(tokens)

    def counted(graph, _examples):
        graphs.append(graph)
        return graph.forward

    model.compile_parts(dynamic=False, backend=counted)
    decoder, logits = Decoder(model, model.new_caches(2, 8)), []
    for n in range(6):
        decoder.tokens.copy_(tokens[:, n : n + 1])
        decoder.step()
        logits.append(decoder.logits)
    assert relative_error(torch.stack(logits, dim=1), expected) < EXACT and len(graphs) == 1
    model(tokens)  # control: other steps are other code
    assert len(graphs) > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
@torch.no_grad()
def test_our_kernel_decodes_padded_prompts():
    pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")
    assert "llama Tucker [32,64,64]" in MODELS and decoding.fastest("cpu") == "sdpa"
    model = model_of("llama Tucker [32,64,64]").float()
    padding, seen = torch.tensor([0, 3]), torch.arange(7) >= torch.tensor([[0], [3]])
    places, found = (torch.arange(7) - padding[:, None]).clamp(min=0), []
    tokens = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    for backend, hidden in (("sdpa", padding), ("triton", padding), ("triton", None)):
        caches = model.new_caches(2, 9)
        model(tokens, caches=caches, mask=seen[:, None, None], positions=places)
        decoder = Decoder(model, caches, hidden, backend=backend)
        decoder.step()
        found.append(decoder.logits)
    assert relative_error(found[1], found[0]) < 1e-4
    assert relative_error(found[2], found[0]) > DIFFERENT  # control: the padding is seen
