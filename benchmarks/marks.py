"""Sizes as parameters of a benchmark, those marked that ``--benchmark-quick`` leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import pytest
from _pytest.mark import ParameterSet


class Named(Protocol):
    """Every shape has a name, which becomes the parameter's."""

    @property
    def name(self) -> str: ...


Size = TypeVar("Size", bound=Named)


def marked(sizes: Iterable[Size], large: Callable[[Size], bool]) -> list[ParameterSet]:
    """Each size under its name, the large ones marked."""
    return [pytest.param(size, id=size.name, marks=[pytest.mark.large] * large(size)) for size in sizes]
