"""COCO average precision of a model or of a checkpoint, on one process or many."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from detr_fast.build import model_from_checkpoint
from detr_fast.coco_evaluator import STAT_NAMES, CocoEvaluator, CocoResult
from detr_fast.data.batch import ImageBatch, Target, collate
from detr_fast.data.coco import seed_worker
from detr_fast.data.coco_panoptic import open_dataset
from detr_fast.data.target_batch import TargetBatch
from detr_fast.data.transforms import eval_transforms
from detr_fast.distributed import all_gather_objects, is_distributed, is_main
from detr_fast.models.detr import detect
from detr_fast.models.segmentation import DetrSegm
from detr_fast.optimize import optimize, optimizes
from detr_fast.panoptic_evaluator import PanopticEvaluator, PanopticResult
from detr_fast.postprocess import PostProcess
from detr_fast.postprocess_masks import PostProcessPanoptic, PostProcessSegm, things_of_every_class
from detr_fast.sharp_masks import with_sharp_masks

__all__ = ["STAT_NAMES", "CocoEvaluator", "CocoResult", "evaluate", "evaluate_checkpoint"]


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Any, list[Target]]],
    *,
    postprocess: nn.Module,
    evaluator: CocoEvaluator | PanopticEvaluator,
    device: torch.device | str,
    criterion: nn.Module | None = None,
    amp: bool = False,
    optimized: bool = True,
    sharp_masks: bool = False,
) -> tuple[Any, dict[str, float]]:
    """Run a model over a data set and measure its COCO numbers.

    On several processes each one runs its share of the images, and all return the same result; images that a sampler
    repeats to fill its last round count once.

    Args:
        model: samples to the output dictionary; left in the mode it was in.
        loader: batches of (images as ``ImageBatch.of`` takes them, targets with "image_id" and "orig_size"; where
            masks are measured also "size").
        postprocess: (outputs, [B, 2] original sizes) to detections in pixels, or a ``PostProcessPanoptic``.
        evaluator: collects the detections; may hold some already. One for "segm" is given the masks too.
        device: where to run.
        criterion: (outputs, targets) to losses; None measures none.
        amp: run the model in bfloat16 autocast.
        optimized: run an optimised copy of a model that contains a ResNet (see ``optimize``); not with ``amp``, whose
            casts a copy does without.
        sharp_masks: sharpen the masks that are measured (see ``detr_fast.sharp_masks``).

    Returns:
        The evaluator's result, of its first IoU type (see CocoResult, PanopticResult), and the losses averaged over all
        images: those of the criterion and, where it has weights, their weighted sum "loss". Empty without a criterion.

    Raises:
        ValueError: with a criterion, the processes have different numbers of batches (it averages over processes in
            every batch, and would wait for ever).
    """
    if criterion is not None:
        _check_same_length(loader)
    # DistributedDataParallel's forward exchanges buffers, so processes with fewer batches would hang the others.
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if optimized and not amp and optimizes(module):
        module = optimize(module, aux_outputs=criterion is not None)
    device, losses = torch.device(device), _MeanLosses(criterion)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for samples, targets in loader:
                batch = ImageBatch.of(samples).to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    # Few of the masks are looked at, and only a criterion looks at other layers than the last.
                    outputs = detect(module, batch, aux_outputs=None if criterion else False)
                outputs = _to_float32(outputs)
                losses.add(outputs, targets, device)
                if sharp_masks:
                    outputs = with_sharp_masks(outputs, batch.images)
                results = _postprocess(postprocess, outputs, targets, batch, evaluator)
                evaluator.update({int(t["image_id"]): found for t, found in zip(targets, results, strict=True)})
    finally:
        module.train(was_training)
    evaluator.synchronize()
    return evaluator.summarize(), losses.mean()


def evaluate_checkpoint(
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    batch_size: int = 2,
    num_workers: int = 2,
    device: torch.device | str = "cpu",
    size: int = 800,
    max_size: int | None = 1333,
    model_options: Mapping[str, Any] | None = None,
    segments: str | os.PathLike[str] | None = None,
    masks: bool = False,
    sharp_masks: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> CocoResult | PanopticResult:
    """Measure a checkpoint's COCO numbers on a folder of images.

    Args:
        checkpoint: ours or the original's.
        images, annotations: folder and COCO annotation file.
        batch_size, num_workers: images in a batch, and processes that load them.
        device: where to run; in a process group, every process runs its share.
        size, max_size: shortest side of the model's input, and the longest allowed, in pixels.
        model_options: what the file does not tell about its model, such as ``{"dilation": True}`` for a published
            DC5 checkpoint.
        segments: folder of PNGs: the annotations are of COCO's panoptic format, and panoptic quality is measured. A
            segment of a class that they do not have is a false positive.
        masks: measure the average precision of masks, not of boxes.
        sharp_masks: sharpen what masks there are (see ``detr_fast.sharp_masks``).
        output: JSON file that the main process writes; its folder is made.

    Raises:
        ValueError: masks are to be measured, and the model has no mask head.

    Warns:
        UserWarning: the checkpoint's categories have other names than the annotations'.
    """
    model, meta = model_from_checkpoint(checkpoint, **(model_options or {}))
    if (masks or segments is not None) and not isinstance(model, DetrSegm):
        raise ValueError(
            f"{checkpoint} must be of a model with a mask head to measure masks, got a {type(model).__name__}"
        )
    dataset = open_dataset(images, annotations, segments, eval_transforms(size, max_size), masks=False)
    _warn_of_other_names(meta.categories, dataset.categories)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, shuffle=False) if is_distributed() else None,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=seed_worker,
        pin_memory=torch.device(device).type == "cuda",
    )
    postprocess: nn.Module = PostProcess()
    evaluator: CocoEvaluator | PanopticEvaluator
    if segments is not None:
        assert isinstance(model, DetrSegm)
        evaluator = PanopticEvaluator(annotations, segments, names=meta.categories)
        classes = model.detr.class_embed.out_features - 1
        postprocess = PostProcessPanoptic(
            things_of_every_class(classes, {**meta.is_thing_map, **evaluator.is_thing_map})
        )
    else:
        evaluator = CocoEvaluator(annotations, ("segm",) if masks else ("bbox",))
    result, _ = evaluate(
        model.to(device),
        loader,
        postprocess=postprocess,
        evaluator=evaluator,
        device=device,
        sharp_masks=sharp_masks and isinstance(model, DetrSegm),
    )
    if output is not None and is_main():
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(result.to_json() + "\n")
    return result


def _postprocess(
    postprocess: nn.Module, outputs: dict[str, Any], targets: list[Target], batch: ImageBatch, evaluator: Any
) -> list[dict[str, Any]]:
    sizes = torch.stack([target["orig_size"] for target in targets])
    if isinstance(postprocess, PostProcessPanoptic):
        height, width = batch.images.shape[-2:]
        return postprocess(outputs, torch.stack([target["size"] for target in targets]), sizes, frame=(height, width))
    results = postprocess(outputs, sizes.to(batch.images.device))
    if "segm" in getattr(evaluator, "iou_types", ()):
        results = PostProcessSegm()(results, outputs, sizes, torch.stack([target["size"] for target in targets]))
    return results


class _MeanLosses:
    """Averages a criterion's losses over images and processes, and waits for the device only at the end."""

    def __init__(self, criterion: nn.Module | None) -> None:
        self.criterion = criterion
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, outputs: dict[str, Any], targets: list[Target], device: torch.device) -> None:
        if self.criterion is None:
            return
        on_device = TargetBatch.of(targets).to(device, non_blocking=True)
        losses = dict(self.criterion(outputs, on_device))
        weights = getattr(self.criterion, "weight_dict", {})
        if weights:
            losses["loss"] = torch.stack([losses[key] * weights[key] for key in losses if key in weights]).sum()
        self.images += len(targets)
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, torch.zeros((), device=device)) + value * len(targets)

    def mean(self) -> dict[str, float]:
        shares = all_gather_objects((self.images, {key: float(value) for key, value in self.sums.items()}))
        images = sum(count for count, _ in shares)
        names = dict.fromkeys(name for _, sums in shares for name in sums)
        return {name: sum(sums.get(name, 0.0) for _, sums in shares) / images for name in names}


def _to_float32(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {key: _to_float32(value) for key, value in outputs.items()}
    return [_to_float32(value) for value in outputs] if isinstance(outputs, list) else outputs


def _check_same_length(loader: Iterable[Any]) -> None:
    lengths = all_gather_objects(len(loader) if isinstance(loader, Sized) else None)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"with a criterion, loader must have the same number of batches on every process, got {lengths}: "
            "a DistributedSampler sees to it"
        )


def _warn_of_other_names(trained: dict[int, str], annotated: dict[int, str]) -> None:
    shared = trained.keys() & annotated.keys()
    differing = [f"{key}: {trained[key]!r} and {annotated[key]!r}" for key in shared if trained[key] != annotated[key]]
    missing = sorted(annotated.keys() - trained.keys()) if trained else []
    if differing or missing:
        parts = [f"ids with another name: {', '.join(differing[:5])}"] if differing else []
        parts += [f"ids that the checkpoint lacks: {missing[:5]}"] if missing else []
        warnings.warn(f"the checkpoint's categories are not the annotations' ({'; '.join(parts)})", stacklevel=3)
