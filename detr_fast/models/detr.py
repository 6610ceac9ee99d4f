"""DETR: a set of box predictions straight from an image (Carion et al. 2020), and the paper's 50-line demo."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import ImageBatch
from detr_fast.models.backbone import Bottleneck, FeatureBackbone, Joiner, ResNet
from detr_fast.models.position_encoding import PositionEmbeddingSine
from detr_fast.models.transformer import Transformer


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them; [..., input_dim] to [..., output_dim]."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        self.num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Detr(nn.Module):
    """The detector of figure 2: backbone, transformer, and two heads on every object query.

    Args:
        backbone: a ``Joiner``, or any module with ``num_channels`` that maps [B, 3, H, W] to one feature map
            [B, num_channels, h, w]; the latter gets sine positions.
        transformer: has ``d_model`` and turns (features, mask, queries, positions) into embeddings [L, B, Q, D].
        num_classes: one more than the largest label; the logits have a last, further place for "no object".
        num_queries: the most objects that can be found in one image.
        aux_loss: also return the outputs of the earlier decoder layers.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ) -> None:
        super().__init__()
        hidden_dim: int = transformer.d_model  # type: ignore[assignment]
        if not _gives_positions(backbone):
            backbone = Joiner(FeatureBackbone(backbone), PositionEmbeddingSine(hidden_dim // 2, normalize=True))
        self.num_queries = num_queries
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)  # type: ignore[arg-type]
        self.backbone = backbone
        self.aux_loss = aux_loss

    def forward(self, samples: Any, *, aux_outputs: bool | None = None) -> dict[str, Any]:
        """Detect.

        Args:
            samples: normalised images, as ``ImageBatch.of`` takes them: a list of [3, h, w] of any sizes, a tensor
                [B, 3, H, W], an ``ImageBatch``, or a ``NestedTensor``.
            aux_outputs: also return the earlier decoder layers' outputs; None: with ``aux_loss``, in eval mode too.

        Returns:
            ``pred_logits`` [B, Q, C + 1], the last place being "no object"; ``pred_boxes`` [B, Q, 4], cxcywh as
            fractions of the image without its padding; and if asked for ``aux_outputs``, a list of such dicts, one for
            each decoder layer but the last.
        """
        features, pos = self.backbone(ImageBatch.of(samples))
        src = self.input_proj(features[-1].tensors)
        return self.outputs(self.transform(src, features[-1], pos[-1])[0], aux_outputs=aux_outputs)

    def transform(self, src: Tensor, features: Any, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Decode a projected feature map.

        Args:
            src: [B, D, h, w] what ``input_proj`` makes of the map.
            features: the map itself, an ``ImageBatch`` or the original's ``NestedTensor``, for its mask and sizes.
            pos: [B, D, h, w].

        Returns:
            hs [L, B, Q, D] and the encoder's memory [B, D, h, w].
        """
        if isinstance(self.transformer, Transformer) and isinstance(features, ImageBatch):
            mask = None if features.padded is False else features.mask
            return self.transformer(src, mask, self.query_embed.weight, pos, features.sizes)
        return self.transformer(src, features.mask, self.query_embed.weight, pos)  # as the original's is called

    def outputs(self, hs: Tensor, *, aux_outputs: bool | None = None) -> dict[str, Any]:
        """What ``forward`` returns, from the decoder's embeddings [L, B, Q, D]."""
        every_layer = self.aux_loss if aux_outputs is None else aux_outputs
        if not every_layer:
            hs = hs[-1:]
        logits = self.class_embed(hs)
        boxes = self.bbox_embed(hs).sigmoid()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        outputs: dict[str, Any] = layers[-1]
        if every_layer:
            outputs["aux_outputs"] = layers[:-1]
        return outputs


def detect(model: nn.Module, samples: Any, *, aux_outputs: bool | None = False) -> dict[str, Any]:
    """What ``model`` returns for ``samples``, without computing more than is asked for where it can leave that out.

    That is the last decoder layer's outputs, or with ``aux_outputs=None`` those that it is trained with, and masks when
    they are looked at. A model whose ``forward`` does not take these two arguments is called with ``samples`` alone.
    """
    wishes = {"aux_outputs": aux_outputs, "lazy_masks": True}
    accepted = inspect.signature(model.forward).parameters
    return model(samples, **{name: value for name, value in wishes.items() if name in accepted})


def _gives_positions(backbone: nn.Module) -> bool:
    # The original's own Joiner is known by its shape: a backbone with a body, then a position encoding.
    return isinstance(backbone, Joiner) or (
        isinstance(backbone, nn.Sequential) and len(backbone) == 2 and hasattr(backbone[0], "body")
    )


class DetrDemo(nn.Module):
    """The paper's 50-line demo (appendix A.6): learned positions, added once at the input, one image size at a time.

    Its parameters have the demo's names, so the demo's published weights load. It is slightly less accurate than
    ``Detr`` and takes no mask: images of one batch must be of one size.

    Args:
        num_classes: one more than the largest label.
        hidden_dim, nheads, num_encoder_layers, num_decoder_layers: of the transformer.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int = 256,
        nheads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
    ) -> None:
        super().__init__()
        self.backbone = ResNet(Bottleneck, (3, 4, 6, 3), norm=nn.BatchNorm2d)
        self.conv = nn.Conv2d(2048, hidden_dim, 1)
        self.transformer = nn.Transformer(hidden_dim, nheads, num_encoder_layers, num_decoder_layers, batch_first=True)
        self.linear_class = nn.Linear(hidden_dim, num_classes + 1)
        self.linear_bbox = nn.Linear(hidden_dim, 4)
        self.query_pos = nn.Parameter(torch.rand(100, hidden_dim))
        self.row_embed = nn.Parameter(torch.rand(50, hidden_dim // 2))
        self.col_embed = nn.Parameter(torch.rand(50, hidden_dim // 2))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] normalised images, at most 1600 pixels a side, to ``pred_logits`` and ``pred_boxes``.

        Raises:
            ValueError: the feature map is larger than the 50 x 50 learned positions.
        """
        features = self.conv(self.backbone(inputs)[-1])
        height, width = features.shape[-2:]
        if max(height, width) > len(self.row_embed):
            raise ValueError(f"DetrDemo's positions end at 50 x 50 tokens, got a map of {height} x {width}")
        columns = self.col_embed[:width].expand(height, -1, -1)
        rows = self.row_embed[:height, None].expand(-1, width, -1)
        pos = torch.cat((columns, rows), dim=-1).flatten(0, 1)  # [S, D]
        tokens = pos + 0.1 * features.flatten(2).transpose(1, 2)
        h = self.transformer(tokens, self.query_pos.expand(len(inputs), -1, -1))
        return {"pred_logits": self.linear_class(h), "pred_boxes": self.linear_bbox(h).sigmoid()}
