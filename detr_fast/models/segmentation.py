"""The mask head on top of a detector (Carion et al. 2020, section 4.2 and figure 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fast.data.batch import ImageBatch
from detr_fast.models.detr import Detr
from detr_fast.models.upsampled_conv import upsampled_conv


class DetrSegm(nn.Module):
    """A detector that also gives every query a mask, at a quarter of the image's size.

    Args:
        detr: its backbone returns four feature maps, from the largest to the smallest (``return_interm_layers``).
        freeze_detr: train the mask head alone. The detector then stays in eval mode: what the mask head learns from is
            what it sees in use, and an ordinary batch norm's statistics stay what they are.
        chunk: queries whose masks are computed at a time; bounds the memory and changes no result.
        fpn_dims: channels of the feature maps but the last, from the smallest map to the largest; None reads them off
            a ResNet.
    """

    def __init__(
        self, detr: Detr, freeze_detr: bool = False, *, chunk: int = 16, fpn_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.detr = detr
        self.chunk = chunk
        self.frozen = freeze_detr
        if freeze_detr:
            detr.requires_grad_(False)
        hidden_dim: int = detr.transformer.d_model  # type: ignore[assignment]
        heads: int = detr.transformer.nhead  # type: ignore[assignment]
        self.bbox_attention = AttentionMap(hidden_dim, heads)
        self.mask_head = MaskHead(hidden_dim + heads, fpn_dims or _fpn_dims(detr), hidden_dim)

    @property
    def num_queries(self) -> int:
        """The most objects that can be found in one image."""
        return self.detr.num_queries

    def train(self, mode: bool = True) -> DetrSegm:
        """As any module's, but a frozen detector stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.detr.eval()
        return self

    def forward(
        self, samples: Any, *, lazy_masks: bool | None = None, aux_outputs: bool | None = None
    ) -> dict[str, Any]:
        """Detect, with masks.

        Args:
            samples: as ``Detr.forward`` takes them.
            lazy_masks: leave the masks uncomputed until some queries are asked for; None: in training, where only the
                matched ones are.
            aux_outputs: as of ``Detr.forward``.

        Returns:
            What ``Detr.forward`` does, and ``pred_masks``: logits [B, Q, h, w] of the padded images at a quarter of
            their size, or the ``QueryMasks`` that computes them, indexed in the same way.

        Raises:
            ValueError: the backbone does not return four feature maps.
        """
        features = self.detr.backbone[0](ImageBatch.of(samples))  # type: ignore[index]
        if len(features) != 4:
            raise ValueError(f"the backbone must return four feature maps (return_interm_layers), got {len(features)}")
        src, padding = features[-1].decompose()
        pos = self.detr.backbone[1](features[-1]).to(src.dtype)  # type: ignore[index]
        projected = self.detr.input_proj(src)  # [B, D, h, w]
        hs, memory = self.detr.transform(projected, features[-1], pos)
        outputs = self.detr.outputs(hs, aux_outputs=aux_outputs)
        attention = self.bbox_attention(hs[-1], memory, padding)  # [B, Q, H, h, w]
        maps = self.mask_head.image_maps(projected, [level.tensors for level in reversed(features[:-1])])
        masks = QueryMasks(self.mask_head, attention, maps, self.chunk)
        lazy = self.training if lazy_masks is None else lazy_masks
        return {**outputs, "pred_masks": masks if lazy else masks.dense()}


def _fpn_dims(detr: Detr) -> list[int]:
    channels = getattr(getattr(detr.backbone[0], "body", None), "stage_channels", None)  # type: ignore[index]
    if channels is None:
        raise ValueError("fpn_dims must be given for a backbone that is no ResNet")
    return list(channels[-2::-1])


class AttentionMap(nn.Module):
    """Where each query looks, head by head: attention's weights, without values.

    Its softmax runs over all heads and places together, as the published weights were trained.
    """

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_dim, hidden_dim)
        self.k_linear = nn.Linear(hidden_dim, hidden_dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """[B, Q, D] queries, [B, D, h, w] memory, [B, h, w] True = padding, to [B, Q, H, h, w], summing to 1."""
        q = self.q_linear(queries).unflatten(-1, (self.num_heads, -1))  # [B, Q, H, D / H]
        k = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.num_heads, -1))  # [B, S, H, D / H]
        scores = torch.einsum("bqnc,bsnc->bqns", q * q.shape[-1] ** -0.5, k)
        if padding is not None:
            scores = scores.masked_fill(padding.flatten(1)[:, None, None], float("-inf"))
        weights = scores.flatten(2).softmax(-1)
        return weights.unflatten(-1, (self.num_heads, *memory.shape[-2:]))


class MaskHead(nn.Module):
    """Convolutions over a query's attention and the image's features, upsampled along a feature pyramid.

    What depends on the image alone is computed once for all its queries: a convolution is linear, so that of a sum or
    of stacked channels is the sum of its parts. The first layer's work falls to a thirtieth, and no map of the pyramid
    is copied for every query.

    Args:
        dim: channels that come in, hidden size and heads.
        fpn_dims: channels of the pyramid's three maps, from the smallest map to the largest.
        context_dim: hidden size.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int) -> None:
        super().__init__()
        widths = [dim, dim, context_dim // 2, context_dim // 4, context_dim // 8, context_dim // 16]
        if len(fpn_dims) != 3:
            raise ValueError(f"fpn_dims must be three numbers of channels, got {list(fpn_dims)}")
        self.lay1, self.gn1 = nn.Conv2d(dim, widths[1], 3, padding=1), _group_norm(widths[1])
        self.lay2, self.gn2 = nn.Conv2d(widths[1], widths[2], 3, padding=1), _group_norm(widths[2])
        self.lay3, self.gn3 = nn.Conv2d(widths[2], widths[3], 3, padding=1), _group_norm(widths[3])
        self.lay4, self.gn4 = nn.Conv2d(widths[3], widths[4], 3, padding=1), _group_norm(widths[4])
        self.lay5, self.gn5 = nn.Conv2d(widths[4], widths[5], 3, padding=1), _group_norm(widths[5])
        self.out_lay = nn.Conv2d(widths[5], 1, 3, padding=1)
        self.adapter1, self.adapter2, self.adapter3 = (
            nn.Conv2d(before, after, 1) for before, after in zip(fpn_dims, widths[2:5], strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def image_maps(self, projected: Tensor, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """What layers 1, 3, 4 and 5 make of the images alone.

        Args:
            projected: [B, D, h, w] the features that the transformer got.
            pyramid: three maps of the backbone, from the smallest to the largest.
        """
        depth = projected.shape[1]
        first = F.conv2d(projected, self.lay1.weight[:, :depth], self.lay1.bias, padding=1)
        adapters, layers = (self.adapter1, self.adapter2, self.adapter3), (self.lay3, self.lay4, self.lay5)
        levels = zip(layers, adapters, pyramid, strict=True)
        return [first, *(layer(adapter(level)) for layer, adapter, level in levels)]

    def forward(self, attention: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Mask logits.

        Args:
            attention: [K, H, h, w] of K queries.
            maps: ``image_maps`` of each query's image, or of fewer images, where the first K / B queries are of the
                first one and so on.

        Returns:
            [K, h', w'], of the size of the largest map.
        """
        depth = self.lay1.in_channels - attention.shape[1]
        x = _add(F.conv2d(attention, self.lay1.weight[:, depth:], padding=1), maps[0])
        x = F.relu(self.gn1(x), inplace=True)
        x = F.relu(self.gn2(self.lay2(x)), inplace=True)
        levels = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (layer, norm), image_map in zip(levels, maps[1:], strict=True):
            x = upsampled_conv(x, layer.weight, image_map.shape[-2:])
            x = F.relu(norm(_add(x, image_map)), inplace=True)
        return self.out_lay(x)[:, 0]


def _add(x: Tensor, image_map: Tensor) -> Tensor:
    """x [K, C, h, w], the queries of B images, and what belongs to each image, [B, C, h, w]."""
    return (x.unflatten(0, (image_map.shape[0], -1)) + image_map[:, None]).flatten(0, 1)


def _group_norm(channels: int) -> nn.GroupNorm:
    # 8 groups at the paper's widths; a narrow head has fewer.
    return nn.GroupNorm(math.gcd(8, channels), channels)


class QueryMasks:
    """Masks that are computed when they are asked for, by [images, queries] as of a tensor [B, Q, h, w].

    Args:
        head: the mask head.
        attention: [B, Q, H, h, w].
        maps: the head's ``image_maps``.
        chunk: queries at a time. Where a gradient is needed and there are more, a chunk's inner values are computed
            again in the backward pass.
    """

    def __init__(self, head: MaskHead, attention: Tensor, maps: Sequence[Tensor], chunk: int) -> None:
        self.head = head
        self.attention = attention
        self.maps = list(maps)
        self.chunk = chunk
        device = attention.device.type
        # The masks are computed in the precision of the forward pass that they belong to.
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @property
    def shape(self) -> torch.Size:
        """[B, Q, h, w]."""
        return torch.Size((*self.attention.shape[:2], *self.maps[-1].shape[-2:]))

    def __getitem__(self, index: tuple[Tensor, Tensor]) -> Tensor:
        """The logits [K, h, w] of the queries ``index`` = (images [K], queries [K])."""
        images, queries = (number.to(self.attention.device) for number in index)
        if len(images) == 0:
            return self._without_queries()
        with self._as_in_forward():
            chunks = zip(images.split(self.chunk), queries.split(self.chunk), strict=True)
            masks = [
                self._run(self.attention[image, query], [x[image] for x in self.maps], len(images))
                for image, query in chunks
            ]
        return torch.cat(masks)

    def dense(self) -> Tensor:
        """All of them, [B, Q, h, w]."""
        with self._as_in_forward():
            masks = [
                self._run(part, [x[image : image + 1] for x in self.maps], self.shape[0] * self.shape[1])
                for image, attention in enumerate(self.attention)
                for part in attention.split(self.chunk)
            ]
        return torch.cat(masks).reshape(self.shape)

    def _run(self, attention: Tensor, maps: list[Tensor], in_all: int) -> Tensor:
        if in_all <= self.chunk or not torch.is_grad_enabled():
            return self.head(attention, maps)
        return checkpoint(self.head, attention, maps, use_reentrant=False, preserve_rng_state=False)

    def _without_queries(self) -> Tensor:
        # Through the head, so that its parameters get gradients of zero: processes that train together wait for them.
        nothing = self.attention.new_zeros(1, dtype=torch.int64)
        return self[nothing, nothing][:0]

    def _as_in_forward(self) -> AbstractContextManager[Any]:
        device, dtype, enabled = self._autocast
        return torch.autocast(device, dtype, enabled=enabled)
