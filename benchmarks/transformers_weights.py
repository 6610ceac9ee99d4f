"""The weights of the ``transformers`` package's DETR under our names, so that both can be run with the same."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# Their names to ours, one piece of a name at a time.
RENAMES = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers", lambda m: f"backbone.0.body.layer{int(m[1]) + 1}"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.input_projection", "input_proj"),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"\.o_proj", ".out_proj"),
    (r"\.self_attn_layer_norm", ".norm1"),
    (r"(\.encoder\.layers\.\d)\.final_layer_norm", r"\1.norm2"),
    (r"\.encoder_attn_layer_norm", ".norm2"),
    (r"(\.decoder\.layers\.\d)\.final_layer_norm", r"\1.norm3"),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.mlp\.fc", ".linear"),
    (r"^transformer\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
)


def our_name(name: str) -> str:
    """Our name of a parameter of theirs."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def our_state_dict(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names; their three projections of an attention become our one."""
    ours = {our_name(name): value for name, value in theirs.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in theirs:
        if ".q_proj." in name:
            parts = [theirs[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            ours[our_name(name.replace(".q_proj.", ".in_proj_"))] = torch.cat(parts)
    return ours


def their_state_dict(ours: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Our state dict under their ``names``."""
    theirs = {}
    for name in names:
        projection = re.search(r"\.([qkv])_proj\.", name)
        if projection is None:
            theirs[name] = ours[our_name(name)]
        else:
            whole = ours[our_name(name.replace(projection[0], ".in_proj_"))]
            theirs[name] = whole.chunk(3)["qkv".index(projection[1])]
    return theirs
