"""``sdtune doctor``: what sdtune finds on this machine, and what is wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from sdtune.commands.cache import list_entries
from sdtune.errors import RunFailed, UserError
from sdtune.hardware.precision import precision
from sdtune.hardware.threads import usable_cores
from sdtune.paths import cache_folder

_HELP = """usage: sdtune doctor

Prints the versions, devices, memory and disk space that sdtune finds, and what is wrong with a remedy. The exit code is
1 if something is wrong.
"""

_GIB = 1024**3
_FREE_DISK = 10
"""GiB below which a disk is reported: a checkpoint of a full fine-tuning of SD 1.5 has 10 GiB."""


@dataclass(frozen=True)
class Finding:
    """One line: a fact of the machine, and what is wrong with the remedy; an empty ``problem`` if nothing is wrong."""

    name: str
    fact: str
    problem: str = ""


def main(arguments: Sequence[str]) -> None:
    """Print all findings.

    Raises:
        RunFailed: something is wrong.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if arguments:
        raise UserError(f"unknown argument {arguments[0]}", key="doctor", remedy="use sdtune doctor")
    findings = [*_versions(), *_devices(), *_memory(), *_disks(), *_packages()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.fact}")
        if finding.problem:
            print(f"{'':<{width}}  WRONG: {finding.problem}")
    problems = sum(bool(finding.problem) for finding in findings)
    if problems:
        raise RunFailed(f"doctor: {problems} of {len(findings)} findings need a remedy, see the lines with WRONG")
    print("nothing is wrong with the installation")


def _versions() -> Iterator[Finding]:
    yield Finding("sdtune", version("sdtune"))
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")


def _devices() -> Iterator[Finding]:
    driver = _driver()
    build = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    problem = ""
    if driver is not None and torch.version.cuda is None:
        problem = "there is an NVIDIA GPU, but torch is a build for CPUs; install a CUDA build of torch (pytorch.org)"
    elif driver is not None and not torch.cuda.is_available():
        problem = f"torch cannot use the GPU; update the NVIDIA driver to one for CUDA {torch.version.cuda}"
    elif torch.version.cuda is not None and driver is None and not torch.cuda.is_available():
        build += "; no NVIDIA driver found"
    yield Finding("torch", build, problem)
    if driver is not None:
        yield Finding("NVIDIA driver", driver)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Finding(
            "GPU",
            "none that torch can use. This machine can train pocket; Stable Diffusion needs a GPU. Its memory:"
            " sdtune plan experiment=sd15_lora",
        )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # the memory of another process, or a device in exclusive use
            yield Finding(f"GPU {index}", properties.name, f"cannot be used ({error}); end other programs on it")
            continue
        yield Finding(
            f"GPU {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, {free / _GIB:.1f} of"
            f" {total / _GIB:.1f} GiB free, bfloat16 {'yes' if properties.major >= 8 else 'no (16-mixed is used)'};"
            f" what fits: sdtune plan methods=all backbone=sd15 fits={int(total / _GIB)}",
        )
    if torch.backends.mps.is_available():
        yield Finding("GPU", "Apple MPS (untried)")
    is_bf16 = precision("auto", "cpu") == "bf16-mixed"
    yield Finding("CPU", f"{usable_cores()} usable cores, bfloat16 in hardware {'yes' if is_bf16 else 'no'}")


def _driver() -> str | None:
    """Version of the NVIDIA driver; None if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        output = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = output.split()
    return lines[0] if lines else None


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available")


def _disks() -> Iterator[Finding]:
    outputs = Path("outputs")
    yield _disk("disk of outputs/", outputs if outputs.is_dir() else Path())
    try:
        folder = cache_folder()
    except UserError as error:
        yield Finding("cache", "none", str(error))
        return
    size = sum(entry.size for entry in list_entries(folder))
    finding = _disk("cache", folder)
    yield Finding("cache", f"{folder}, {size / _GIB:.2f} GiB; {finding.fact}", finding.problem)


def _disk(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / _GIB
    problem = "" if free >= _FREE_DISK else "little space is left; free some: sdtune cache max_gib=N shrinks the cache"
    if not os.access(folder, os.W_OK):
        problem = f"{folder.absolute()} is not writable; start sdtune in another folder, or set hydra.run.dir=DIR"
    return Finding(name, f"{free:.1f} GiB free", problem)


def _packages() -> Iterator[Finding]:
    """Installed versions that differ from the ranges that sdtune declares, and the extras that are installed."""
    wrong, extras = [], set()
    for text in requires("sdtune") or ():
        requirement = Requirement(text)
        extra = re.search(r"""extra == ['"](\w+)['"]""", text)
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if extra is None:
                wrong.append(f"{requirement.name} is missing")
            continue
        if extra is not None and extra[1] in ("dev", "docs", "dashboard"):
            continue
        if extra is not None and extra[1] in ("optimizers", "sweeps", "tensorboard", "heic", "pose"):
            extras.add(extra[1])
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    problem = f"{'; '.join(wrong)}; install them again: {sys.executable} -m pip install -c constraints.txt ."
    fact = "versions as declared" if not wrong else f"{len(wrong)} differ from what sdtune declares"
    yield Finding("packages", f"{fact}; extras: {', '.join(sorted(extras)) or 'none'}", problem if wrong else "")
