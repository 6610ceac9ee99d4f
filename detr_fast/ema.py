"""A moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelEma:
    """``average = decay * average + (1 - decay) * model`` after every update.

    In the first updates the decay is ``(1 + n) / (10 + n)`` where that is smaller, so that the random start is soon
    forgotten. Counters and other integer buffers are copied. Nothing here waits for the device.

    Attributes:
        model: a copy of the model that holds the averages, in eval mode and without gradients.
        updates: how many updates went in.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model``."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own, new = self.model.state_dict(), model.state_dict()
        floating = [key for key, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[key] for key in floating], [new[key] for key in floating], 1 - decay)
        for key in own.keys() - set(floating):
            own[key].copy_(new[key])
