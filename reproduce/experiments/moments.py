"""Second moments of what each attention layer of a model receives on some inputs."""

import torch
from torch import nn

from tucker_ref import second_moment

from ..models.public.opened import OpenModel


def moments(opened: OpenModel, layers: dict[str, nn.Module], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Second moments of what each attention layer receives.

    Args:
        opened, layers, batches: as in `received`.

    Returns:
        Per place the second moment of the inputs, (D, D).
    """
    return {place: second_moment(layers[place], x) for place, x in received(opened, layers, batches).items()}


@torch.no_grad()
def received(opened: OpenModel, layers: dict[str, nn.Module], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each attention layer receives.

    Args:
        opened: the model, which is run on the batches.
        layers: its attention by place.
        batches: inputs as the model takes them.

    Returns:
        Per place (tokens, d).
    """
    found: dict[str, list[torch.Tensor]] = {place: [] for place in layers}

    def keeper(place: str):
        def keep(_module, arguments, keywords):
            found[place].append((arguments[0] if arguments else keywords["hidden_states"]).flatten(0, 1))

        return keep

    hooks = [opened.model.get_submodule(place).register_forward_pre_hook(keeper(place), with_kwargs=True) for place in layers]
    for batch in batches:
        batch = batch.to(next(opened.model.parameters()).device)
        body = getattr(opened.model, "base_model", None) if opened.takes_text else None
        body(batch) if body else opened.logits(opened.model, batch)  # logits of a large vocabulary take longer than all layers
    for hook in hooks:
        hook.remove()
    return {place: torch.cat(x) for place, x in found.items()}
