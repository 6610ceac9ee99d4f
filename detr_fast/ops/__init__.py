"""The fast primitives of set prediction. They know nothing of models.

Letters in shapes, here and in the C++:
    B images, Q queries, C classes (logits have C + 1, no-object last), L decoder layers, D hidden size, H heads,
    E head size, S memory tokens, N targets of the whole batch, T targets of one image, P problems (an image of a
    layer).

Bare ``boxes`` are cxcywh in [0, 1]; ``boxes_xyxy`` are corners in any unit. In masks True means padding.
"""

from detr_fast.ops.add_layer_norm import add_layer_norm
from detr_fast.ops.assignment import AssignmentOutcome, AssignmentReport, assignment, solve_assignment
from detr_fast.ops.attention import TokenOffsets, attention, attention_weights
from detr_fast.ops.boxes import (
    box_area,
    cxcywh_to_xyxy,
    elementwise_giou,
    elementwise_iou,
    pairwise_giou,
    pairwise_iou,
    xyxy_to_cxcywh,
)
from detr_fast.ops.conv import PackedConv, conv, pack_conv
from detr_fast.ops.conv_blocks import PackedBlock, PackedBlocks, conv_blocks, conv_blocks_memory
from detr_fast.ops.conv_int8 import PackedConvInt8, Steps, conv_int8, to_bytes
from detr_fast.ops.conv_max_pool import conv_max_pool
from detr_fast.ops.dropout import Dropout
from detr_fast.ops.mask_argmax import Places, mask_argmax
from detr_fast.ops.mask_loss import MaskLosses, mask_loss
from detr_fast.ops.mask_threshold import mask_threshold
from detr_fast.ops.matching import Matching, matching
from detr_fast.ops.matching_cost import CostWeights, MatchingCost, PackedTargets, PaddedTargets, matching_cost
from detr_fast.ops.relu_dropout import relu_dropout
from detr_fast.ops.residual_block import FrozenConv, residual_block
from detr_fast.ops.set_criterion import MatchedLosses, set_criterion
from detr_fast.ops.set_loss import CrossEntropy, Focal, SetLosses, Varifocal, set_loss
from detr_fast.ops.transformer_layers import DecoderLayer, EncoderLayer, Norm, TransformerLayers, transformer_layers

__all__ = [
    "AssignmentOutcome",
    "AssignmentReport",
    "CostWeights",
    "CrossEntropy",
    "DecoderLayer",
    "Dropout",
    "EncoderLayer",
    "Focal",
    "FrozenConv",
    "MaskLosses",
    "MatchedLosses",
    "Matching",
    "MatchingCost",
    "Norm",
    "PackedBlock",
    "PackedBlocks",
    "PackedConv",
    "PackedConvInt8",
    "PackedTargets",
    "PaddedTargets",
    "Places",
    "SetLosses",
    "Steps",
    "TokenOffsets",
    "TransformerLayers",
    "Varifocal",
    "add_layer_norm",
    "assignment",
    "attention",
    "attention_weights",
    "box_area",
    "conv",
    "conv_blocks",
    "conv_blocks_memory",
    "conv_int8",
    "conv_max_pool",
    "cxcywh_to_xyxy",
    "elementwise_giou",
    "elementwise_iou",
    "mask_argmax",
    "mask_loss",
    "mask_threshold",
    "matching",
    "matching_cost",
    "pack_conv",
    "pairwise_giou",
    "pairwise_iou",
    "relu_dropout",
    "residual_block",
    "set_criterion",
    "set_loss",
    "solve_assignment",
    "to_bytes",
    "transformer_layers",
    "xyxy_to_cxcywh",
]
