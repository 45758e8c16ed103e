"""What tells one family of transformers' models from another: its model types, its attention classes, how they become layers."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .layers import Turning


@dataclass(frozen=True)
class Family:
    """Models of transformers that keep their attention in one way.

    Args:
        types: model types, as config.json has them.
        head: the Auto class that opens them.
        predicts: as in `OpenModel`.
        attention: names of the modules that are replaced.
        layer_of: (module, its turning) -> layer of `tucker_ref`.
        other_heads: architectures that are opened as what they are called instead.
        without_head: architectures that hold no head, and the class whose last hidden state is looked at.
        bare: what such a class is told beside its configuration.
        unused: weights, as a regular expression, that such a checkpoint may hold beside those of the class that opens it.
        norm_of: what of a module follows its output projection.
        pairing: of channels that turn together, by the configuration.
        needed: options of a configuration that must have this value, and why.
    """

    types: tuple[str, ...]
    head: str
    predicts: str
    attention: tuple[str, ...]
    layer_of: Callable[[nn.Module, Turning | None], nn.Module]
    other_heads: tuple[str, ...] = ()
    without_head: dict[str, str] = field(default_factory=dict)
    bare: dict[str, object] = field(default_factory=dict)
    unused: str = r"(?!)"
    norm_of: Callable[[nn.Module], nn.Module | None] = lambda module: None
    pairing: Callable = lambda config: "half"
    needed: dict[str, tuple[object, str]] = field(default_factory=dict)
