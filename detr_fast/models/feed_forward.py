"""The feed-forward network of a transformer's layer (Vaswani et al. 2017, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops import relu_dropout
from detr_fast.ops.dropout import Dropout

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def activation_of(name: str) -> Activation:
    """The function of a name in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def linear_layers(d_model: int, dim_feedforward: int, activation: str) -> tuple[nn.Linear, nn.Linear]:
    """The layers before and after an activation; "glu" gates one half of the first one's result with the other."""
    inner = dim_feedforward // 2 if activation == "glu" else dim_feedforward
    return nn.Linear(d_model, dim_feedforward), nn.Linear(inner, d_model)


def feed_forward(
    x: Tensor, linear1: nn.Linear, linear2: nn.Linear, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))``.

    Args:
        x: [..., D].
        linear1, linear2: see ``linear_layers``.
        activation: of linear1's result.
        dropout: probability of dropping a number between the layers; 0 outside of training. With ReLU the mask is
            ``detr_fast.ops.dropout``'s of a fresh seed, and is not stored.

    Returns:
        [..., D].
    """
    # As a matrix the product of the first layer is no view of another tensor, so that it can be written over: memory
    # taken anew for the activation costs a CPU a tenth of the network's time. oneDNN's fused epilogue gains no more
    # than this, and packed weights 4 to 7 percent, for which a second copy of them would have to be kept.
    hidden = linear1(x.flatten(0, -2))
    if activation is F.relu:
        drawn = Dropout.draw(dropout, x.device) if dropout > 0 else None
        hidden = relu_dropout(hidden, drawn, overwrite=True)
    else:
        hidden = F.dropout(activation(hidden), dropout, dropout > 0)
    return linear2(hidden).view(*x.shape[:-1], linear2.out_features)
