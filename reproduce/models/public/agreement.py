"""The rule of every opening: with its own layers of `tucker_ref` in their places a model computes what it computed before.

Whatever an attention has that no layer here has, known or unknown, is found by it. Each layer is given what the original one
receives, so that roundings do not add up; then all of them stand in the model together.
"""

import math
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from .opened import OpenModel

HIDDEN = 1e-4  # relative difference of the last hidden state in float32
ROUNDED = 1e-5  # of one layer's output: it is the same layer, and what else differs comes of roundings
FAR = 1e-2  # of one layer's output at the last positions, whose angles transformers has in single precision
FARTHEST = 2**18  # tokens of a text whose end is looked at: behind them that precision hides what differs
LAYER = 1e-3  # of one layer's output: with logits in the hundreds, as some trained layers have, float32 keeps no more
TRUSTED = {"layers": "trusted, not compared"}  # what a record says where the rule was left out


@dataclass(frozen=True)
class Agreement:
    """Relative differences.

    Args:
        hidden: of the last hidden state.
        layer: the largest of one layer's output, given what the original one receives.
    """

    hidden: float
    layer: float


class Differs(ValueError):
    """A model that is another one with its layers put back.

    Args:
        hidden: by how much its last hidden state differs.
        message: which layers do.
        layers_agree: whether each of them, given what the original one receives, does not.
    """

    def __init__(self, hidden: float, message: str, layers_agree: bool):
        super().__init__(message)
        self.hidden, self.layers_agree = hidden, layers_agree


def compare_again(opened: OpenModel, inputs: torch.Tensor) -> Agreement:
    """As `compare`, and where every layer agrees but not the model, once more on the same tokens in the other order.

    A router of experts chooses by the largest score. Where two are as good as equal, a rounding chooses, and one token goes another
    way: that says nothing of the layers. A model with a layer in a wrong place, or an attention that only differs among others, differs
    on any tokens.

    Args:
        opened, inputs: as in `compare`, whose errors are raised here too.
    """
    try:
        return compare(opened, inputs)
    except Differs as error:
        if not (error.layers_agree and opened.takes_text):
            raise
        return compare(opened, inputs.flip(1))


def compare_far(opened: OpenModel, inputs: torch.Tensor) -> None:
    """Each layer once more on the same tokens, at the last positions of the longest text that the model takes.

    What changes with the position alone is nothing to a short text: queries that grow (Llama 4, Ministral 3), frequencies that are
    exchanged. Only layers that turn their queries and keys are told positions, and are looked at.

    Args:
        opened, inputs: as in `compare`.

    Raises:
        Differs: with the position and the layer that differs most.
    """
    if not (opened.takes_text and any(layer.rotary is not None for layer in opened.layers.values())):
        return
    length = inputs.shape[1]
    last = min(opened.context, FARTHEST)
    _, errors = layer_by_layer(opened, inputs, position_ids=torch.arange(last - length, last)[None])
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= FAR:
        raise Differs(
            math.nan,
            f"its attention is not what is known here: from position {last - length:,} on the output of {worst} differs by "
            f"{errors[worst]:.1e} (at most {FAR:.0e}); --trust-layers opens it all the same",
            False,
        )


@torch.no_grad()
def compare(opened: OpenModel, inputs: torch.Tensor) -> Agreement:
    """How far a model differs from itself with its layers put back. It is left as it was.

    Args:
        opened: the model.
        inputs: as its `logits` takes them: tokens (b, n), or images (b, channels, side, side) in [-1, 1].

    Raises:
        Differs: with the number and the first layer that differs, where it is another model.
    """
    expected, errors = layer_by_layer(opened, inputs)
    modules = {place: opened.model.get_submodule(place) for place in opened.layers}
    opened.put(opened.layers)
    try:
        hidden = relative(opened.hidden(opened.model, inputs), expected)
    finally:
        for place, module in modules.items():
            opened.model.set_submodule(place, module)
    if not (hidden <= HIDDEN and all(error <= LAYER for error in errors.values())):
        first = next((place for place, error in errors.items() if not error <= HIDDEN), max(errors, key=errors.__getitem__))
        raise Differs(
            hidden,
            f"its attention is not what is known here: with its own layers put back the last hidden state differs by {hidden:.1e} "
            f"(at most {HIDDEN:.0e}), first at {first}, whose output differs by {errors[first]:.1e}; --trust-layers opens it all "
            "the same",
            all(error <= ROUNDED for error in errors.values()),
        )
    return Agreement(hidden, max(errors.values()))


@torch.no_grad()
def layer_by_layer(opened: OpenModel, inputs: torch.Tensor, **options) -> tuple[torch.Tensor, dict[str, float]]:
    """The last hidden state of the model itself, (b, n, d), and by how much each layer's output differs on what the original receives.

    Args:
        opened, inputs: as in `compare`.
        options: what else the model is told.
    """
    errors = dict.fromkeys(opened.layers, math.nan)  # what is never called is not compared, and agrees with nothing
    with tqdm(total=len(opened.layers), desc=f"comparing the layers of {opened.name}", leave=False, delay=1) as progress:

        def compares(place: str):
            own = opened.wrap(place, opened.layers[place])

            def compared(_module, arguments, keywords, output):
                first = [y[0] if isinstance(y, tuple) else y for y in (own(*arguments, **keywords), output)]
                errors[place] = relative(*first)
                progress.update()

            return compared

        modules = {place: opened.model.get_submodule(place) for place in opened.layers}
        hooks = [module.register_forward_hook(compares(place), with_kwargs=True) for place, module in modules.items()]
        try:
            return opened.hidden(opened.model, inputs, **options), errors
        finally:
            for hook in hooks:
                hook.remove()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|; 0 where they are equal, zeros too.

    Args:
        ours, theirs: of one shape.
    """
    difference = (ours - theirs).norm()
    return 0.0 if difference == 0 else (difference / theirs.norm()).item()


def as_record(agreement: Agreement) -> dict:
    """What a record says of it: two digits of each are enough.

    Args:
        agreement: of one opening.
    """
    return {name: float(f"{value:.2g}") for name, value in asdict(agreement).items()}
