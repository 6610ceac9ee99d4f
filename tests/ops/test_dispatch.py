"""How an op picks its implementation, what it says when one cannot run, and what ``detr-fast info`` tells of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detr_fast import info
from detr_fast.ops import _native, assignment
from detr_fast.ops._dispatch import Implementation, Op, always_runs

ROOT = Path(__file__).parents[2]


def op(*fast: Implementation) -> Op:
    reference = Implementation("reference", lambda x: "reference", always_runs)
    return Op("doubling", (*fast, reference), lambda device: (torch.empty(1, device=device),))


FAST = Implementation("fast", lambda x: "fast", lambda x: None if x.dim() == 1 else f"x must be [N], got {x.dim()}-d")


class TestChoose:
    def test_takes_the_first_that_can_run(self) -> None:
        assert op(FAST).choose(None, torch.zeros(3)).name == "fast"
        assert op(FAST).choose(None, torch.zeros(3, 3)).name == "reference"
        assert op().choose(None, torch.zeros(3)).name == "reference"

    def test_takes_the_one_asked_for(self) -> None:
        assert op(FAST).choose("reference", torch.zeros(3)).name == "reference"
        assert op(FAST).choose("fast", torch.zeros(3)).name == "fast"

    def test_one_that_cannot_run_says_why(self) -> None:
        with pytest.raises(
            NotImplementedError, match=r"doubling cannot run with backend='fast': x must be \[N\], got 2-d"
        ):
            op(FAST).choose("fast", torch.zeros(3, 3))

    def test_an_unknown_name_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(
            ValueError, match="backend of doubling must be None or one of 'fast', 'reference', got 'fats'"
        ):
            op(FAST).choose("fats", torch.zeros(3))

    def test_reasons(self) -> None:
        assert op(FAST).reasons(torch.device("cpu")) == {"fast": None, "reference": None}


@pytest.fixture()
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nothing was compiled."""
    monkeypatch.setitem(sys.modules, "detr_fast._C", None)
    _native.load.cache_clear()
    yield
    _native.load.cache_clear()


@pytest.mark.usefixtures("no_native")
class TestWithoutNative:
    def test_ops_run_on_their_reference(self) -> None:
        assert assignment(1 - torch.eye(3)[None].flip(1), [3]).tolist() == [[2, 1, 0]]

    def test_asking_for_it_raises_the_reason(self) -> None:
        with pytest.raises(NotImplementedError, match="assignment cannot run with backend='native': .* was not built"):
            assignment(torch.eye(3)[None], [3], backend="native")

    def test_info_says_so(self) -> None:
        found = info.collect_info()
        assert found["ops"]["assignment"]["cpu"]["takes"] == "reference"
        assert "was not built" in found["ops"]["assignment"]["cpu"]["cannot"]["native"]
        assert "not native: the native module was not built" in info.render_info()


def test_a_module_that_does_not_load_says_why(tmp_path: Path) -> None:
    package = tmp_path / "detr_fast"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'detr_fast')!r})")
    (package / "_C.py").write_text("raise ImportError('libmissing.so.7: cannot open shared object file')")
    code = "from detr_fast.ops import _native; print(_native.load().why_not)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the native module does not load: libmissing.so.7: cannot open shared object file"


def test_devices_without_native_code_say_so() -> None:
    if _native.load().module is None:
        pytest.skip("needs the native module")
    assert _native.why_not(torch.device("cpu")) is None
    assert _native.why_not(torch.device("mps")) == "there is no native code for mps devices"


def test_info_is_complete_and_can_be_json() -> None:
    found = json.loads(json.dumps(info.collect_info()))
    assert set(found["ops"]) == {op.name for op in info.OPS}
    for selections in found["ops"].values():
        assert set(selections) == set(found["devices"])
        for selection in selections.values():
            assert selection["takes"] not in selection["cannot"]
    text = info.render_info()
    for name in ("python", "torch", "scipy", "cpu", "Native module", "assignment"):
        assert name in text
    assert torch.cuda.is_available() or "none: " in text
