"""CUDA graphs of a whole model on a GPU, against the model alone; elsewhere their logic is tested with stand-ins."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_detr

from detr_fast import optimize
from detr_fast.train_forward import GraphedModel, capture_with_cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIDES = (32, 48, 96)


def test_training() -> None:
    torch.manual_seed(1)
    model = small_detr().cuda()
    alone = copy.deepcopy(model)
    graphed = GraphedModel(model, multiple=64, capture=capture_with_cuda)
    for side in (*SIDES, *SIDES):
        images = torch.randn(2, 3, side, side, device="cuda")
        losses = [m(images)["pred_logits"].square().mean() for m in (graphed, alone)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
        for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            if expected.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
        model.zero_grad()
        alone.zero_grad()
    assert len(graphed.graphs) == 2


def test_inference() -> None:
    torch.manual_seed(1)
    model = small_detr().cuda().eval()
    graphed = optimize(model, cuda_graph=True)
    # A size is captured when it comes the second time.
    for side in SIDES * 3:
        images = torch.randn(2, 3, side, side, device="cuda")
        with torch.inference_mode():
            found, expected = graphed(images), model(images)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
