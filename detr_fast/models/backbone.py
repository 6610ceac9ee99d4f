"""Backbones: an image to a feature map, with torchvision's parameter names so that its weights load as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import ImageBatch
from detr_fast.ops import FrozenConv, residual_block

Norm = Callable[[int], nn.Module]
Layer = tuple[nn.Module, nn.Module]  # a convolution and the norm after it


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change: one multiply and one add per channel."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_load_state_dict_pre_hook(_drop_num_batches_tracked)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Each channel's factor and what is added to it, [C] both."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None] + shift[:, None, None]


def _drop_num_batches_tracked(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    # Weights of an ordinary batch norm carry a counter that a frozen one has no use for.
    state_dict.pop(prefix + "num_batches_tracked", None)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        if dilation != 1:
            raise ValueError(f"only bottleneck ResNets (50, 101) can be dilated, got {dilation=}")
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inplanes, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return _block(x, [(self.conv1, self.bn1), (self.conv2, self.bn2)], self.downsample)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right), the stride in the 3x3."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = _shortcut(inplanes, planes * self.expansion, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        layers = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return _block(x, layers, self.downsample)


def _block(x: Tensor, layers: Sequence[Layer], downsample: nn.Sequential | None) -> Tensor:
    """relu(layers(x) + shortcut(x)), with a ReLU between two layers."""
    frozen = [frozen_conv(*layer) for layer in layers]
    shortcut = None if downsample is None else frozen_conv(downsample[0], downsample[1])
    known = [layer for layer in frozen if layer is not None]
    if len(known) == len(layers) and (downsample is None) == (shortcut is None):
        return residual_block(x, known, shortcut)
    y = x
    for conv, norm in layers[:-1]:
        y = F.relu_(normalised(conv, norm, y))
    y = normalised(*layers[-1], y)
    return F.relu_(y.add_(x if downsample is None else normalised(downsample[0], downsample[1], x)))


def normalised(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm scales the convolution's weight, which is small, and never the map."""
    frozen = frozen_conv(conv, norm)
    return norm(conv(x)) if frozen is None else frozen(x)


def frozen_conv(conv: nn.Module, norm: nn.Module) -> FrozenConv | None:
    """A plain convolution and the frozen norm after it; None where they are something else."""
    if type(conv) is not nn.Conv2d or type(norm) is not FrozenBatchNorm2d:
        return None
    sizes = [set(pair) for pair in (conv.stride, conv.padding, conv.dilation)]
    square = not isinstance(conv.padding, str) and all(len(size) == 1 for size in sizes)
    if conv.bias is not None or conv.padding_mode != "zeros" or conv.groups != 1 or not square:
        return None
    scale, shift = norm.scale_and_shift()
    return FrozenConv(conv.weight, scale, shift, conv.stride[0], int(conv.padding[0]), conv.dilation[0])


def _shortcut(inplanes: int, outplanes: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))


class ResNet(nn.Module):
    """The convolutional part of a ResNet.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        dilation: stride 1 and dilation 2 in the last stage (DC5): a map of twice the resolution.
        norm: makes the normalisation layer of a number of channels.
        width: channels of the stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        dilation: bool = False,
        norm: Norm = FrozenBatchNorm2d,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        planes = [width, 2 * width, 4 * width, 8 * width]
        self.stage_channels = [block.expansion * channels for channels in planes]
        inplanes = [width, *self.stage_channels[:-1]]
        self.layer1 = _stage(block, depths[0], inplanes[0], planes[0], 1, False, norm)
        self.layer2 = _stage(block, depths[1], inplanes[1], planes[1], 2, False, norm)
        self.layer3 = _stage(block, depths[2], inplanes[2], planes[2], 2, False, norm)
        self.layer4 = _stage(block, depths[3], inplanes[3], planes[3], 2, dilation, norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the maps of the four stages, at 1/4, 1/8, 1/16 and 1/32 (dilated: 1/16) of the size."""
        # Convolutions of channels-last maps need no change of layout on either device.
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.relu_(normalised(self.conv1, self.bn1, images))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    depth: int,
    inplanes: int,
    planes: int,
    stride: int,
    dilate: bool,
    norm: Norm,
) -> nn.Sequential:
    first_stride, rest_dilation = (1, stride) if dilate else (stride, 1)
    first = block(inplanes, planes, first_stride, 1, norm)
    rest = [block(planes * block.expansion, planes, 1, rest_dilation, norm) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class Backbone(nn.Module):
    """A ResNet with frozen batch norm; the stem and the first stage are never trained, as in the paper.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        train_backbone: whether stages 2 to 4 are trained.
        return_interm_layers: return the maps of all four stages (the mask head needs them), not of the last alone.
        dilation: dilate the last stage (DC5); bottleneck ResNets only.

    Attributes:
        num_channels: channels of the last map.
    """

    def __init__(self, name: str, train_backbone: bool, return_interm_layers: bool, dilation: bool) -> None:
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, got {name!r}")
        block, depths = RESNETS[name]
        self.body = ResNet(block, depths, dilation=dilation)
        self.num_channels = self.body.stage_channels[-1]
        self.return_interm_layers = return_interm_layers
        for parameter_name, parameter in self.body.named_parameters():
            trained = train_backbone and parameter_name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(trained)

    def forward(self, samples: ImageBatch) -> list[ImageBatch]:
        """The feature maps, each with the mask of its own size, from the largest to the smallest."""
        maps = self.body(samples.tensors)
        return [with_mask(x, samples) for x in (maps if self.return_interm_layers else maps[-1:])]


class FeatureBackbone(nn.Module):
    """Makes a backbone of any module that turns images into one feature map.

    Args:
        body: [B, 3, H, W] to [B, num_channels, h, w].
        num_channels: ``body.num_channels`` where None.
        return_interm_layers: return the four maps of ``body.stages``, from the largest to the smallest.

    Raises:
        ValueError: the number of channels is neither given nor an attribute of ``body``.
    """

    def __init__(self, body: nn.Module, num_channels: int | None = None, *, return_interm_layers: bool = False) -> None:
        super().__init__()
        channels = getattr(body, "num_channels", None) if num_channels is None else num_channels
        if not isinstance(channels, int):
            raise ValueError(
                f"backbone {type(body).__name__} must have an integer attribute num_channels, "
                "the channels of its feature map (or be wrapped in FeatureBackbone(body, num_channels))"
            )
        self.body = body
        self.num_channels = channels
        self.return_interm_layers = return_interm_layers

    def forward(self, samples: ImageBatch) -> list[ImageBatch]:
        """The feature maps, each with the mask of its own size."""
        if self.return_interm_layers:
            stages: list[Tensor] = self.body.stages(samples.tensors)  # type: ignore[operator]
            return [with_mask(x, samples) for x in stages]
        features = self.body(samples.tensors)
        if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != self.num_channels:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the backbone must return one map [B, {self.num_channels}, h, w], got {got}")
        return [with_mask(features, samples)]


class TinyConvNet(nn.Module):
    """A small convolutional network to be trained from scratch: stride 16, ordinary batch norm.

    Args:
        width: channels of the first stage; the map has eight times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, 2 * width, 2, 1, nn.BatchNorm2d)
        self.layer2 = BasicBlock(2 * width, 4 * width, 2, 1, nn.BatchNorm2d)
        self.layer3 = BasicBlock(4 * width, 8 * width, 2, 1, nn.BatchNorm2d)
        self.num_channels = 8 * width
        self.stage_channels = [width, 2 * width, 4 * width, 8 * width]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 8 * width, H / 16, W / 16]."""
        return self.stages(images)[-1]

    def stages(self, images: Tensor) -> list[Tensor]:
        """The maps at 1/2, 1/4, 1/8 and 1/16 of the size."""
        # A training step of the demo takes a seventh less time on a CPU in this layout.
        x = images.contiguous(memory_format=torch.channels_last)
        maps = [F.relu_(self.bn(self.stem(x)))]
        for layer in (self.layer1, self.layer2, self.layer3):
            maps.append(layer(maps[-1]))
        return maps


class Joiner(nn.Sequential):
    """A backbone and a position encoding; keeps the original's parameter names (``backbone.0``, ``backbone.1``).

    Args:
        backbone: ``ImageBatch`` to a list of feature maps with masks; has ``num_channels``.
        position_embedding: a feature map to its encoding [B, D, h, w].
    """

    def __init__(self, backbone: nn.Module, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, samples: ImageBatch) -> tuple[list[ImageBatch], list[Tensor]]:
        """Feature maps and their position encodings, in the maps' dtype."""
        features = self[0](samples)
        return features, [self[1](x).to(x.tensors.dtype) for x in features]


def with_mask(features: Tensor, samples: ImageBatch) -> ImageBatch:
    """Pair [B, C, h, w] features with the mask and the sizes of their images, sampled at the nearest pixel."""
    frame, cells = samples.mask.shape[-2:], features.shape[-2:]
    mask = F.interpolate(samples.mask[None].float(), size=cells)[0].to(torch.bool)
    if samples.padded is False:
        return ImageBatch(features, mask, padded=False)
    # Sizes of padded images differ from batch to batch: a compiled model must not be compiled for each of them.
    if samples.sizes is None or torch.compiler.is_compiling():
        return ImageBatch(features, mask)
    sizes = tuple((_valid_cells(h, frame[0], cells[0]), _valid_cells(w, frame[1], cells[1])) for h, w in samples.sizes)
    return ImageBatch(features, mask, sizes)


@lru_cache(maxsize=4096)
def _valid_cells(length: int, frame: int, cells: int) -> int:
    """How many of ``cells`` sample one of the first ``length`` of ``frame`` pixels, rounded as F.interpolate does."""
    pixels = np.floor(np.arange(cells, dtype=np.float32) * (np.float32(frame) / np.float32(cells)))
    return int(np.count_nonzero(pixels < length))
