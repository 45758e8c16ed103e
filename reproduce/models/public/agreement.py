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
    """A model that is another one with its layers put back; hidden: by how much its last hidden state differs."""

    def __init__(self, hidden: float, message: str):
        super().__init__(message)
        self.hidden = hidden


@torch.no_grad()
def compare(opened: OpenModel, inputs: torch.Tensor) -> Agreement:
    """How far a model differs from itself with its layers put back. It is left as it was.

    Args:
        opened: the model.
        inputs: as its `logits` takes them: tokens (b, n), or images (b, channels, side, side) in [-1, 1].

    Raises:
        Differs: with the number and the first layer that differs, where it is another model.
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
            expected = opened.hidden(opened.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
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
        )
    return Agreement(hidden, max(errors.values()))


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
