"""DETR as an installable library: the original's model, matcher and criterion on custom kernels."""

from typing import Any

from detr_fast.build import build_model, model_from_checkpoint
from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import ImageBatch
from detr_fast.matcher import HungarianMatcher
from detr_fast.models.backbone import Backbone, FeatureBackbone, Joiner
from detr_fast.models.detr import MLP, Detr, DetrDemo
from detr_fast.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models.presets import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)
from detr_fast.models.segmentation import DetrSegm
from detr_fast.models.transformer import Transformer
from detr_fast.optimize import optimize
from detr_fast.postprocess import PostProcess
from detr_fast.postprocess_masks import PostProcessPanoptic, PostProcessSegm

# The original's own spellings.
DETR = Detr
DETRdemo = DetrDemo
DETRsegm = DetrSegm

__version__ = "0.1.0"

__all__ = [
    "DETR",
    "MLP",
    "Backbone",
    "DETRdemo",
    "DETRsegm",
    "Detr",
    "DetrDemo",
    "DetrSegm",
    "FeatureBackbone",
    "HungarianMatcher",
    "ImageBatch",
    "Joiner",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
    "PostProcess",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "Predictor",
    "SetCriterion",
    "Transformer",
    "build_model",
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet50_dc5_panoptic",
    "detr_resnet50_panoptic",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_resnet101_panoptic",
    "model_from_checkpoint",
    "optimize",
]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: it needs pillow, which training scripts with their own data do not.
    if name == "Predictor":
        from detr_fast.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
