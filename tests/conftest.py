"""Fixtures that every test may use: the shared real data, and a fresh seed that a failing test prints."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from voc import voc_to_coco

DATA_VARIABLE = "DETR_FAST_TEST_DATA"
SEED_VARIABLE = "DETR_FAST_TEST_SEED"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and known answers; the test is skipped where it is absent."""
    folder = Path(os.environ.get(DATA_VARIABLE) or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real test data: {folder} is absent, and {DATA_VARIABLE} can name another")
    return folder


@pytest.fixture(scope="session")
def known_answers(shared_data: Path) -> dict:
    """fixtures/expected.json: published numbers, with their sources."""
    return json.loads((shared_data / "fixtures" / "expected.json").read_text())


@pytest.fixture(scope="session")
def bccd(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The blood cell images and their annotations in COCO format: (image folder, annotation file)."""
    folder = shared_data / "bccd"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    annotation_file = tmp_path_factory.mktemp("bccd") / "instances.json"
    annotation_file.write_text(json.dumps(voc_to_coco(folder / "Annotations")))
    return folder / "JPEGImages", annotation_file


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """Seed python, numpy and torch afresh for each test; DETR_FAST_TEST_SEED repeats one run."""
    value = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**32))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"{SEED_VARIABLE}={value}")
    yield value


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Have deterministic mode fill ``torch.empty`` with NaN, so that memory which nobody wrote shows in a result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
