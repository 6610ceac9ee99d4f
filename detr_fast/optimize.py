"""``optimize``: a copy of a trained model that computes the same in less time, for inference alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detr_fast.data.batch import ImageBatch
from detr_fast.graphed_inference import GraphedForward, GraphSizes
from detr_fast.models.backbone import Backbone, ResNet
from detr_fast.models.detr import Detr
from detr_fast.models.packed_resnet import PackedResNet, can_pack
from detr_fast.models.packed_resnet_int8 import Calibration
from detr_fast.models.packed_transformer import pack_heads, pack_transformer, packed_weights
from detr_fast.models.segmentation import DetrSegm
from detr_fast.models.transformer import Transformer

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    calibration: Tensor | ImageBatch | Iterable[Any] | None = None,
    aux_outputs: bool = False,
    compile: bool = False,
    cuda_graph: bool | GraphSizes = False,
) -> Model:
    """Make an inference copy of a model.

    Every ResNet in it becomes a ``PackedResNet``: batch norms folded into weights that lie as the convolutions read
    them, bias, sum and ReLU inside the convolutions, and large maps in memory that is used again by the next call. Any
    other backbone, and a ResNet with other norms, stays as it is. A ``Transformer`` in float32 on a CPU has
    the weights of its linear layers packed, as has a ``Detr`` those before and after it.

    The copy takes the arguments of the model and images of any size; it can be pickled, copied, moved to a device and
    called by several threads at once. It is in eval mode, needs no gradients, and has no packed weights in its
    ``state_dict``: keep the model itself for training on and for checkpoints.

    Args:
        model: a ``Detr``, a ``DetrSegm``, or a module that contains a ``ResNet``; stays as it is.
        dtype: torch.bfloat16 for a float32 model: ResNets and transformers compute in it, with 8 bits of precision, and
            what comes out is float32. None keeps the model's own, and its answers but for rounding. The demo's model,
            whose backbone is no ResNet, has AP 0.3816 with it, not 0.3820 (``python -m benchmarks.precision``).
            torch.int8 for a float32 model on a CPU: the convolutions of ResNets, but for their stem, compute in 8-bit
            integers, and all else in float32. A narrow ResNet-18 trained on the demo's digits for a few minutes has AP
            0.0432 with it, not 0.0433, and AP50 0.1227, not 0.1213 (``python -m benchmarks.precision_resnet``).
        calibration: with torch.int8, images like those to come: a batch, or some of them, as the model takes them. What
            is highest in a map of theirs is the highest that 8 bits stand for; later images are cut off there.
        aux_outputs: go on returning the outputs of the earlier decoder layers, where the model does; losses need them.
        compile: compile the transformer with ``torch.compile``, for any size, at its first call. It needs a C++
            compiler, and a pickle of the copy is not compiled.
        cuda_graph: run a ``Detr`` or ``DetrSegm`` on a GPU as a CUDA graph of each size that comes twice, see
            ``GraphedForward``; a ``GraphSizes`` says which batches share one, and how many there may be. It has not run
            on a GPU yet.

    Raises:
        ValueError: ``dtype`` is another one, there is no GPU for ``cuda_graph``, or its sizes do not fit the model;
            torch.int8 comes without ``calibration`` or it without that, or finds no ResNet on a CPU, or an image is not
            finite.
        TypeError: ``cuda_graph`` is asked of another model.
    """
    if dtype not in (None, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype must be None, torch.bfloat16 or torch.int8, got {dtype}")
    _check_calibration(model, dtype, calibration)
    if cuda_graph and not torch.cuda.is_available():
        raise ValueError("cuda_graph cannot be used here: torch finds no CUDA device")
    if cuda_graph and not isinstance(model, (Detr, DetrSegm)):
        raise TypeError(f"cuda_graph needs a Detr or a DetrSegm, got a {type(model).__name__}")
    packs_transformers = dtype is not torch.bfloat16 and not compile
    # What is found in the memo is not copied but taken from it.
    memo: dict[int, Any] = _packed_bodies(model, dtype)
    if packs_transformers:
        transformers = [module for module in model.modules() if isinstance(module, Transformer)]
        memo |= {id(weight): weight for each in transformers for weight in packed_weights(each)}
    fast: Model = copy.deepcopy(model, memo)
    for module in list(fast.modules()):
        if isinstance(module, Transformer) and packs_transformers:
            pack_transformer(module)
        if isinstance(module, Detr) and packs_transformers:
            pack_heads(module)
    fast.eval().requires_grad_(False)
    for module in fast.modules():
        if isinstance(module, Detr):
            module.aux_loss = module.aux_loss and aux_outputs
        if isinstance(module, Transformer) and dtype is torch.bfloat16:
            _compute_in(dtype, module)
        if isinstance(module, Transformer) and compile:
            module.compile(dynamic=True)
    if calibration is not None:
        _calibrate(fast, calibration)
    if cuda_graph:
        sizes = cuda_graph if isinstance(cuda_graph, GraphSizes) else GraphSizes()
        fast.forward = GraphedForward(fast, sizes)  # type: ignore[method-assign]
    return fast


def optimizes(model: nn.Module) -> bool:
    """Whether ``optimize`` finds a ResNet in ``model`` that it can pack; if not, a copy is no faster on a CPU."""
    return any(isinstance(module, ResNet) and can_pack(module) for module in model.modules())


def _packed_bodies(model: nn.Module, dtype: torch.dtype | None) -> dict[int, Any]:
    """A ``PackedResNet`` for each ResNet of ``model`` that can be one, by the ResNet's id."""
    all_maps: dict[nn.Module, bool] = {}
    for module in model.modules():
        if isinstance(module, Backbone):
            all_maps[module.body] = module.return_interm_layers
        if isinstance(module, ResNet):
            all_maps.setdefault(module, True)
    bodies = [body for body in all_maps if isinstance(body, ResNet) and can_pack(body)]
    if dtype is torch.int8:
        return {id(body): Calibration(body, all_maps=all_maps[body]) for body in bodies}
    return {id(body): PackedResNet(body, all_maps=all_maps[body], dtype=dtype) for body in bodies}


def _check_calibration(model: nn.Module, dtype: torch.dtype | None, calibration: object) -> None:
    """Raise ValueError unless calibration images are there where, and only where, they are needed."""
    if dtype is not torch.int8:
        if calibration is not None:
            raise ValueError(f"calibration must be None unless dtype is torch.int8, got dtype {dtype}")
        return
    if calibration is None:
        raise ValueError("calibration must be images like those to come where dtype is torch.int8, got None")
    if not optimizes(model):
        raise ValueError(f"dtype torch.int8 needs a ResNet with batch norms, got a {type(model).__name__} without one")
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if kinds - {("cpu", torch.float32)}:
        raise ValueError(
            f"dtype torch.int8 needs a float32 model on a CPU, got parameters of {sorted(map(str, kinds))}"
        )


@torch.no_grad()
def _calibrate(fast: nn.Module, calibration: Tensor | ImageBatch | Iterable[Any]) -> None:
    """Run the images through a copy that remembers the ranges of its maps, and have it compute in 8-bit integers."""
    for batch in [calibration] if isinstance(calibration, (Tensor, ImageBatch)) else calibration:
        fast(batch[None] if isinstance(batch, Tensor) and batch.ndim == 3 else batch)
    for parent in list(fast.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Calibration):
                if child.calls == 0:
                    raise ValueError("calibration must be at least one image, got none")
                setattr(parent, name, child.in_int8())


def _compute_in(dtype: torch.dtype, module: nn.Module) -> None:
    """Convert a module, what it is given, and what it returns back to float32."""
    module.to(dtype)
    module.register_forward_pre_hook(_cast_arguments)
    module.register_forward_hook(_cast_results)


def _cast_arguments(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def _cast_results(module: nn.Module, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in results)
