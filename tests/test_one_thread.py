"""A cache belongs to one sequence of calls: while a thread is inside, another is refused, and nothing that was stored is lost."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens
from test_cache import CASES, layer_of

from tucker_ref import Cache, cache
from tucker_ref.one_thread import OneThread
from tucker_ref.static_cache import StaticCache

REFUSED = "another thread is inside a call with this cache.* a cache of its own with new_cache"


class Anybody(OneThread):
    """Lets everybody in, the control."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def elsewhere(call):
    """What this call gives in another thread, its result or its error."""
    found: list = []

    def work():
        try:
            found.append(call())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the other thread waits, where it should have been refused"
    return found[0]


def refused(found) -> bool:
    return isinstance(found, RuntimeError) and "another thread is inside a call with this cache" in str(found)


def once(function, meanwhile):
    """The same function, in whose first call another thread does something else."""
    calls: list = []

    def called(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            meanwhile()
        return function(*arguments, **options)

    return called


def key(n: int, seed: int) -> torch.Tensor:
    return tokens(1, n, 2, seed).unsqueeze(1)  # (b, 1, n, 2)


def made() -> Cache:
    return Cache({"key": (1, 2)}, 1, 4, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control"])
def test_no_token_is_lost_where_two_threads_store(guarded, monkeypatch):
    stored, met = made(), []
    stored.one_thread = stored.one_thread if guarded else Anybody()
    second = lambda: stored.append(key=key(1, 2))[0].clone()  # noqa: E731
    monkeypatch.setattr(cache, "check_new_tokens", once(cache.check_new_tokens, lambda: met.append(elsewhere(second))))
    stored.append(key=key(1, 1))
    if guarded:
        assert refused(met[0]) and stored.length == 1
        assert torch.equal(elsewhere(second), torch.cat([key(1, 1), key(1, 2)], dim=2))  # now that nobody is inside
    else:  # both were told that their token is stored, and one of them is
        assert torch.equal(met[0], key(1, 2)) and stored.length == 1
        assert torch.equal(stored.streams["key"][:, :, :1], key(1, 2))


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_nobody_else_comes_in_while_a_layer_is_inside(name, guarded, monkeypatch):
    layer, x, other = layer_of(name), tokens(2, 6, 24), tokens(2, 3, 24, seed=7)
    stored, met = layer.new_cache(2, 9), []
    layer(x[:, :4], cache=stored)
    stored.one_thread = stored.one_thread if guarded else Anybody()
    calls = (
        lambda: layer(other, cache=stored),
        lambda: stored.truncate(0),
        lambda: stored.reorder(torch.tensor([1, 0])),
        lambda: StaticCache(stored, torch.tensor([0])).truncate(1),
    )
    module = sys.modules[next(kind.__module__ for kind in type(layer).__mro__ if "forward" in vars(kind))]
    with monkeypatch.context() as patch:
        patch.setattr(module, "attend", once(module.attend, lambda: met.extend(elsewhere(call) for call in calls)))
        y = layer(x[:, 4:5], cache=stored)
    y = torch.cat([y, layer(x[:, 5:], cache=stored)], dim=1)
    error = relative_error(y, layer(x)[:, 4:])
    if guarded:
        assert all(map(refused, met)) and len(met) == 4 and stored.length == 6 and error < EXACT
    else:
        assert not any(map(refused, met)) and stored.length == 1 and error > DIFFERENT


def test_one_thread_goes_as_deep_as_it_likes_and_leaves_the_cache_to_others():
    stored = made()
    with stored.one_thread, stored.one_thread:
        stored.append(key=key(2, 1))
        stored.truncate(1)
        stored.reorder(torch.tensor([0]))
        assert refused(elsewhere(lambda: stored.truncate(0)))
    with pytest.raises(ValueError, match="overflow"):
        stored.append(key=key(4, 1))
    assert elsewhere(lambda: stored.append(key=key(1, 2))[0].shape[2]) == 2  # an error leaves it free as well


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda stored: pickle.loads(pickle.dumps(stored))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_nobody_inside(copied):
    stored = made()
    stored.append(key=key(2, 1))
    with stored.one_thread:
        twin = copied(stored)
        assert elsewhere(lambda: twin.append(key=key(1, 2))[0].shape[2]) == 3
        with pytest.raises(RuntimeError, match=REFUSED):
            raise elsewhere(lambda: copy.copy(stored).truncate(0))  # control: this one has the same memory
    assert stored.length == 2 and torch.equal(stored.streams["key"][:, :, :2], key(2, 1))


def test_a_static_cache_has_its_memory_to_itself():
    stored = made()
    static = StaticCache(stored, torch.tensor([0]))
    with static.one_thread:
        for call in (
            lambda: stored.append(key=key(1, 1)),
            lambda: static.append(key=key(1, 1)),
            lambda: static.truncate(0),
            lambda: static.reorder(torch.tensor([0])),
        ):
            assert refused(elsewhere(call))
    assert not stored.streams["key"].any() and elsewhere(lambda: static.append(key=key(1, 1))[0].shape[2]) == 4


def test_compiled_code_knows_no_locks(monkeypatch):
    stored = made()
    with stored.one_thread:
        assert refused(elsewhere(lambda: stored.truncate(0)))  # control
        monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        assert elsewhere(lambda: stored.truncate(0)) is None
