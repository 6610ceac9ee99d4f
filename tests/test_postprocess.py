"""PostProcess: scores, labels and boxes in pixels."""

from __future__ import annotations

import pytest
import torch
from small import random_outputs

from detr_fast import PostProcess


def test_detections_are_the_best_object_class_in_pixels() -> None:
    outputs = random_outputs(2)
    results = PostProcess()(outputs, torch.tensor([[100, 200], [50, 40]]))
    probability = outputs["pred_logits"].softmax(-1)
    for image, (height, width) in enumerate([(100, 200), (50, 40)]):
        for query in range(7):
            label = int(probability[image, query, :5].argmax())
            cx, cy, w, h = outputs["pred_boxes"][image, query].tolist()
            expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            assert results[image]["labels"][query].item() == label
            assert results[image]["scores"][query].item() == pytest.approx(probability[image, query, label].item())
            assert results[image]["boxes"][query].tolist() == pytest.approx(expected, abs=1e-4)


def test_refuses_sizes_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"target_sizes must be \[2, 2\] \(h, w\), got \[2\]"):
        PostProcess()(random_outputs(2), torch.tensor([100, 200]))
