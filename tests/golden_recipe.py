"""Deterministic weights, images and targets behind the known answers in this folder. Needs numpy alone."""

import zlib

import numpy as np


def rng_of(name):
    """A generator that depends on the name alone."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def parameter(key, shape):
    """The float32 array that the state-dict entry `key` of this shape was filled with."""
    noise = rng_of(key).standard_normal(tuple(shape), dtype=np.float32)
    if key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    elif key.endswith("running_mean"):
        value = 0.1 * noise
    elif noise.ndim >= 2:
        if key.endswith("query_embed.weight") or "row_embed" in key or "col_embed" in key:
            value = noise
        else:
            fan_in = int(np.prod(shape[1:]))
            value = noise * np.float32(np.sqrt((2.0 if "backbone" in key else 1.0) / fan_in))
    elif key.endswith("weight"):
        value = (0.5 if "backbone" in key else 1.0) + 0.05 * noise
    else:
        value = 0.05 * noise
    return np.ascontiguousarray(value, dtype=np.float32)


def image(index, height, width):
    """A normalised image [3, height, width]."""
    return rng_of(f"image{index}").standard_normal((3, height, width), dtype=np.float32)


def target(index, count, num_classes=91, mask_size=None):
    """Labels [count], boxes [count, 4] cxcywh in [0, 1], and, with mask_size (h, w), masks [count, h, w].

    The masks fill the boxes.
    """
    rng = rng_of(f"target{index}")
    labels = rng.integers(1, num_classes, count)
    centres, sizes = rng.uniform(0.2, 0.8, (count, 2)), rng.uniform(0.05, 0.35, (count, 2))
    boxes = np.concatenate([centres, sizes], 1).astype(np.float32)
    if mask_size is None:
        return labels, boxes
    height, width = mask_size
    masks = np.zeros((count, height, width), bool)
    for mask, (cx, cy), (w, h) in zip(masks, centres, sizes, strict=True):
        rows = slice(int((cy - h / 2) * height), int((cy + h / 2) * height) + 1)
        columns = slice(int((cx - w / 2) * width), int((cx + w / 2) * width) + 1)
        mask[rows, columns] = True
    return labels, boxes, masks
