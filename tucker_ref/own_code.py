"""Beside rungs 4 and 6. Code of one's own for whatever is compiled apart (PyTorch).

torch.compile counts how often a function was compiled, whoever asked, and gives up after eight: without an error, or with
`fullgraph=True` by one. Layers of other sizes are other compilations, and all of them run the same function. So each gets a copy.
"""

import functools
import types
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same as a function whose code is no other's.

    Args:
        function: whatever can be called.
    """

    def called(*arguments, **options):
        return function(*arguments, **options)

    copied = types.FunctionType(called.__code__.replace(), called.__globals__, closure=called.__closure__)
    return functools.update_wrapper(copied, function)


class OwnCall:
    """`__call__` of a layer: that of nn.Module, by a function of each layer's own.

    torch.compile takes it from the layer that it is given. For a layer inside a model it asks the layer's class, so there all layers of
    one size still share one compilation.
    """

    def __init__(self) -> None:
        self.calls: MutableMapping[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def __get__(self, layer: nn.Module | None, kind: type) -> Callable[..., Any]:
        if layer is None:
            return nn.Module.__call__
        if layer not in self.calls:
            self.calls[layer] = with_own_code(_call)
        return types.MethodType(self.calls[layer], layer)


class CompiledApart(nn.Module):
    """A module that torch.compile does not count together with others of its class."""

    __call__ = OwnCall()

    def compile(self, *arguments, **options) -> None:
        """As nn.Module.compile: whoever calls the module from now on calls what is compiled.

        Args:
            arguments, options: as torch.compile takes them.
        """
        self._compiled_call_impl = torch.compile(with_own_code(self._call_impl), *arguments, **options)


def _call(layer, *arguments, **options):
    return nn.Module.__call__(layer, *arguments, **options)
