"""The public op, its checks, its gradient, and its registration with torch."""

# torch's decorators and Functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.mask_loss.native import mask_loss_native, why_not
from detr_fast.ops.mask_loss.reference import mask_loss_reference, mask_loss_reference_gradients


def _triton_losses(logits: Tensor, masks: Sequence[Tensor], with_gradients: bool) -> tuple[Tensor, ...]:
    from detr_fast.ops.mask_loss.triton_impl import mask_loss_triton  # on demand: it imports Triton

    return mask_loss_triton(logits, masks, with_gradients)


OP = Op(
    name="mask_loss",
    implementations=(
        Implementation("native", mask_loss_native, why_not),
        Implementation("triton", _triton_losses, lambda logits: _triton.why_not(logits.device)),
        Implementation("reference", mask_loss_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


class MaskLosses(NamedTuple):
    """The result of ``mask_loss``, a number for each mask, of the promoted dtype of the logits and float32.

    Attributes:
        mask: [N] sigmoid focal loss, alpha 0.25 and gamma 2, averaged over the frame (Lin et al. 2017, equation 5).
        dice: [N] 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p the probabilities (Milletari et al. 2016, section 3).
    """

    mask: Tensor
    dice: Tensor


def mask_loss(logits: Tensor, masks: Sequence[Tensor], *, backend: str | None = None) -> MaskLosses:
    """How far predicted masks are from their targets, at the targets' size.

    The logits are upsampled (bilinear, corners not aligned) to the smallest frame that holds the masks of all images,
    as if each image's were padded with zeros; pixels outside an image count as outside of its masks.

    Args:
        logits: [N, h, w] float, the predictions for the masks of all images one behind the other.
        masks: for each image [T, height, width] bool (or uint8 of 0 and 1), of N masks together. An image without
            masks has T = 0, and its size counts.
        backend: "native", "triton" or "reference"; None takes the fastest that can run here.

    Returns:
        See MaskLosses. Differentiable once in ``logits``.

    Raises:
        ValueError: a shape, dtype or device is not as above.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    "native" and "triton" keep no number for each pixel of the frame. Nothing waits for the device.
    """
    masks = list(masks)
    _check(logits, masks)
    with_gradients = logits.requires_grad and torch.is_grad_enabled()
    if goes_through_dispatcher(logits):
        return MaskLosses(*torch.ops.detr_fast.mask_loss(logits, masks, with_gradients, backend)[:2])
    chosen = OP.choose(backend, logits)
    if chosen.name == "reference":
        return MaskLosses(*mask_loss_reference(logits, masks))
    if not with_gradients:
        return MaskLosses(*chosen.run(logits, masks, False)[:2])
    return MaskLosses(*_MaskLoss.apply(logits, masks, chosen.run))


def _check(logits: Tensor, masks: Sequence[Tensor]) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be float [N, h, w], got {logits.dtype} {list(logits.shape)}")
    if not masks:
        raise ValueError("masks must be one tensor an image, got none")
    for image, x in enumerate(masks):
        if x.ndim != 3 or x.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"masks of image {image} must be bool [T, height, width], got {x.dtype} {list(x.shape)}")
        if x.device != logits.device:
            raise ValueError(f"masks of image {image} must be on {logits.device}, where the logits are, got {x.device}")
    count = sum(len(x) for x in masks)
    if count != len(logits):
        raise ValueError(f"logits must be of the {count} masks of all images, got {len(logits)}")
    if count and 0 in (*logits.shape, max(x.shape[1] for x in masks), max(x.shape[2] for x in masks)):
        raise ValueError(f"logits and masks must have pixels, got logits {list(logits.shape)}")


class _MaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, masks, run):
        focal, dice, *gradients = run(logits, masks, True)
        ctx.save_for_backward(*gradients)
        ctx.dtype = logits.dtype
        return focal, dice

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_focal, grad_dice):
        return _weighted(ctx, grad_focal, grad_dice), None, None


def _weighted(ctx, grad_focal, grad_dice) -> Tensor:
    of_focal, of_dice = ctx.saved_tensors
    gradient = grad_focal[:, None, None] * of_focal + grad_dice[:, None, None] * of_dice
    return gradient.to(ctx.dtype)


torch.library.define(
    "detr_fast::mask_loss",
    "(Tensor logits, Tensor[] masks, bool with_gradients, str? backend=None) -> "
    "(Tensor mask, Tensor dice, Tensor grad_mask, Tensor grad_dice)",
)


@torch.library.impl("detr_fast::mask_loss", "CompositeExplicitAutograd")
def _node(logits, masks, with_gradients, backend=None):
    chosen = OP.choose(backend, logits)
    if chosen.name != "reference":
        return chosen.run(logits, masks, with_gradients)
    losses = mask_loss_reference(logits, masks)
    if with_gradients:
        return *losses, *mask_loss_reference_gradients(logits, masks)
    return *losses, *(x.new_empty(0) for x in losses)


@torch.library.register_fake("detr_fast::mask_loss")
def _node_fake(logits, masks, with_gradients, backend=None):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2)]
    return *losses, *(logits.new_empty(logits.shape if with_gradients else 0, dtype=dtype) for _ in range(2))


def _setup_context(ctx, inputs, output):
    ctx.dtype, ctx.images = inputs[0].dtype, len(inputs[1])
    ctx.save_for_backward(*output[2:])


def _node_gradient(ctx, grad_focal, grad_dice, *_):
    return _weighted(ctx, grad_focal, grad_dice), [None] * ctx.images, None, None


torch.library.register_autograd("detr_fast::mask_loss", _node_gradient, setup_context=_setup_context)
