"""Builds the native module detr_fast._C with CMake and Ninja. The metadata are in pyproject.toml.

Environment variables, read at build time only:
    DETR_FAST_NATIVE=off              no native module: every op runs on its PyTorch or SciPy reference
    DETR_FAST_CUDA=auto|on|off        auto (the default) builds the CUDA kernels where nvcc is found
    DETR_FAST_CUDA_ARCHITECTURES=...  as CMake's CMAKE_CUDA_ARCHITECTURES; the default is 80-real;90-real;90-virtual
    CXX, CUDACXX, CUDA_HOME           which compilers
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
MODULE = "detr_fast._C"


def choice(variable: str, *allowed: str) -> str:
    value = os.environ.get(variable, allowed[0]).lower()
    if value not in allowed:
        raise SystemExit(f"{variable} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def find_tool(name: str) -> str:
    """Finds cmake or ninja beside this Python (a virtual environment need not be activated), else on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found; 'pip install {name}' or build with pip's build isolation")
    return found


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_options() -> list[str]:
    wanted = choice("DETR_FAST_CUDA", "auto", "on", "off")
    nvcc = None if wanted == "off" else find_nvcc()
    if wanted == "on" and nvcc is None:
        raise SystemExit("DETR_FAST_CUDA=on, but nvcc is neither in CUDACXX, CUDA_HOME, the PATH nor /usr/local/cuda")
    if nvcc is None:
        print(f"detr_fast: without CUDA kernels ({'DETR_FAST_CUDA=off' if wanted == 'off' else 'no nvcc was found'})")
        return ["-DDETR_FAST_WITH_CUDA=OFF"]
    print(f"detr_fast: with CUDA kernels, by {nvcc}")
    options = ["-DDETR_FAST_WITH_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    architectures = os.environ.get("DETR_FAST_CUDA_ARCHITECTURES")
    return [*options, f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else options


def run(command: list[str]) -> int:
    print(" ".join(command), flush=True)
    return subprocess.run(command, stderr=subprocess.STDOUT, check=False).returncode


def build_step(command: list[str]) -> None:
    """Runs a build step; its output, the compiler's messages among it, is printed as it comes."""
    if code := run(command):
        raise SystemExit(
            f"detr_fast: the native module did not build (the step above exited with {code}; its output has the "
            "compiler's message).\nDETR_FAST_CUDA=off builds without the CUDA kernels, DETR_FAST_NATIVE=off without "
            "any native code."
        )


def configure(command: list[str], build: Path) -> None:
    """The step in which CMake tries the compilers. It hides what a failing nvcc says, so nvcc is asked again."""
    try:
        build_step(command)
    except SystemExit:
        if "-DDETR_FAST_WITH_CUDA=ON" in command:
            probe = build / "probe.cu"
            probe.write_text("__global__ void probe() {}\n")
            run([str(find_nvcc()), "-std=c++17", "-c", str(probe), "-o", str(build / "probe.o")])
        raise


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)  # a cache of another isolated build names tools that are gone
        build.mkdir(parents=True)
        cmake = find_tool("cmake")
        configure(
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
            + ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
            + [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *cuda_options()],
            build,
        )
        build_step([cmake, "--build", str(build)])
        target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = build.glob("_C*.so") if os.name != "nt" else build.glob("_C*.pyd")
        # Renamed into place: a process that has the old module loaded keeps it.
        arriving = target.with_suffix(".arriving")
        shutil.copy2(built, arriving)
        os.replace(arriving, target)


class EditableWithoutNative(editable_wheel):
    """DETR_FAST_NATIVE=off in a checkout where a native module was built in place before: it goes."""

    def run(self) -> None:
        for stale in [*(ROOT / "detr_fast").glob("_C*.so"), *(ROOT / "detr_fast").glob("_C*.pyd")]:
            print(f"detr_fast: removing {stale.name}, built earlier")
            stale.unlink()
        super().run()


if choice("DETR_FAST_NATIVE", "on", "off") == "off":
    setup(cmdclass={"editable_wheel": EditableWithoutNative})
else:
    setup(ext_modules=[Extension(MODULE, sources=[])], cmdclass={"build_ext": CMakeBuild})
