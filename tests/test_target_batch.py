"""The targets of a batch in one buffer: the same tensors, one copy, and never stale."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from small import random_outputs, random_targets, small_criterion
from torch import Tensor
from torch.utils.data import DataLoader
from training_data import samples

from detr_fast.data.batch import ImageBatch, collate
from detr_fast.data.on_device import on_device
from detr_fast.data.target_batch import TargetBatch
from detr_fast.ops import PackedTargets, _native
from detr_fast.targets import check_and_pack

COUNTS = {"usual": [3, 0, 9], "none in any": [0, 0], "one image": [2], "no image": []}


def full_targets(counts: list[int]) -> list[dict[str, Any]]:
    """As the data sets give them, with masks, and values of odd shapes and dtypes."""
    return [
        target
        | {
            "image_id": torch.tensor([index]),
            "iscrowd": torch.zeros(len(target["labels"]), dtype=torch.uint8),
            "masks": torch.rand(len(target["labels"]), 3 + index, 5) > 0.5,
            "scale": torch.tensor(0.5 + index, dtype=torch.float64),
        }
        for index, target in enumerate(random_targets(counts))
    ]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, Tensor):
                assert one[key].dtype == value.dtype and torch.equal(one[key], value), key
            else:
                assert one[key] == value, key


def lie_in_one_buffer(batch: TargetBatch) -> bool:
    memory = batch.buffer.untyped_storage().data_ptr()
    values = [value for target in batch for value in target.values()]
    return all(value.untyped_storage().data_ptr() == memory for value in values)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_same_tensors_in_one_buffer(counts: list[int]) -> None:
    targets = full_targets(counts)
    batch = TargetBatch.of(targets)
    assert_same(batch, targets)
    assert lie_in_one_buffer(batch)
    assert TargetBatch.of(batch) is batch
    if counts:
        expected, packed = PackedTargets.pack(targets), batch.packed()
        assert packed is not None and packed.num_targets == expected.num_targets == counts
        assert torch.equal(packed.labels, expected.labels) and torch.equal(packed.boxes, expected.boxes)
        assert packed.boxes.data_ptr() % 64 == packed.labels.data_ptr() % 64
    else:
        assert batch.packed() is None


@pytest.mark.parametrize("send", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: saved(x)])
def test_a_copy_is_one_buffer_too(send: Any) -> None:
    targets = full_targets([2, 1])
    targets[1]["name"] = "photo.jpg"  # no tensor
    batch = TargetBatch.of(targets)
    sent = send(batch)
    assert_same(sent, targets)
    assert sent.buffer.data_ptr() != batch.buffer.data_ptr()
    assert len(sent.buffer) == len(batch.buffer) and sent.packed() is not None


def saved(batch: TargetBatch) -> TargetBatch:
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_device_gets_one_copy() -> None:
    """ "meta" stands for a device: it is another one, and has no memory."""
    targets = full_targets([2, 0, 1])
    batch = TargetBatch.of(targets)
    assert batch.to("cpu") is batch
    copies = []
    with mock.patch.object(Tensor, "to", lambda x, *_, to=Tensor.to, **__: copies.append(x) or to(x, "meta")):
        moved = batch.to("cuda", non_blocking=True)
    assert len(copies) == 1
    for target, expected in zip(moved, targets, strict=True):
        assert {k: (v.shape, v.dtype, v.device.type) for k, v in target.items()} == {
            k: (v.shape, v.dtype, "meta") for k, v in expected.items()
        }
    packed = moved.packed()
    assert packed is not None and packed.labels.shape == (3,) and packed.num_targets == [2, 0, 1]


def changes() -> dict[str, Any]:
    return {
        "new boxes": lambda batch: batch[0].update(boxes=batch[0]["boxes"] * 0.5),
        "new labels": lambda batch: batch[1].update(labels=torch.tensor([4])),
        "exchanged": lambda batch: batch.reverse(),
        "another dict": lambda batch: batch.__setitem__(0, random_targets([5])[0]),
        "one more": lambda batch: batch.append(random_targets([1])[0]),
        "one less": lambda batch: batch.pop(),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_what_was_changed_is_packed_anew(change: Any) -> None:
    batch = TargetBatch.of(random_targets([2, 1]))
    change(batch)
    assert batch.packed() is None
    expected, packed = PackedTargets.pack(batch), check_and_pack(batch, 5, len(batch))
    assert torch.equal(packed.boxes, expected.boxes) and packed.num_targets == expected.num_targets
    for again in (TargetBatch.of(batch), pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert_same(again, list(batch))
        assert again.packed() is not None


def test_a_value_that_was_added_or_removed_stays_so() -> None:
    batch = TargetBatch.of(full_targets([2, 1]))
    batch[0]["area"], expected = torch.rand(2), list(batch)
    del batch[1]["scale"]
    assert batch.packed() is not None  # labels and boxes are as they were
    assert_same(TargetBatch.of(batch), expected)
    assert_same(pickle.loads(pickle.dumps(batch)), expected)


def test_in_place_changes_are_seen() -> None:
    batch = TargetBatch.of(random_targets([2, 1]))
    batch[1]["boxes"].mul_(0.5)
    packed = batch.packed()
    assert packed is not None and torch.equal(packed.boxes[2:], batch[1]["boxes"])


def test_the_criterion_copies_nothing() -> None:
    targets, outputs, criterion = random_targets([2, 0, 4]), random_outputs(3), small_criterion()
    expected = criterion(outputs, targets)
    ordinary = _native.load()._replace(
        quick=None
    )  # a quick call copies, in less time than it takes to look for changes
    with (
        mock.patch.object(_native, "load", lambda: ordinary),
        mock.patch.object(PackedTargets, "pack", side_effect=AssertionError("packed anew")),
    ):
        found = criterion(outputs, TargetBatch.of(targets))
        with pytest.raises(AssertionError, match="packed anew"):
            criterion(outputs, targets)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_targets_without_labels_are_refused_as_ever() -> None:
    batch = TargetBatch.of([{"labels": torch.tensor([1.5]), "boxes": torch.rand(1, 4)}])
    with pytest.raises(ValueError, match=r"labels of target 0 must be int64 \[T\], got torch.float32 \[1\]"):
        check_and_pack(batch, 5, 1)
    with pytest.raises(ValueError, match="target 0 has no 'labels'"):
        check_and_pack(TargetBatch.of([{"boxes": torch.rand(1, 4)}]), 5, 1)


def test_workers_send_one_buffer() -> None:
    data = samples([2, 0, 3])
    loader: DataLoader[Any] = DataLoader(data, 3, collate_fn=collate, num_workers=1)  # type: ignore[arg-type]
    ((images, targets),) = loader
    assert isinstance(images, ImageBatch) and isinstance(targets, TargetBatch)
    assert_same(targets, [target for _, target in data])
    assert lie_in_one_buffer(targets) and targets.packed() is not None


def test_on_the_cpu_nothing_is_moved() -> None:
    images, targets = collate(samples([1, 2]))
    (batch,) = on_device([(images, targets)], torch.device("cpu"))
    assert batch.images.images is images.images
    assert batch.targets is batch.on_host is targets


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_a_gpu_without_a_wait() -> None:
    loader: DataLoader[Any] = DataLoader(samples([1, 2]), 2, collate_fn=collate, pin_memory=True)  # type: ignore[arg-type]
    batches = list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (batch,) = on_device(batches, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.on_host.buffer.is_pinned() and batch.targets.buffer.is_cuda
    assert_same([{k: v.cpu() for k, v in target.items()} for target in batch.targets], list(batch.on_host))
