"""The original DETR as a whole, re-created from its description: a contestant and nothing else.

A ResNet in PyTorch's default layout whose frozen batch norms pass over every map, positions computed for every cell,
``OriginalTransformer``, and heads on all layers. Parameters have the original's names, which are also ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original_transformer import OriginalTransformer

# Blocks of each stage.
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class FrozenNorm(nn.Module):
    """Batch norm of fixed statistics: a product and a sum over the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Block(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    def __init__(self, channels: int, planes: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), FrozenNorm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenNorm(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), FrozenNorm(4 * planes)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * planes, 1, stride, bias=False), FrozenNorm(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """The convolutional part; the stem and the first stage are not trained. ``dilation``: of the last stage (DC5)."""

    def __init__(self, name: str = "resnet50", dilation: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), FrozenNorm(64)
        channels = 64
        for number, blocks in enumerate(DEPTHS[name], start=1):
            planes, dilated = 32 << number, dilation and number == 4
            stride, rest = (1, 2) if dilated else (1 if number == 1 else 2, 1)
            stage = [Block(channels, planes, stride, 1)]
            stage += [Block(4 * planes, planes, 1, rest) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            channels = 4 * planes
        for part in (self.conv1, self.get_submodule("layer1")):
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 2048, h, w]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, 1)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x


class Backbone(nn.Module):
    """Holds the ResNet under its name."""

    def __init__(self, name: str, dilation: bool) -> None:
        super().__init__()
        self.body = ResNet(name, dilation)


def sine_positions(padding: Tensor, channels: int) -> Tensor:
    """[B, h, w] padding to the positions [B, channels, h, w]: rows, then columns, counted over valid cells."""

    def waves(count: Tensor, last: Tensor) -> Tensor:
        number = torch.arange(channels // 2, dtype=torch.float32, device=padding.device)
        period = 10000 ** (2 * torch.div(number, 2, rounding_mode="floor") / (channels // 2))
        angle = (count / (last + 1e-6) * 2 * math.pi)[..., None] / period
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3)

    valid = ~padding
    rows, columns = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    return torch.cat((waves(rows, rows[:, -1:]), waves(columns, columns[:, :, -1:])), dim=3).permute(0, 3, 1, 2)


class BoxHead(nn.Module):
    """Three linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(F.relu(second(F.relu(first(x)))))


class OriginalDetr(nn.Module):
    """Images and their padding to the predictions of every decoder layer; ``need_weights``: OriginalTransformer's."""

    def __init__(
        self,
        num_classes: int = 91,
        num_queries: int = 100,
        dropout: float = 0.1,
        *,
        backbone: str = "resnet50",
        dilation: bool = False,
        need_weights: bool = True,
    ) -> None:
        super().__init__()
        self.transformer = OriginalTransformer(dropout=dropout, need_weights=need_weights)
        self.class_embed, self.bbox_embed = nn.Linear(256, num_classes + 1), BoxHead(256)
        self.query_embed = nn.Embedding(num_queries, 256)
        self.input_proj = nn.Conv2d(2048, 256, 1)
        self.backbone = nn.ModuleList([Backbone(backbone, dilation)])

    def forward(self, images: Tensor, padding: Tensor) -> list[dict[str, Tensor]]:
        """[B, 3, H, W] images and [B, H, W] padding to the layers' predictions, the last layer's last."""
        features = self.backbone[0].body(images)
        cells = F.interpolate(padding[None].float(), size=features.shape[-2:])[0].bool()
        positions = sine_positions(cells, 256)
        hs, _ = self.transformer(self.input_proj(features), cells, self.query_embed.weight, positions)
        logits, boxes = self.class_embed(hs), self.bbox_embed(hs).sigmoid()
        return [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]


@torch.no_grad()
def calibrate(model: OriginalDetr, images: Tensor) -> None:
    """Give the frozen norms the statistics of these images.

    Without them the maps of random weights grow from block to block until every attention is one-hot, and the gradients
    are denormal numbers, which cost a processor ten times as much as others.
    """

    def observe(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean, norm.running_var = mean, variance

    norms = [module for module in model.modules() if isinstance(module, FrozenNorm)]
    handles = [norm.register_forward_pre_hook(observe) for norm in norms]
    model.backbone[0].body(images)
    for handle in handles:
        handle.remove()


def optimizer_of(model: nn.Module, lr: float, lr_backbone: float) -> torch.optim.AdamW:
    """AdamW as PyTorch makes it, with the backbone's own learning rate."""

    def chosen(backbone: bool) -> Iterable[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and ("backbone" in name) is backbone]

    groups = [{"params": chosen(False)}, {"params": chosen(True), "lr": lr_backbone}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
