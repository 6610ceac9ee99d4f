"""All layers of a transformer in one call, for inference."""

from detr_fast.ops.transformer_layers.api import transformer_layers
from detr_fast.ops.transformer_layers.types import DecoderLayer, EncoderLayer, Norm, TransformerLayers

__all__ = ["DecoderLayer", "EncoderLayer", "Norm", "TransformerLayers", "transformer_layers"]
