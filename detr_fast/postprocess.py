"""The model's output as detections in the image's own pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_fast.ops.boxes import cxcywh_to_xyxy


class PostProcess(nn.Module):
    """One detection for every query: its best class, but for "no object", and its box."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Detections of each image, in the order of the queries; nothing is thresholded.

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1] and ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1].
            target_sizes: [B, 2] (height, width) of the images in pixels: the original size to evaluate, the size
                after augmentation and before padding to draw on the model's input.

        Returns:
            For each image "scores" [Q] in [0, 1], "labels" [Q] int64 and "boxes" [Q, 4] xyxy in pixels.

        Raises:
            ValueError: ``target_sizes`` is not [B, 2].
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(f"target_sizes must be [{len(logits)}, 2] (h, w), got {list(target_sizes.shape)}")
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.to(boxes.device).unbind(1)
        scale = torch.stack((width, height, width, height), dim=1)  # [B, 4]
        boxes_xyxy_px = cxcywh_to_xyxy(boxes) * scale[:, None]
        results = zip(scores, labels, boxes_xyxy_px, strict=True)
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in results]
