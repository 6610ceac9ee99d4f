"""Detection on pictures in memory or by path: ``Predictor``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast.attention_maps import AttentionMaps, capture_attention, point_tokens
from detr_fast.build import model_from_checkpoint
from detr_fast.data.batch import ImageBatch
from detr_fast.data.images import load_image, to_rgb
from detr_fast.data.transforms import eval_transforms
from detr_fast.drawing import draw_boxes
from detr_fast.models.detr import detect
from detr_fast.models.segmentation import DetrSegm
from detr_fast.optimize import optimize, optimizes
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.postprocess import PostProcess
from detr_fast.postprocess_masks import PostProcessPanoptic, things_of_every_class
from detr_fast.sharp_masks import with_sharp_masks

Picture: TypeAlias = "Image.Image | np.ndarray[Any, Any] | Tensor | str | os.PathLike[str] | PreparedImage"


@dataclass(frozen=True)
class PreparedImage:
    """An image that is ready for the model.

    Attributes:
        picture: 8-bit RGB.
        pixels: [3, height, width] float32 on the CPU, scaled and normalised.
    """

    picture: Image.Image
    pixels: Tensor


@dataclass(frozen=True)
class Prediction:
    """The detections of one image, best first; all tensors are on the CPU.

    Attributes:
        scores: [N] float32 in [0, 1].
        labels: [N] int64 category ids.
        boxes_xyxy_px: [N, 4] float32, corners in pixels of the image as given; they may reach over its edge.
        names: N category names; a category without one is called "class <id>".
        queries: [N] int64, the object query behind each detection.
        size: (height, width) of the image in pixels.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy_px: Tensor
    names: list[str]
    queries: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Prediction:
        """Give the ``count`` best detections."""
        return Prediction(
            scores=self.scores[:count],
            labels=self.labels[:count],
            boxes_xyxy_px=self.boxes_xyxy_px[:count],
            names=self.names[:count],
            queries=self.queries[:count],
            size=self.size,
        )

    def centres_px(self) -> list[tuple[float, float]]:
        """Give the centres (x, y) of the boxes in pixels, moved to the image's edge where they lie outside."""
        height, width = self.size
        centres = (self.boxes_xyxy_px[:, :2] + self.boxes_xyxy_px[:, 2:]) / 2
        return [(min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))) for x, y in centres.tolist()]

    def draw(self, image: Image.Image, *, min_size: int = 0) -> Image.Image:
        """Draw the boxes with names and scores on a copy of ``image``; ``min_size`` as of ``draw_boxes``."""
        labels, scores = self.labels.tolist(), self.scores.tolist()
        return draw_boxes(image, self.boxes_xyxy_px, labels, self.names, scores, min_size=min_size)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Give the detections in COCO's results format; ``bbox`` is x, y, width, height in pixels."""
        boxes_xywh_px = torch.cat((self.boxes_xyxy_px[:, :2], self.boxes_xyxy_px[:, 2:] - self.boxes_xyxy_px[:, :2]), 1)
        columns = zip(self.labels.tolist(), boxes_xywh_px.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score} for label, box, score in columns
        ]


class Predictor:
    """Detect objects in pictures with a trained model.

    The model runs in eval mode and inference mode and is left in the mode it was found in.

    Args:
        model: a ``Detr``, or any module that maps an ``ImageBatch`` to ``pred_logits`` and ``pred_boxes``.
        categories: the name of each category id.
        threshold: only detections with a higher score are given.
        size: images are scaled until the shorter side has so many pixels,
        max_size: but the longer side not more than these.
        batch_size: how many images go through the model together; they are padded to a common size.
        device: the model is moved there; None leaves it where it is.
        is_thing_map: category id to whether it is a thing (True) or stuff, which ``panoptic`` needs to know.
        optimized: run an optimised copy of a model that contains a ResNet (see ``optimize``); what is done to the model
            later does not change the copy. Otherwise the model itself. The options of ``optimize``, such as
            ``{"cuda_graph": True}``, ask for a copy of any model; their ``calibration`` is pictures, as of a call.
        sharp_masks: sharpen the outlines of segments by the image's colours (see ``detr_fast.sharp_masks``).

    Raises:
        ValueError: ``threshold`` is outside [0, 1], or a size is not positive; or as ``optimize``.
    """

    def __init__(
        self,
        model: nn.Module,
        categories: Mapping[int, str] | None = None,
        *,
        threshold: float = 0.7,
        size: int = 800,
        max_size: int = 1333,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        is_thing_map: Mapping[int, bool] | None = None,
        optimized: bool | Mapping[str, Any] = True,
        sharp_masks: bool = False,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        for name, value in (("size", size), ("max_size", max_size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        model = model if device is None else model.to(device)
        self.categories = {int(number): name for number, name in (categories or {}).items()}
        self.is_thing_map = {int(number): bool(thing) for number, thing in (is_thing_map or {}).items()}
        self.sharp_masks = sharp_masks
        self.threshold = threshold
        self.batch_size = batch_size
        self._transform = eval_transforms(size, max_size)
        self.model = self._optimized(model, optimized)
        self._postprocess = PostProcess()

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, model_options: Mapping[str, Any] | None = None, **settings: Any
    ) -> Predictor:
        """Rebuild the model of a checkpoint, with its category names and which of them are things.

        Args:
            path: the checkpoint.
            model_options: what the file does not tell about its model, such as ``{"dilation": True}`` for a published
                DC5.
            settings: of ``Predictor``; ``size`` and ``max_size`` are by default those that the model was evaluated at,
                ``categories`` and ``is_thing_map`` the checkpoint's.

        Raises:
            CheckpointError: the file cannot be read or is not a DETR's.
        """
        model, meta = model_from_checkpoint(path, **(model_options or {}))
        if "scales" in meta.args:
            settings.setdefault("size", max(meta.args["scales"]))
            settings.setdefault("max_size", meta.args["max_size"])
        return cls(model, **{"categories": meta.categories, "is_thing_map": meta.is_thing_map, **settings})

    def _optimized(self, model: nn.Module, optimized: bool | Mapping[str, Any]) -> nn.Module:
        if not isinstance(optimized, Mapping):
            return optimize(model) if optimized and optimizes(model) else model
        options = dict(optimized)
        if "calibration" in options:
            options["calibration"] = [self.prepare(picture).pixels for picture in _listed(options["calibration"])]
        return optimize(model, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def prepare(self, image: Picture) -> PreparedImage:
        """Do what comes before the model, such as in threads beside it; a call takes the result as an image.

        Raises:
            ValueError, TypeError, ImageError: as a call.
        """
        if isinstance(image, PreparedImage):
            return image
        picture = to_picture(image)
        return PreparedImage(picture, self._transform(picture, {})[0])

    def __call__(self, images: Picture | Sequence[Picture]) -> list[Prediction]:
        """Detect the objects of one or several images.

        Args:
            images: a PIL image of any mode, a uint8 array [height, width, 3] (RGB) or [height, width] (grey), a tensor
                [3, height, width] of uint8 or of floats in [0, 1], the path of an image file, what ``prepare`` made of
                one of these, or a list. Floats are rounded to 8 bits.

        Returns:
            One ``Prediction`` for each image, for a single image too. Waits for the device.

        Raises:
            ValueError: there is no image, or the shape or range of one is not as above.
            TypeError: something is none of these.
            ImageError: a file is no image or damaged.
        """
        listed = _listed(images)
        predictions: list[Prediction] = []
        with _evaluating(self.model), torch.inference_mode():
            for start in range(0, len(listed), self.batch_size):
                predictions += self._predict([self.prepare(image) for image in listed[start : start + self.batch_size]])
        return predictions

    def panoptic(self, images: Picture | Sequence[Picture], *, threshold: float = 0.85) -> list[PanopticPrediction]:
        """Divide one or several images into things and stuff.

        Where the model knows no stuff, what is in no thing's mask is of no segment.

        Args:
            images: as for a call.
            threshold: queries whose best class is less probable are left out.

        Returns:
            One ``PanopticPrediction`` for each image. Waits for the device.

        Raises:
            TypeError: the model has no mask head, or something is no image.
            ValueError: it is not known which classes are things, ``threshold`` is outside [0, 1], or as for a call.
            ImageError: a file is no image or damaged.
        """
        postprocess = PostProcessPanoptic(self.things(), threshold, void=all(self.is_thing_map.values()))
        listed = _listed(images)
        found: list[PanopticPrediction] = []
        with _evaluating(self.model), torch.inference_mode():
            for start in range(0, len(listed), self.batch_size):
                prepared = [self.prepare(image) for image in listed[start : start + self.batch_size]]
                batch, processed = self._batch(prepared)
                frame = (batch.images.shape[-2], batch.images.shape[-1])
                outputs = detect(self.model, batch)
                if self.sharp_masks:
                    outputs = with_sharp_masks(outputs, batch.images)
                segments = postprocess.segment(outputs, processed, _sizes(prepared), frame=frame)
                found += [PanopticPrediction.of(image, self.categories) for image in segments]
        return found

    def things(self) -> dict[int, bool]:
        """Class id to whether it is a thing (True) or stuff; what ``is_thing_map`` lacks, as ids between others, is.

        Raises:
            TypeError, ValueError: as ``panoptic``.
        """
        if not isinstance(self.model, DetrSegm):
            raise TypeError(
                f"a panoptic segmentation needs a model with a mask head, got a {type(self.model).__name__}"
            )
        if not self.is_thing_map:
            raise ValueError("is_thing_map must say which classes are things: neither the checkpoint nor the call does")
        return things_of_every_class(self.model.detr.class_embed.out_features - 1, self.is_thing_map)

    def attention(
        self,
        image: Picture,
        *,
        points_px: Sequence[tuple[float, float]] | None = None,
        max_detections: int = 4,
    ) -> AttentionMaps:
        """Give the decoder's attention of the best detections and the encoder's self-attention of points.

        Args:
            image: one image, as for a call.
            points_px: points (x, y) in pixels; None takes the centres of these detections, or of the image without any.
            max_detections: how many of the best detections.

        Raises:
            TypeError: the model is not a ``Detr``.
            PointError: a point lies outside the image.
        """
        prepared = self.prepare(image)
        picture = prepared.picture
        with _evaluating(self.model), torch.inference_mode(), capture_attention(self.model) as capture:
            prediction = self._predict([prepared])[0].first(max_detections)
            points = _points(prediction, picture) if points_px is None else list(points_px)
            tokens = point_tokens(points, prediction.size, capture.feature_size)
            decoder = capture.decoder_maps(prediction.queries)[0].float().cpu()
            encoder = capture.encoder_maps(tokens)[0].float().cpu()
        return AttentionMaps(picture, prediction, decoder, points, encoder)

    def _predict(self, images: list[PreparedImage]) -> list[Prediction]:
        batch, _ = self._batch(images)
        sizes = torch.tensor(_sizes(images), device=batch.images.device)
        detections = self._postprocess(detect(self.model, batch), sizes)
        return [self._select(found, size) for found, size in zip(detections, _sizes(images), strict=True)]

    def _batch(self, images: list[PreparedImage]) -> tuple[ImageBatch, list[tuple[int, int]]]:
        """The model's input, and (height, width) of each image in it."""
        pixels = [image.pixels for image in images]
        return ImageBatch.of(pixels).to(self.device), [(x.shape[-2], x.shape[-1]) for x in pixels]

    def _select(self, found: Mapping[str, Tensor], size: tuple[int, int]) -> Prediction:
        scores, labels, boxes = (found[key].cpu() for key in ("scores", "labels", "boxes"))
        queries = scores.argsort(descending=True, stable=True)
        queries = queries[scores[queries] > self.threshold]
        labels = labels[queries]
        return Prediction(
            scores=scores[queries].float(),
            labels=labels,
            boxes_xyxy_px=boxes[queries].float(),
            names=[self.categories.get(label, f"class {label}") for label in labels.tolist()],
            queries=queries,
            size=size,
        )


def to_picture(image: Picture) -> Image.Image:
    """Turn any image that ``Predictor`` takes into an 8-bit RGB picture."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return load_image(image)
    if isinstance(image, np.ndarray):
        return _picture_of_array(image)
    if isinstance(image, Tensor):
        return _picture_of_tensor(image)
    raise TypeError(f"images must be PIL images, arrays, tensors or paths, got {type(image).__name__}")


def _picture_of_array(image: np.ndarray[Any, Any]) -> Image.Image:
    is_grey, is_rgb = image.ndim == 2, image.ndim == 3 and image.shape[-1] == 3
    if image.dtype != np.uint8 or not (is_grey or is_rgb) or 0 in image.shape:
        raise ValueError(
            f"an image array must be uint8 [height, width, 3] or [height, width], got {image.dtype} {list(image.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def _picture_of_tensor(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"an image tensor must be [3, height, width], got {list(image.shape)}")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        # Not "low < 0 or high > 1": NaN must not pass.
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"an image tensor of floats must be in [0, 1] and not normalised, got values from {low:g} to {high:g}"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"an image tensor must be uint8 or floating point, got {pixels.dtype}")
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    if isinstance(images, (Image.Image, str, os.PathLike, PreparedImage)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4:
        return [images]
    # Anything else is a list of images; a four-dimensional array or tensor is one too.
    listed = list(images)
    if not listed:
        raise ValueError("images must hold at least one image, got none")
    return listed


def _sizes(images: list[PreparedImage]) -> list[tuple[int, int]]:
    return [(image.picture.height, image.picture.width) for image in images]


def _points(prediction: Prediction, picture: Image.Image) -> list[tuple[float, float]]:
    return prediction.centres_px() or [(picture.width / 2, picture.height / 2)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode, and every module of it back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not model.train(): a part that was frozen in eval mode would start to train.
        for module, training in modes:
            module.training = training
