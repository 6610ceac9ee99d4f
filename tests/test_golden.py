"""The original's known answers: outputs, matches, losses and gradients of every variant, from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import golden_recipe
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr_fast import DetrDemo, SetCriterion
from detr_fast.build import criterion_from_args, model_from_args

GOLDEN = Path(__file__).parent / "data" / "golden"
SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
VARIANTS = {
    "r50": {},
    "r50_dc5": {"dilation": True},
    "r101": {"backbone": "resnet101"},
    "r50_learned_pos": {"position_embedding": "learned"},
    "r50_pre_norm": {"pre_norm": True},
    "r50_panoptic": {"masks": True, "dataset_file": "coco_panoptic"},
}
BOXES_ALONE = [name for name, options in VARIANTS.items() if "masks" not in options]


def known(variant: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{variant}.npz"))


def fill(model: nn.Module) -> nn.Module:
    state_dict = model.state_dict()
    model.load_state_dict(
        {key: torch.from_numpy(golden_recipe.parameter(key, value.shape)) for key, value in state_dict.items()}
    )
    return model


def golden_model(variant: str) -> nn.Module:
    return fill(model_from_args(SimpleNamespace(dropout=0.0, **VARIANTS[variant])))


def golden_images() -> list[Tensor]:
    return [
        torch.from_numpy(golden_recipe.image(0, 224, 288)),
        torch.from_numpy(golden_recipe.image(1, 256, 192)),
    ]


def golden_targets(variant: str) -> list[dict[str, Tensor]]:
    drawn = [golden_recipe.target(0, 5), golden_recipe.target(1, 3)]
    if variant == "r50_panoptic":
        drawn = [golden_recipe.target(0, 4, 250, (224, 288)), golden_recipe.target(1, 2, 250, (256, 192))]
    return [dict(zip(("labels", "boxes", "masks"), map(torch.from_numpy, arrays), strict=False)) for arrays in drawn]


def golden_criterion(variant: str) -> SetCriterion:
    return criterion_from_args(SimpleNamespace(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_the_original_name_and_shape(variant: str) -> None:
    model = model_from_args(SimpleNamespace(**VARIANTS[variant]))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[variant]


@pytest.mark.parametrize("variant", BOXES_ALONE)
def test_outputs_are_the_originals(variant: str) -> None:
    answer = known(variant)
    with torch.inference_mode():
        outputs = golden_model(variant).eval()(golden_images())
    layers = {"": outputs} | {f"aux{layer}_": aux for layer, aux in enumerate(outputs["aux_outputs"])}
    compared = 0
    for prefix, layer_outputs in layers.items():
        for name in ("pred_logits", "pred_boxes"):
            if prefix + name in answer:
                np.testing.assert_allclose(layer_outputs[name].numpy(), answer[prefix + name], atol=5e-6, rtol=5e-6)
                compared += 1
    assert compared == (12 if variant == "r50" else 2)


def test_masks_are_the_originals() -> None:
    answer = known("r50_panoptic")
    model = golden_model("r50_panoptic").eval()
    with torch.inference_mode():
        outputs = model(golden_images())
        lazy = model(golden_images(), lazy_masks=True)["pred_masks"]
        some = lazy[torch.tensor([1, 0, 1]), torch.tensor([99, 7, 0])]
    for name in ("pred_logits", "pred_boxes"):
        np.testing.assert_allclose(outputs[name].numpy(), answer[name], atol=5e-6, rtol=5e-6)
    masks = outputs["pred_masks"].numpy()
    assert masks.shape == lazy.shape == (2, 100, 64, 72)
    # Against float64 the known masks are off by up to 8.8e-6 themselves; ours may be off by twice as much.
    np.testing.assert_allclose(masks[:, [0, 7, 99]], answer["pred_masks_q0_q7_q99"], atol=2.7e-5, rtol=0)
    np.testing.assert_allclose(masks.mean((2, 3)), answer["pred_masks_mean"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(some.numpy(), masks[[1, 0, 1], [99, 7, 0]], atol=8e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_losses_and_gradients_are_the_originals(variant: str) -> None:
    answer = known(variant)
    model, criterion = golden_model(variant).train(), golden_criterion(variant)
    outputs = model(golden_images())
    targets = golden_targets(variant)
    check_matches(criterion, outputs, targets, answer)

    losses = criterion(outputs, targets)
    assert sorted(losses) == sorted(answer["loss_names"])
    for name, value in zip(answer["loss_names"], answer["loss_values"], strict=True):
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name

    total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
    assert total.item() == pytest.approx(float(answer["loss_total"]), rel=1e-5)
    total.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert sorted(norms) == sorted(answer["grad_names"])
    # Against float64 the known norms are off by up to 1.0e-4 themselves, and ours by up to 1.6e-4 (float32 backward
    # through a hundred layers of ReLU). The first decoder layer's self-attention sees equal values: its exact gradient
    # is 0, and what is left is rounding.
    rounding = 1e-7 * max(norms.values())
    for name, norm in zip(answer["grad_names"], answer["grad_norms"], strict=True):
        assert norms[name] == pytest.approx(norm, rel=2.6e-4, abs=rounding), name


def check_matches(criterion: SetCriterion, outputs: dict, targets: list, answer: dict[str, np.ndarray]) -> None:
    layers = {"final": outputs} | {f"aux{layer}": aux for layer, aux in enumerate(outputs["aux_outputs"])}
    for layer, layer_outputs in layers.items():
        for image, pair in enumerate(criterion.matcher(layer_outputs, targets)):
            key = f"match_{layer}_image{image}"
            if key in answer:
                np.testing.assert_array_equal(torch.stack(pair).numpy(), answer[key])


def test_the_demo_model_gives_the_demos_answer() -> None:
    answer = known("demo")
    model = fill(DetrDemo(num_classes=91)).eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES["demo"]
    with torch.inference_mode():
        outputs = model(golden_images()[0][None])
    for name in ("pred_logits", "pred_boxes"):
        np.testing.assert_allclose(outputs[name].numpy(), answer[name], atol=5e-6, rtol=5e-6)
