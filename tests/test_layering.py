"""The shape of the code: which way imports point, what an import costs, what waits for a device, how long files are."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "detr_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; a module imports from its own layer and from those before it. A module without a name here is
# a tool (training, evaluation, plots, and what they are made of).
LAYERS = (
    ("detr_fast.ops",),
    ("detr_fast.checkpoint", "detr_fast.config", "detr_fast.data", "detr_fast.distributed"),
    ("detr_fast.models",),
    ("detr_fast.targets", "detr_fast.matcher", "detr_fast.loss_names", "detr_fast.mask_losses", "detr_fast.criterion"),
    ("detr_fast.postprocess", "detr_fast.postprocess_masks"),
    ("detr_fast.build",),
    (),
    ("detr_fast.demo",),
    ("detr_fast.cli", "detr_fast.__main__"),
)
TOOLS = LAYERS.index(())
# The package itself re-exports everything up to build_model, and on demand a tool.
PACKAGE_LAYER = TOOLS

# Only loaded by those who ask for what needs them.
ON_DEMAND = ("PIL", "hotcoco", "matplotlib", "pycocotools", "rich", "sklearn", "torchvision", "transformers")
ON_DEMAND += ("triton", "typer")

# Each copies to the host or asks it for a value, so on a GPU it waits for all work before it.
WAITING_METHODS = {"item", "cpu", "tolist", "nonzero", "numpy", "any", "all", "synchronize"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def layer(name: str) -> int:
    if name == "detr_fast":
        return PACKAGE_LAYER
    for index, names in enumerate(LAYERS):
        if any(name == known or name.startswith(known + ".") for known in names):
            return index
    return TOOLS


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of this package) of every import in a file, those inside functions too, those for types not."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in for_types):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("detr_fast"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".rstrip(".")
            if base.split(".")[0] == "detr_fast":
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    yield node.lineno, submodule if submodule in NAMES else base


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    own = module_name(path)
    upward = [f"{path.name}:{line} {own} imports {name}" for line, name in imports(path) if layer(name) > layer(own)]
    assert not upward, "\n".join(upward)


def test_ops_import_nothing_but_ops():
    outside = [
        f"{module_name(path)}:{line} imports {name}"
        for path in MODULES
        if is_within(module_name(path), "detr_fast.ops")
        for line, name in imports(path)
        if not is_within(name, "detr_fast.ops") and name != "detr_fast._C"
    ]
    assert not outside, "\n".join(outside)


def test_models_use_no_more_of_data_than_the_batch():
    used = {name for path in (PACKAGE / "models").glob("*.py") for _, name in imports(path)}
    assert {name for name in used if is_within(name, "detr_fast.data")} <= {"detr_fast.data.batch"}


def test_no_cycles():
    # A package's __init__ re-exports its modules, which may import each other: only their own imports count.
    graph = {module_name(p): {name for _, name in imports(p)} for p in MODULES if p.name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {error.args[1]}")


def test_import_is_light():
    """A user of the model or an op pays for neither the command line nor plots nor images."""
    code = f"import sys, detr_fast; print(*[name for name in {ON_DEMAND!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    allowed = loaded_by_torch()
    assert set(run.stdout.split()) <= allowed, f"import detr_fast loads {run.stdout.split()}, torch alone {allowed}"


def loaded_by_torch() -> set[str]:
    code = f"import sys, torch; print(*[name for name in {ON_DEMAND!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_public_names_exist():
    package = importlib.import_module("detr_fast")
    assert len(package.__all__) == len(set(package.__all__))
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    ops = importlib.import_module("detr_fast.ops")
    assert [name for name in ops.__all__ if not hasattr(ops, name)] == []


def hot_path() -> list[Path]:
    folders = [path for path in MODULES if path.parts[len(PACKAGE.parts)] in ("ops", "models")]
    names = ("matcher", "mask_losses", "criterion", "postprocess", "postprocess_masks")
    return [*folders, *(PACKAGE / f"{name}.py" for name in names)]


@pytest.mark.parametrize("path", hot_path(), ids=module_name)
def test_nothing_waits_for_the_device_without_saying_why(path):
    silent = unexplained_waits(path.read_text())
    assert not silent, f"these wait for the device and nothing says why, in {path}:\n" + "\n".join(silent)


def unexplained_waits(source: str) -> list[str]:
    """Calls that wait, without a comment on their line or above it, in functions that do not speak of it either."""
    tree, lines = ast.parse(source), source.splitlines()
    spoken_of = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and re.search(r"\bhost\b|\bwait", ast.get_docstring(function) or "")
        for node in ast.walk(function)
    }
    waits = [node for node in ast.walk(tree) if is_wait(node) and id(node) not in spoken_of]
    commented = [
        "#" in line or above.lstrip().startswith("#") for above, line in zip(["", *lines], lines, strict=False)
    ]
    return [f"{node.lineno}: {ast.unparse(node)}" for node in waits if not commented[node.lineno - 1]]


def is_wait(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    # np.any(x) and the like take a value that is on the host.
    on_host = isinstance(node.func.value, ast.Name) and node.func.value.id in ("np", "numpy")
    return node.func.attr in WAITING_METHODS and not on_host


def test_the_search_for_waits_finds_them():
    source = """
x = costs.cpu()
y = costs.cpu()  # SciPy's input
# The counts are on the host.
z = any(counts.tolist())
n = np.all(v)
mask.any().item()
def check(matrix):
    'The matrix is on the host.'
    return matrix.item()
def forget(matrix):
    return matrix.nonzero()
"""
    found = {"2: costs.cpu()", "7: mask.any().item()", "7: mask.any()", "12: matrix.nonzero()"}
    assert set(unexplained_waits(source)) == found


def sources() -> list[Path]:
    folders = ("detr_fast", "csrc", "tests", "benchmarks")
    return sorted(p for f in folders for p in (REPOSITORY / f).rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".h"))


def test_files_are_at_most_400_lines():
    long = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in long.items() if length > 400} == {}
