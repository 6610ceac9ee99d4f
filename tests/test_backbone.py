"""The backbone in training: frozen batch norm folded into weights, the layout of its maps, what is not recorded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.backbone import Backbone, BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet, normalised


def drawn_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.5, 2)
    return norm


def small_resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...] = (1, 2, 1, 1)) -> ResNet:
    return ResNet(block, depths, norm=drawn_norm, width=8)


def by_the_paper(net: ResNet, images: Tensor) -> Tensor:
    """The last map with a pass for every norm, sum and ReLU, none in place."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(images))), 3, stride=2, padding=1)
    for block in (block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage):
        y = F.relu(block.bn1(block.conv1(x)))
        y = block.bn2(block.conv2(y))
        if isinstance(block, Bottleneck):
            y = block.bn3(block.conv3(F.relu(y)))
        x = F.relu(y + (x if block.downsample is None else block.downsample(x)))
    return x


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_folded_norms_give_the_same_map_and_gradients(block: type[BasicBlock] | type[Bottleneck]) -> None:
    net, images = small_resnet(block).double(), torch.randn(2, 3, 70, 65, dtype=torch.float64)
    weights = list(net.parameters())
    expected = by_the_paper(net, images)
    assert expected.std() > 0
    weighting = torch.randn_like(expected)
    found = net(images)[-1]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weighting).sum(), weights) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_no_frozen_norm_after_a_plain_convolution_runs_as_it_is() -> None:
    x = torch.randn(2, 4, 5, 6)
    biased, plain = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3, bias=False)
    reflecting = nn.Conv2d(4, 3, 3, padding=1, bias=False, padding_mode="reflect")
    pairs = [(conv, drawn_norm(3)) for conv in (biased, nn.Sequential(plain), reflecting)]
    for conv, norm in [*pairs, (plain, nn.BatchNorm2d(3))]:
        torch.testing.assert_close(normalised(conv, norm, x), norm(conv(x)))


def test_maps_are_channels_last_and_no_pass_goes_over_them_for_a_norm() -> None:
    net = small_resnet(Bottleneck)
    with torch.profiler.profile(record_shapes=True) as profile:
        maps = net(torch.randn(1, 3, 64, 96))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    products = [event.input_shapes[0] for event in profile.events() if event.name == "aten::mul"]
    assert products and all(len(shape) == 1 or max(shape[2:]) <= 7 for shape in products)


def test_the_frozen_stages_are_not_recorded() -> None:
    backbone = Backbone("resnet18", train_backbone=True, return_interm_layers=False, dilation=False)
    maps = backbone.body(torch.randn(1, 3, 32, 32))
    assert [x.requires_grad for x in maps] == [False, True, True, True]
