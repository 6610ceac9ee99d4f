"""The C++ of the CPU under the compiler's sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "attention_test": [
        "csrc/cpu/attention.cpp",
        "csrc/cpu/attention_backward.cpp",
        "csrc/cpu/thread_pool.cpp",
        "csrc/cpu/widths.cpp",
    ],
    "conv_test": [
        "csrc/cpu/conv.cpp",
        "csrc/cpu/conv_max_pool.cpp",
        "csrc/cpu/conv_pack.cpp",
        "csrc/cpu/thread_pool.cpp",
        "csrc/cpu/widths.cpp",
    ],
    "lsap_test": [
        "tests/cpp/auction_test.cpp",
        "csrc/cpu/assignment.cpp",
        "csrc/cpu/auction.cpp",
        "csrc/cpu/thread_pool.cpp",
        "csrc/cpu/widths.cpp",
    ],
    "mask_loss_test": ["csrc/cpu/mask_loss.cpp", "csrc/cpu/thread_pool.cpp", "csrc/cpu/widths.cpp"],
    "mask_places_test": ["csrc/cpu/mask_argmax.cpp", "csrc/cpu/mask_threshold.cpp", "csrc/cpu/thread_pool.cpp"],
    "add_layer_norm_test": ["csrc/cpu/add_layer_norm.cpp", "csrc/cpu/thread_pool.cpp"],
    "relu_dropout_test": ["csrc/cpu/relu_dropout.cpp", "csrc/cpu/thread_pool.cpp"],
    "transformer_layers_test": [
        "csrc/cpu/thread_pool.cpp",
        "csrc/cpu/transformer_layers.cpp",
        "csrc/cpu/widths.cpp",
        "csrc/result_memory.cpp",
    ],
    "winograd_test": [
        "tests/cpp/bottleneck_test.cpp",
        "csrc/cpu/bottleneck.cpp",
        "csrc/cpu/conv_pack.cpp",
        "csrc/cpu/thread_pool.cpp",
        "csrc/cpu/widths.cpp",
        "csrc/cpu/winograd.cpp",
        "csrc/cpu/winograd_weight_gradient.cpp",
    ],
}
# Unrolled for three widths of vectors and looked at everywhere, attention takes GCC two minutes, the others one.
UNLIKELY = "-fno-sanitize=null,alignment,object-size,pointer-overflow"
UNROLLED = ["attention_test", "conv_test", "transformer_layers_test", "winograd_test"]
SPARED = dict.fromkeys(UNROLLED, ["-DDETR_FAST_ONE_TARGET", UNLIKELY])
SANITIZERS = {
    "address and undefined": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_cpu_code(compile_cpp: Callable[..., Path], program: str, sanitizer: str) -> None:
    name = f"{program}_{sanitizer.replace(' ', '_')}"
    sources = [f"tests/cpp/{program}.cpp", *PROGRAMS[program]]
    flags = ["-Wno-psabi", f"-I{ROOT}/csrc/core", f"-I{ROOT}/csrc/cpu", *SPARED.get(program, [])]
    binary = compile_cpp(name, sources, *SANITIZERS[sanitizer], *flags)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_thread_sanitizer_is_awake(compile_cpp: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "race.cpp").write_text(
        "#include <thread>\nint n = 0;\n"
        "int main() { std::thread a([] { ++n; }), b([] { ++n; }); a.join(); b.join(); return n > 2; }\n"
    )
    binary = compile_cpp("race", ["race.cpp"], *SANITIZERS["thread"], root=tmp_path)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "data race" in done.stderr
