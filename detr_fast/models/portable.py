"""DETR as a graph of PyTorch's own ops, for other runtimes to run and fuse."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detr_fast.data.batch import ImageBatch
from detr_fast.models.attention import MultiHeadAttention
from detr_fast.models.backbone import FrozenBatchNorm2d
from detr_fast.models.detr import Detr
from detr_fast.models.packed_resnet import PackedResNet
from detr_fast.models.packed_transformer import PackedDecoder
from detr_fast.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models.segmentation import AttentionMap, DetrSegm, MaskHead
from detr_fast.models.transformer import Transformer, TransformerDecoderLayer, TransformerEncoderLayer


class PortableDetr(nn.Module):
    """A trained detector for inference, on images of one size or padded, without an op that only this package has.

    Tokens are dense, [B, S, D], and padding is masked out, since a graph for any size cannot leave tokens out. Batch
    norm is folded into the convolutions, the first decoder layer's self-attention is a constant (its queries are all
    equal), and only the last layer's heads are there.

    Args:
        model: is copied.

    Raises:
        TypeError: the model is no ``Detr`` or ``DetrSegm`` of this package's transformer and positions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_portable(model)
        model = copy.deepcopy(model).requires_grad_(False).eval()
        detr: Detr = model.detr if isinstance(model, DetrSegm) else model  # type: ignore[assignment]
        transformer: Transformer = detr.transformer  # type: ignore[assignment]
        encoder, decoder = transformer.encoder, transformer.decoder
        self.backbone, self.position = fold_batch_norms(detr.backbone[0]), detr.backbone[1]  # type: ignore[index]
        self.input_proj = detr.input_proj
        self.encoder = nn.ModuleList(PortableEncoderLayer(layer) for layer in encoder.layers)  # type: ignore[arg-type]
        self.encoder_norm = encoder.norm or nn.Identity()
        self.decoder = nn.ModuleList(PortableDecoderLayer(layer) for layer in decoder.layers)  # type: ignore[arg-type]
        self.decoder_norm = decoder.norm
        self.query_pos = nn.Parameter(detr.query_embed.weight.detach(), requires_grad=False)  # [Q, D]
        first: TransformerDecoderLayer = decoder.layers[0]  # type: ignore[assignment]
        with torch.no_grad():
            start = first.attend_self_of_zeros(self.query_pos)[0]
        self.start = nn.Parameter(start, requires_grad=False)  # [1, 1, D]
        self.class_embed, self.bbox_embed = detr.class_embed, detr.bbox_embed
        self.bbox_attention: AttentionMap | None = model.bbox_attention if isinstance(model, DetrSegm) else None
        self.mask_head: MaskHead | None = model.mask_head if isinstance(model, DetrSegm) else None

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Detect.

        Args:
            images: [B, 3, H, W] normalised; where they are smaller than H x W, in the top left corner.
            sizes: [B, 2] integers, each image's height and width without padding, at least 1; None: nothing is padded.

        Returns:
            ``pred_logits``, ``pred_boxes`` and, of a model with a mask head, ``pred_masks``, as the model's own.
        """
        maps = [level.tensors for level in self.backbone(ImageBatch.of(images))]
        src = self.input_proj(maps[-1])  # [B, D, h, w]
        padding = None if sizes is None else padding_of(sizes, images, src)  # [B, h, w]
        pos = self._positions(src, padding).flatten(2).transpose(1, 2)  # [B, S, D], or [1, S, D] without padding
        # A bias, not a mask: for a mask, the graph would be kept from being NaN where no key is allowed.
        bias = None if padding is None else _bias(padding.flatten(1)[:, None, None], src)  # [B, 1, 1, S]
        memory = self._encode(src.flatten(2).transpose(1, 2), pos, bias)
        hs = self._decode(memory, pos, bias)
        outputs = {"pred_logits": self.class_embed(hs), "pred_boxes": self.bbox_embed(hs).sigmoid()}
        if self.bbox_attention is None or self.mask_head is None:
            return outputs
        attention = self.bbox_attention(hs, memory.transpose(1, 2).unflatten(2, src.shape[-2:]), padding)
        image_maps = self.mask_head.image_maps(src, maps[-2::-1])
        masks = self.mask_head(attention.flatten(0, 1), image_maps)
        return {**outputs, "pred_masks": masks.unflatten(0, attention.shape[:2])}

    def _positions(self, src: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            src = src[:1]  # the same for all images
            padding = torch.zeros_like(src[:, 0], dtype=torch.bool)
        # ``padded`` says what matters here: the valid tokens of a map are a rectangle.
        return self.position(ImageBatch(src, padding, padded=False)).to(src.dtype)

    def _encode(self, x: Tensor, pos: Tensor, bias: Tensor | None) -> Tensor:
        bias = _for_queries(bias, x.shape[1])
        for layer in self.encoder:
            x = layer(x, pos, bias)
        return self.encoder_norm(x)

    def _decode(self, memory: Tensor, pos: Tensor, bias: Tensor | None) -> Tensor:
        memory_pos = memory + pos
        bias = _for_queries(bias, self.query_pos.shape[0])
        x = self.start.expand(memory.shape[0], self.query_pos.shape[0], -1)
        layers: list[PortableDecoderLayer] = list(self.decoder)  # type: ignore[arg-type]
        for index, layer in enumerate(layers):
            if index > 0:  # the first one's is ``start``
                x = layer.attend_self(x, self.query_pos)
            x = layer.attend_memory(x, self.query_pos, memory, memory_pos, bias)
        return self.decoder_norm(x)


class PortableAttention(nn.Module):
    """Multi-head attention of [B, S, D] tokens as runtimes know it: three products, SDPA, a product."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.query, self.key, self.value = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = attention.out_proj
        self.num_heads = attention.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries [B, Sq, D] attend to keys and values [B, Sk, D]; ``bias`` [B, 1, Sq, Sk] is added to the logits."""
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]


class PortableEncoderLayer(nn.Module):
    """``TransformerEncoderLayer`` without dropout."""

    def __init__(self, layer: TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = PortableAttention(layer.self_attn)
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.feed_forward = PortableFeedForward(layer)
        self.normalize_before = layer.normalize_before

    def forward(self, x: Tensor, pos: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens [B, S, D] and their positions to tokens."""
        if self.normalize_before:
            y = self.norm1(x)
            x = x + self.self_attn(y + pos, y + pos, y, bias)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.self_attn(x + pos, x + pos, x, bias))
        return self.norm2(x + self.feed_forward(x))


class PortableDecoderLayer(nn.Module):
    """``TransformerDecoderLayer`` without dropout, in two parts."""

    def __init__(self, layer: TransformerDecoderLayer) -> None:
        super().__init__()
        self.self_attn = PortableAttention(layer.self_attn)
        self.multihead_attn = PortableAttention(layer.multihead_attn)
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.feed_forward = PortableFeedForward(layer)
        self.normalize_before = layer.normalize_before

    def attend_self(self, x: Tensor, query_pos: Tensor) -> Tensor:
        """Queries [B, Q, D] and their positions [Q, D] to queries."""
        if self.normalize_before:
            y = self.norm1(x)
            return x + self.self_attn(y + query_pos, y + query_pos, y)
        return self.norm1(x + self.self_attn(x + query_pos, x + query_pos, x))

    def attend_memory(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, memory_pos: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The rest of the layer; the memory [B, S, D] without and with positions."""
        if self.normalize_before:
            x = x + self.multihead_attn(self.norm2(x) + query_pos, memory_pos, memory, bias)
            return x + self.feed_forward(self.norm3(x))
        x = self.norm2(x + self.multihead_attn(x + query_pos, memory_pos, memory, bias))
        return self.norm3(x + self.feed_forward(x))


class PortableFeedForward(nn.Module):
    """``feed_forward`` without dropout."""

    def __init__(self, layer: TransformerEncoderLayer | TransformerDecoderLayer) -> None:
        super().__init__()
        self.linear1, self.linear2, self.activation = layer.linear1, layer.linear2, layer.activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return self.linear2(self.activation(self.linear1(x)))


def check_portable(model: nn.Module) -> None:
    """Refuse what ``PortableDetr`` does not know.

    Raises:
        TypeError: as there.
    """
    detr = model.detr if isinstance(model, DetrSegm) else model
    if not isinstance(detr, Detr):
        raise TypeError(f"model must be a Detr or a DetrSegm, got {type(model).__name__}")
    if not isinstance(detr.transformer, Transformer) or not len(detr.transformer.decoder.layers):
        found = type(detr.transformer).__name__
        raise TypeError(f"the model's transformer must be detr_fast's Transformer with a decoder, got {found}")
    if any(isinstance(module, (PackedResNet, PackedDecoder)) for module in model.modules()):
        raise TypeError(
            "the model must be the one that was optimised, got the optimised copy, whose weights are packed"
        )
    position = detr.backbone[1]  # type: ignore[index]
    if not isinstance(position, (PositionEmbeddingSine, PositionEmbeddingLearned)):
        raise TypeError(f"the model's positions must be sine or learned, got {type(position).__name__}")


def padding_of(sizes: Tensor, images: Tensor, features: Tensor) -> Tensor:
    """Which cells of [B, C, h, w] features sample padding, [B, h, w]: the nearest pixel's, as F.interpolate rounds.

    Args:
        sizes: [B, 2] height and width of each image.
        images: [B, 3, H, W].
    """
    rows, columns = (_sampled_pixels(images.shape[dim], features.shape[dim], sizes.device) for dim in (2, 3))
    valid_rows, valid_columns = rows < sizes[:, :1], columns < sizes[:, 1:]  # [B, h], [B, w]
    return ~(valid_rows[:, :, None] & valid_columns[:, None, :])


def _bias(padding: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(padding, dtype=like.dtype).masked_fill(padding, float("-inf"))


def _for_queries(bias: Tensor | None, count: int) -> Tensor | None:
    """[B, 1, 1, S] to [B, 1, count, S]: ONNX's attention takes no fewer rows than there are queries."""
    return None if bias is None else bias.expand(-1, -1, count, -1)


def _sampled_pixels(pixels: int, cells: int, device: torch.device) -> Tensor:
    scale = torch.full((), pixels, dtype=torch.float32, device=device) / cells
    return (torch.arange(cells, dtype=torch.float32, device=device) * scale).floor()


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every batch norm of fixed statistics into the convolution before it, in place.

    The pairs are known by their names in a block: ``conv1`` and ``bn1`` and so on, ``stem`` and ``bn``, and a
    convolution before a norm in a sequence. A norm that has no such partner stays.
    """
    for block in module.modules():
        for conv_name, norm_name in _pairs(block):
            conv, norm = getattr(block, conv_name, None), getattr(block, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
                statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)  # type: ignore[arg-type]
                setattr(block, norm_name, nn.Identity())
    return module


def _pairs(block: nn.Module) -> list[tuple[str, str]]:
    if isinstance(block, nn.Sequential):
        return [(str(index), str(index + 1)) for index in range(len(block) - 1)]
    return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("stem", "bn")]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = (nn.Parameter(x.clone(), requires_grad=False) for x in (weight, bias))
    return linear
