"""Residual blocks in one call: layer by layer to the bit, against float64, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import PackedBlock, PackedBlocks, PackedConv, _native, conv, conv_blocks, conv_blocks_memory

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


class Stage(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]
    width: int  # channels of the inner maps
    out_channels: int
    blocks: int = 2
    stride: int = 1
    dilation: int = 1
    is_basic: bool = False
    has_shortcut: bool = True


STAGES = {
    "one pixel": Stage(2, 16, (1, 1), 8, 32),
    "one row": Stage(1, 8, (1, 61), 16, 40),
    "one column": Stage(1, 8, (61, 1), 16, 40),
    "first of a resnet": Stage(1, 64, (23, 37), 64, 256, 3),
    "a pixel more than patches": Stage(2, 64, (17, 21), 64, 128),
    "several bands": Stage(1, 128, (45, 19), 64, 128, 2, has_shortcut=False),
    "several chunks": Stage(1, 16, (9, 150), 64, 128),
    "odd channels": Stage(2, 19, (18, 17), 21, 70),
    "two panels between": Stage(3, 70, (19, 26), 128, 192),
    "many channels": Stage(1, 48, (18, 16), 256, 48, 2, has_shortcut=False),
    "stride 2": Stage(2, 24, (35, 33), 16, 48, 3, stride=2),
    "dilated": Stage(1, 16, (21, 19), 24, 40, 2, dilation=2),
    "basic": Stage(2, 16, (19, 22), 16, 16, 2, is_basic=True, has_shortcut=False),
    "basic, stride 2": Stage(1, 8, (33, 38), 16, 16, 2, stride=2, is_basic=True),
    "no images": Stage(0, 16, (4, 4), 8, 32),
}


def packed(channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> PackedConv:
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    place = {"stride": stride, "padding": kernel // 2 * dilation, "dilation": dilation}
    return PackedConv.of(weight, torch.randn(out_channels), **place)


def case(name: str) -> tuple[Tensor, PackedBlocks]:
    s, blocks = STAGES[name], []
    channels, stride = s.channels, s.stride
    for number in range(s.blocks):
        if s.is_basic:
            convs = packed(channels, s.width, 3, stride), packed(s.width, s.out_channels, 3)
        else:
            middle = packed(s.width, s.width, 3, stride, s.dilation)
            convs = packed(channels, s.width, 1), middle, packed(s.width, s.out_channels, 1)
        shortcut = packed(channels, s.out_channels, 1, stride) if number == 0 and s.has_shortcut else None
        blocks.append(PackedBlock(convs, shortcut))
        channels, stride = s.out_channels, 1
    x = torch.randn(s.batch, s.channels, *s.size).relu().contiguous(memory_format=torch.channels_last)
    return x, PackedBlocks(blocks)


def layer_by_layer(x: Tensor, blocks: PackedBlocks) -> Tensor:
    for convs, shortcut in blocks.blocks:
        y = x
        for each in convs[:-1]:
            y = conv(y, each, relu=True)
        x = conv(y, convs[-1], residual=x if shortcut is None else conv(x, shortcut), relu=True)
    return x


def exact(x: Tensor, blocks: PackedBlocks, dtype: torch.dtype = torch.float64) -> Tensor:
    """In plain PyTorch, in a dtype."""

    def run(x: Tensor, each: PackedConv) -> Tensor:
        assert each.bias is not None
        return F.conv2d(x, each.weight.to(dtype), each.bias.to(dtype), each.stride, each.padding, each.dilation)

    x = x.to(dtype)
    for convs, shortcut in blocks.blocks:
        y = x
        for each in convs[:-1]:
            y = run(y, each).relu()
        x = (run(y, convs[-1]) + (x if shortcut is None else run(x, shortcut))).relu()
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STAGES)
def test_it_is_right(name: str, backend: str) -> None:
    x, blocks = case(name)
    found, expected = conv_blocks(x, blocks, backend=backend), exact(x, blocks)
    assert found.shape == expected.shape and list(found.shape) == blocks.shape_after(x.shape)
    if x.numel() == 0:
        return
    assert 0.02 < (expected == 0).double().mean() < 0.98 or expected.numel() < 100
    error, error_of_sums = found - expected, exact(x, blocks, torch.float32) - expected
    scale = expected.square().mean().sqrt()
    # Of few numbers; Winograd's algorithm has twice the error of sums in float32.
    assert error.square().mean().sqrt() < 5 * error_of_sums.square().mean().sqrt() + 1e-6 * scale
    assert error.abs().max() < 5 * error_of_sums.abs().max() + 1e-5 * scale


@needs_native
@pytest.mark.parametrize("name", STAGES)
def test_every_bit_is_that_of_layer_by_layer(name: str, vector_bytes: int) -> None:
    x, blocks = case(name)
    expected = layer_by_layer(x, blocks)
    before, threads = x.clone(), torch.get_num_threads()
    out = torch.full(expected.shape, torch.nan).contiguous(memory_format=torch.channels_last)
    memory = torch.full([conv_blocks_memory(x, x.shape, blocks) or 0], torch.nan)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert conv_blocks(x, blocks, out=out.fill_(torch.nan), memory=memory.fill_(torch.nan)) is out
            assert torch.equal(out, expected) and torch.equal(x, before)
            assert torch.equal(conv_blocks(x, blocks), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_in_another_layout(backend: str) -> None:
    x, blocks = case("stride 2")
    wide = torch.randn(2, 24, 35, 50)[..., 9:42]
    expected = conv_blocks(wide.contiguous(memory_format=torch.channels_last), blocks, backend=backend)
    torch.testing.assert_close(conv_blocks(wide, blocks, backend=backend), expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_nan_stays() -> None:
    x, blocks = case("first of a resnet")
    x[0, 5, 10, 30] = torch.nan
    found = conv_blocks(x, blocks)
    assert found[0, :, 10, 30].isnan().all() and found[0, :, :, 0].isfinite().all()


@needs_native
def test_pickles_copies_and_threads_agree() -> None:
    x, blocks = case("several bands")
    maps = [x, torch.randn_like(x), torch.randn(2, 128, 9, 30), torch.randn(1, 128, 1, 1)] * 3
    expected = [conv_blocks(each, blocks) for each in maps]
    copies: list[Callable[[PackedBlocks], PackedBlocks]] = [lambda b: pickle.loads(pickle.dumps(b)), copy.deepcopy]
    for other in (blocks, *(copy_of(blocks) for copy_of in copies)):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda each, blocks=other: conv_blocks(each, blocks), maps))
        assert all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))


def test_other_dtypes_take_the_reference() -> None:
    x, blocks = case("stride 2")
    doubles = blocks.apply(
        lambda c: PackedConv.of(c.weight.double(), c.bias.double(), stride=c.stride, padding=c.padding)
    )
    assert conv_blocks_memory(x.double(), x.shape, doubles) is None
    torch.testing.assert_close(conv_blocks(x.double(), doubles), exact(x, blocks))
    with pytest.raises(NotImplementedError, match=r"is for float32, and the map is torch\.float64"):
        conv_blocks(x.double(), doubles, backend="native")


def test_it_can_be_compiled() -> None:
    x, blocks = case("stride 2")
    compiled = torch.compile(lambda m: conv_blocks(m, blocks) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv_blocks(x, blocks) + 1, rtol=1e-5, atol=1e-5)


def test_blocks_that_do_not_fit_are_refused() -> None:
    one = PackedBlock((packed(8, 4, 1), packed(4, 8, 3)))
    for blocks, message in (
        ([], "two or more convolutions"),
        ([PackedBlock((packed(8, 8, 1),))], "two or more convolutions"),
        ([one, PackedBlock(one.convs, packed(8, 8, 1))], "only the first block may have"),
        ([PackedBlock((packed(8, 4, 1), packed(5, 8, 1)))], "take the 4 channels of the map before it, got Packed"),
        ([PackedBlock((packed(8, 4, 1), packed(4, 9, 1)))], "must have as many channels"),
        ([PackedBlock(one.convs, packed(7, 8, 1))], "take the 8 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedBlocks(blocks)


def test_bad_input_is_refused() -> None:
    x, blocks = case("first of a resnet")
    with pytest.raises(ValueError, match=r"x must be \[B, 64, H, W\] with pixels"):
        conv_blocks(x[:, 1:], blocks)
    with pytest.raises(ValueError, match="must not require a gradient"):
        conv_blocks(x.clone().requires_grad_(), blocks)
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[1, 256, 23, 37\]"):
        conv_blocks(x, blocks, out=torch.zeros(1, 256, 23, 36))
    strided = PackedBlocks([PackedBlock((packed(8, 8, 1), packed(8, 8, 3, stride=2)))])
    with pytest.raises(ValueError, match="a block and its shortcut give maps of one shape"):
        conv_blocks(torch.zeros(1, 8, 5, 5), strided)
    later = PackedBlocks([PackedBlock((packed(8, 8, 1), packed(8, 8, 3))), strided.blocks[0]])
    with pytest.raises(ValueError, match="beyond the first must keep the shape"):
        conv_blocks(torch.zeros(1, 8, 5, 5), later)
    unpadded = PackedBlocks([PackedBlock((packed(8, 8, 1), PackedConv.of(torch.zeros(8, 8, 3, 3))))])
    with pytest.raises(ValueError, match=r"as large as the kernel of Packed.*got \[2, 9\]"):
        conv_blocks(torch.zeros(1, 8, 2, 9), unpadded)


@needs_native
def test_bad_memory_is_refused() -> None:
    x, blocks = case("basic")
    least = conv_blocks_memory(x, x.shape, blocks)
    assert least is not None and least >= 2 * 16 * 19 * 22
    wrong = torch.zeros(least - 1), torch.zeros(least).double(), torch.zeros(2 * least)[::2], torch.zeros(least, 1)
    for memory in wrong:
        with pytest.raises(ValueError, match=f"memory must be contiguous torch.float32 of {least} numbers or more"):
            conv_blocks(x, blocks, memory=memory)
    both = torch.zeros(x.numel() + least)
    out = both[: x.numel()].view(2, 19, 22, 16).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="memory must not share memory with out"):
        conv_blocks(x, blocks, out=out, memory=both[x.numel() - 1 :])
    with pytest.raises(ValueError, match="memory must not share memory with x"):
        conv_blocks(out, blocks, memory=both)
