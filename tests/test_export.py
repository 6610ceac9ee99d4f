"""Models as files for other runtimes: the graph's answers, what is in a file, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import small_detr
from stand_ins import tiny_args
from torch import nn

from detr_fast import DetrDemo, DetrSegm, ImageBatch, PostProcess
from detr_fast.build import model_from_args
from detr_fast.checkpoint import save_checkpoint
from detr_fast.cli import main
from detr_fast.export import ExportError, export_checkpoint, export_model, verify
from detr_fast.models.backbone import BasicBlock, ResNet
from detr_fast.models.portable import PortableDetr, fold_batch_norms, padding_of
from detr_fast.optimize import optimize

onnxruntime = pytest.importorskip("onnxruntime", reason="export is checked in onnxruntime")


def small_model(**changes: Any) -> nn.Module:
    return model_from_args(tiny_args(**({"dec_layers": 2, "aux_loss": True} | changes))).eval()


def small_segm() -> DetrSegm:
    """With four maps of a network of half a ResNet-18's depth, and norms that do something."""
    model = small_model(backbone="resnet18", masks=True)
    model.detr.backbone[0].body = ResNet(BasicBlock, (1, 1, 1, 1), width=8)
    model = DetrSegm(model.detr, fpn_dims=(32, 16, 8))
    model.detr.backbone[0].num_channels = 64
    model.detr.input_proj = nn.Conv2d(64, 16, 1)
    return randomise_norms(model).eval()


def randomise_norms(model: nn.Module) -> Any:
    for module in model.modules():
        if hasattr(module, "running_var"):
            for name, low in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.5)):
                getattr(module, name).data.uniform_(low, low + 1)
    return model


MODELS = {
    "post-norm": lambda: small_model(),
    "pre-norm": lambda: small_model(pre_norm=True),
    "learned positions": lambda: small_model(position_embedding="learned"),
    "one decoder layer": lambda: small_model(dec_layers=1),
    "no encoder": lambda: small_model(enc_layers=0),
    "another backbone": lambda: small_detr().eval(),
    "masks": small_segm,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_portable_model_is_the_model(name: str) -> None:
    model = randomise_norms(MODELS[name]()).double()
    portable = PortableDetr(model)
    images = [torch.randn(3, height, width, dtype=torch.float64) for height, width in ((75, 100), (128, 83), (60, 61))]
    batch = ImageBatch.of(images)
    with torch.no_grad():
        for answer, expected in (
            (portable(batch.images, torch.tensor(batch.sizes)), model(batch, aux_outputs=False)),
            (portable(batch.images), model(batch.images, aux_outputs=False)),
        ):
            assert answer.keys() == expected.keys()
            for key in answer:
                torch.testing.assert_close(answer[key], expected[key], atol=1e-10, rtol=1e-10)
    assert not any(parameter.requires_grad for parameter in portable.parameters())
    assert not any(
        isinstance(module, nn.BatchNorm2d) or "Frozen" in type(module).__name__ for module in portable.modules()
    )


def test_padding_is_what_interpolation_of_the_mask_says() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    for _ in range(60):
        (height, width), (h, w) = (
            torch.randint(*span, (2,), generator=generator).tolist() for span in ((1, 900), (1, 60))
        )
        sizes = torch.stack([torch.randint(1, n + 1, (3,), generator=generator) for n in (height, width)], 1)
        mask = torch.ones(3, height, width)
        for image, (valid_height, valid_width) in zip(mask, sizes.tolist(), strict=True):
            image[:valid_height, :valid_width] = 0
        expected = nn.functional.interpolate(mask[None], size=(h, w))[0].bool()
        images, features = torch.empty(3, 3, height, width), torch.empty(3, 1, h, w)
        assert torch.equal(padding_of(sizes, images, features), expected), (height, width, h, w, sizes)


def test_a_norm_without_its_convolution_stays() -> None:
    block = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    randomise_norms(block)
    x = torch.randn(2, 3, 5, 5)
    expected = block(x)
    folded = fold_batch_norms(block)
    assert [type(module).__name__ for module in folded] == ["ReLU", "BatchNorm2d", "Conv2d", "Identity"]
    torch.testing.assert_close(folded(x), expected)


def test_onnx_with_masks_and_padding(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, path = small_segm(), tmp_path / "new" / "model.onnx"
    export_model(model, path, padding=True, metadata={"categories": {1: "cat"}})
    assert list(path.parent.iterdir()) == [path]
    assert list(verify(model, path, padding=True)) == ["pred_logits", "pred_boxes", "pred_masks"]
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 18)]
    operators = Counter(node.op_type for node in file.graph.node)
    assert "BatchNormalization" not in operators and operators["Softmax"] == 4 + 1, "four attentions, one mask head"
    assert not any(node.domain for node in file.graph.node)
    assert b".py" not in file.SerializeToString(), "no stack traces"
    axes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    assert axes == {
        "images": ["batch", 3, "height", "width"],
        "sizes": ["batch", 2],
        "pred_logits": ["batch", 5, 5],
        "pred_boxes": ["batch", 5, 4],
        "pred_masks": ["batch", 5, "mask_height", "mask_width"],
    }
    inner = [size.dim_param for value in file.graph.value_info for size in value.type.tensor_type.shape.dim]
    assert "batch" in inner and not any(re.search(r"\bs\d+\b", name) for name in inner)
    (metadata,) = file.metadata_props
    assert metadata.key == "detr_fast" and json.loads(metadata.value) == {"categories": {"1": "cat"}}

    with torch.no_grad():
        model.detr.class_embed.bias += 0.1
    with pytest.raises(ExportError, match=r"model\.onnx differs from the model: pred_logits by 0\.1"):
        verify(model, path, padding=True)


def test_exported_program(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "model.pt2"
    export_model(model, path, format="torch-export", metadata={"size": 32})
    verify(model, path, format="torch-export")
    extra = {"detr_fast": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["detr_fast"]) == {"size": 32}
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets
    assert not any("detr_fast" in target for target in targets)


def test_a_program_takes_images_of_any_size(tmp_path: Path) -> None:
    """Of one pixel a side, and of maps of one cell in either direction."""
    model, path = small_model(), tmp_path / "model.pt2"
    export_model(model, path, format="torch-export")
    run = torch.export.load(path).module()
    for batch, height, width in ((1, 1, 1), (2, 1, 40), (1, 200, 9), (3, 32, 33), (1, 33, 32), (2, 100, 70)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(images)
        for name, answer in run(images, None).items():
            # Rounding comes to 2e-6 in 200 such images.
            torch.testing.assert_close(answer, expected[name], atol=1e-4, rtol=1e-4)


def test_learned_positions_keep_their_bound(tmp_path: Path) -> None:
    model, path = small_model(position_embedding="learned"), tmp_path / "model.pt2"
    export_model(model, path, format="torch-export")
    verify(model, path, format="torch-export")
    with pytest.raises((RuntimeError, AssertionError), match="800"):  # 50 cells of 16 pixels
        torch.export.load(path).module()(torch.randn(1, 3, 32, 801), None)


def test_command_on_a_trained_models_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = vars(tiny_args()) | {"scales": [48], "max_size": 64}
    model = model_from_args(SimpleNamespace(**args)).eval()
    save_checkpoint({"model": model.state_dict(), "args": args, "categories": {3: "dog"}}, tmp_path / "run.pth")
    monkeypatch.setattr(sys, "argv", ["detr-fast", "export", str(tmp_path / "run.pth")])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert not ended.value.code and not printed.err
    assert re.search(
        r"run\.onnx written, \d\.\d MiB\nverified on 1x3x128x192, .*: pred_logits \d\.\de-0\d, pred_boxes", printed.out
    )

    session = onnxruntime.InferenceSession(tmp_path / "run.onnx", providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["detr_fast"])
    assert metadata["categories"] == {"3": "dog"} and (metadata["size"], metadata["max_size"]) == (48, 64)
    images = torch.randn(2, 3, 48, 61)
    logits, boxes = map(torch.from_numpy, session.run(["pred_logits", "pred_boxes"], {"images": images.numpy()}))
    sizes = torch.tensor([[480, 610]] * 2)
    found = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, sizes)
    with torch.no_grad():
        expected = PostProcess()(model(images), sizes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"])
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of onnx, torch-export, got 'tflite'"),
        ({"opset": 12}, "opset must be from 18 to 23, got 12"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    for export, source in ((export_model, small_model()), (export_checkpoint, "none.pth")):
        with pytest.raises(ValueError, match=message):
            export(source, tmp_path / "a.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = small_model()
    other.transformer = nn.Transformer(16, 2, 1, 1)
    strange = small_model()
    strange.backbone[1] = nn.Identity()
    for model, message in (
        (DetrDemo(3, hidden_dim=16, nheads=2), "model must be a Detr or a DetrSegm, got DetrDemo"),
        (other, "transformer must be detr_fast's Transformer with a decoder, got Transformer"),
        (optimize(small_model(backbone="resnet18")), "must be the one that was optimised, got the optimised copy"),
        (strange, "positions must be sine or learned, got Identity"),
    ):
        with pytest.raises(TypeError, match=message):
            export_model(model, tmp_path / "a.onnx")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("detr_fast.export.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript: pip install 'detr_fast\[export\]'"):
        export_model(small_model(), tmp_path / "a.onnx")
