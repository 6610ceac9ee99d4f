"""A whole DETR in each of the ways that people run one: [B, 3, H, W] images to (logits, boxes)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.original_model import OriginalDetr
from benchmarks.shapes import InferenceShape
from benchmarks.transformers_weights import their_state_dict
from detr_fast import Detr, optimize
from detr_fast.build import model_from_args

Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def model_of(shape: InferenceShape) -> Detr:
    """Random weights, the same in every process, with batch norms that keep activations in proportion."""
    torch.manual_seed(0)
    model = model_from_args(SimpleNamespace(backbone=shape.backbone, dilation=shape.dilation, dropout=0.0))
    for name, buffer in model.named_buffers():
        if name.endswith("weight"):
            nn.init.uniform_(buffer, 0.4, 0.6)
    # Of random weights all queries' boxes would be nearly the same, and errors in them would not show.
    model.bbox_embed.layers[-1].weight.data *= 100
    return model.eval()


class LastLayer(nn.Module):
    """The original's way without padding: [B, 3, H, W] images to the last layer's (logits, boxes)."""

    def __init__(self, model: Detr, *, need_weights: bool = True) -> None:
        super().__init__()
        body = model.backbone[0].body
        name = "resnet50" if len(body.layer3) == 6 else "resnet101"
        dilation = body.layer4[0].conv2.stride == (1, 1)
        self.whole = OriginalDetr(backbone=name, dilation=dilation, need_weights=need_weights)
        self.whole.load_state_dict(model.state_dict())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.whole(images, torch.zeros_like(images[:, 0], dtype=torch.bool))[-1]
        return outputs["pred_logits"], outputs["pred_boxes"]


def original(model: Detr, images: Tensor) -> Run:
    """The original's way."""
    return LastLayer(model)


def ours(model: Detr, images: Tensor) -> Run:
    """``optimize``."""
    return _pairs(optimize(model))


def bfloat16(model: Detr, images: Tensor) -> Run:
    """``optimize`` in bfloat16."""
    return _pairs(optimize(model, dtype=torch.bfloat16))


def int8(model: Detr, images: Tensor) -> Run:
    """``optimize`` in 8-bit integers, calibrated on the images themselves."""
    return _pairs(optimize(model, dtype=torch.int8, calibration=images))


def _pairs(model: nn.Module) -> Run:
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(images)
        return outputs["pred_logits"], outputs["pred_boxes"]

    return run


def transformers(model: Detr, images: Tensor) -> Run:
    """The package's DETR with its own ResNet."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"])
    theirs = DetrForObjectDetection(DetrConfig(use_timm_backbone=False, backbone_config=backbone, num_labels=91)).eval()
    theirs.load_state_dict(their_state_dict(model.state_dict(), theirs.state_dict()))

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = theirs(images)
        return outputs.logits, outputs.pred_boxes

    return run


def compiled(model: Detr, images: Tensor) -> Run:
    """``torch.compile`` with frozen weights, of the original's way."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(LastLayer(model, need_weights=False))


def onnxruntime(model: Detr, images: Tensor) -> Run:
    """ONNX Runtime on a graph of this size alone."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would wait for work at full speed while the next contestant runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(onnx_graph(model, images), options)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return run


def openvino(model: Detr, images: Tensor) -> Run:
    """OpenVINO on a graph of this size alone, in float32."""
    from openvino import Core

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = Core()
    graph = core.read_model(onnx_graph(model, images))
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        found = request.infer({0: images.numpy()})
        logits, boxes = found.values()
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return run


@lru_cache(maxsize=1)
def onnx_graph(model: Detr, images: Tensor) -> bytes:
    """Of plain attention and of batch norms that both runtimes, which ask for it in turn, fold by themselves."""
    plain = LastLayer(model, need_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            plain, (images,), str(path), dynamo=False, input_names=["images"], output_names=["logits", "boxes"]
        )
        return path.read_bytes()


WAYS: dict[str, Callable[[Detr, Tensor], Run]] = {
    "original": original,
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch.compile": compiled,
    "detr_fast": ours,
    "detr_fast-bf16": bfloat16,
    "detr_fast-int8": int8,
}
