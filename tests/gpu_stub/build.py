"""Compile the stub GPU for the torch of the running Python.

The C files contain the functions that return a value. The many others of the CUDA runtime and driver, cuBLAS and NCCL
are generated: they return success, and those that start a kernel are counted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
TORCH_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")

_STUBBED = re.compile(r"(cuda|cublas|nccl)[A-Z]\w*")
_OF_THE_RUNTIME = ("cudaGetErrorString", "cudaGetErrorName", "cudaRuntimeGetVersion")
"""Functions of the CUDA runtime that need no device."""
_COUNTED = {
    re.compile(r"cublas.*(Gemm|gemm|gemv|hemm|Matmul$|MatmulEx)\w*|cublasLtMatmul"): "MATRIX_PRODUCT",
    re.compile(r"nccl(AllGather|AllReduce|Bcast|Broadcast|Reduce|ReduceScatter|Send|Recv)"): "COLLECTIVE",
    re.compile(r"cuLaunchKernel\w*"): "LAUNCH",
}
_FROM_DRIVER_OBJECTS = re.compile(r"cu(Module|Library|Kernel)(GetFunction|LoadData|LoadDataEx|GetKernel|Load)\w*")
"""Driver functions whose first argument receives an object."""


def toolkit() -> Path | None:
    """Folder with the headers of CUDA, ``include/cuda_runtime_api.h``; None if there is none."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr"]
    return next((Path(f) for f in folders if f and (Path(f) / "include/cuda_runtime_api.h").is_file()), None)


def obstacle() -> str | None:
    """Why the stub cannot be built with this Python; None if it can."""
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if shutil.which("gcc") is None or shutil.which("g++") is None:
        return "gcc or g++ is missing"
    if shutil.which("nm") is None:
        return "nm (binutils) is missing"
    return "the headers of CUDA are missing (set CUDA_HOME)" if toolkit() is None else None


def build(folder: Path) -> None:
    """Compile ``libgpustub.so`` (to preload), ``libcuda.so.1`` and ``libconvolution.so`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    home = toolkit()
    assert home is not None
    include = f"-I{home / 'include'}"
    flags = ["-O1", "-w", "-fPIC", "-shared", include, f"-I{SOURCES}"]
    _run("gcc", *flags, SOURCES / "cuda_runtime.c", SOURCES / "libraries.c", "-o", folder / "written.so", "-lpthread")
    generated = folder / "generated.c"
    names = {name for name in _undefined() if _STUBBED.fullmatch(name)} - set(_OF_THE_RUNTIME)
    generated.write_text(_functions(names - _defined(folder / "written.so")), encoding="utf-8")
    sources = [SOURCES / "cuda_runtime.c", SOURCES / "libraries.c", generated]
    _run("gcc", *flags, *sources, "-o", folder / "libgpustub.so", "-lpthread")
    link = [f"-L{folder}", "-lgpustub"]
    _run("gcc", *flags, SOURCES / "driver.c", "-o", folder / "written.so", *link)
    header = (home / "include/cuda.h").read_text(encoding="utf-8")
    generated.write_text(_functions(set(re.findall(r"\bcu[A-Z]\w+", header)) - _defined(folder / "written.so")))
    _run(
        "gcc", *flags, SOURCES / "driver.c", generated, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", *link
    )
    site = Path(torch.__file__).parent
    headers = [f"-I{site / 'include'}", f"-I{site / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{site / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *link]
    source, target = SOURCES / "convolution.cpp", folder / "libconvolution.so"
    _run("g++", *flags, "-std=c++20", *headers, source, "-o", target, *libraries)


def _functions(names: set[str]) -> str:
    """C source of functions that return 0."""
    lines = ['#include "counters.h"']
    for name in sorted(names):
        counter = next((counter for pattern, counter in _COUNTED.items() if pattern.fullmatch(name)), None)
        count = f"stub_count({counter}, 1);" if counter else ""
        if _FROM_DRIVER_OBJECTS.fullmatch(name):
            lines.append(f"int {name}(void **object) {{ *object = (void *)0x7777; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ {count} return 0; }}")
    return "\n".join([*lines, ""])


@cache
def _undefined() -> frozenset[str]:
    """Names that torch's libraries import."""
    libraries = [Path(torch.__file__).parent / "lib" / name for name in TORCH_LIBRARIES]
    lines = "".join(_run("nm", "-D", "--undefined-only", library) for library in libraries).splitlines()
    return frozenset(line.split()[-1].partition("@")[0] for line in lines)


def _defined(library: Path) -> set[str]:
    lines = _run("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1] for line in lines}


def _run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE).stdout
