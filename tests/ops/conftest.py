"""What the tests of native code share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from detr_fast.ops import _native


@pytest.fixture(params=[16, 32, 64])
def vector_bytes(request: pytest.FixtureRequest) -> Iterator[int]:
    """Native code runs on vectors of so many bytes, at every width that this processor has."""
    if (why := _native.load().why_not) is not None:
        pytest.skip(why)
    native = _native.module()
    if native.vector_bytes() < request.param:
        pytest.skip(f"this processor's vectors hold {native.vector_bytes()} bytes")
    native.limit_vector_bytes(request.param)
    assert native.vector_bytes() == request.param
    yield request.param
    native.limit_vector_bytes(64)
