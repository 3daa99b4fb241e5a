"""Training, sampling and planning without the functions and files that Windows lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from running import arguments
from sdtune.backbone import locate

WITHOUT = """
import ctypes, os, pathlib, signal, sys

# These libraries look at the platform, which is Linux here.
import diffusers.loaders.peft, peft, psutil, pytorch_lightning, torch.distributed.checkpoint, transformers

for owner, names in (
    (signal, ("SIGHUP", "pthread_sigmask")),
    (os, ("killpg", "setsid", "getpgid", "fork", "sched_getaffinity", "getuid", "geteuid")),
):
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)

library = ctypes.CDLL
def load(name, *arguments, **named):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return library(name, *arguments, **named)
ctypes.CDLL = load

for name in ("exists", "is_file", "is_dir"):
    real = getattr(pathlib.Path, name)
    def found(self, *arguments, _real=real, **named):
        return not str(self).startswith(("/proc", "/sys")) and _real(self, *arguments, **named)
    setattr(pathlib.Path, name, found)

from sdtune.cli.main import main

for line in ARGUMENTS:
    sys.argv = ["sdtune", *line]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""
FORBIDDEN = re.compile(r'[<>:"\\|?*]')


@pytest.mark.slow
def test_commands_run_without_what_windows_lacks(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["trainer.max_steps=1", "callbacks.samples.sampling.steps=1", "name=mine"]
    train = [text for text in arguments(tiny, images, run, *settings) if text != "callbacks.samples=null"]
    word = ['new_tokens=[{token: "<my_cat>", init: a}]', "data.templates=['<my_cat> {}']"]
    backbone = ["backbone=sd15", f"backbone.path={tiny}", "hardware=cpu"]
    short = ["sampling.steps=1"]
    lora = f"adapters=[{{path: {run}/artifact/mine.safetensors}}]"
    lines = [
        ["train", *train, *word],
        ["sample", "a fox: <my_cat>?", *backbone, lora, "strengths=[0,0.5]", *short, f"hydra.run.dir={tmp_path}/s"],
        ["plan", "method=lora", *backbone],
        ["export", str(run), "format=kohya", f"hydra.run.dir={tmp_path}/e"],
    ]
    code = f"ARGUMENTS = {lines!r}\n{WITHOUT}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    files = [path.relative_to(tmp_path) for folder in ("run", "s", "e") for path in (tmp_path / folder).rglob("*")]
    assert {path.name for path in files} >= {"metrics.json", "grid.png", "mine.safetensors"}
    assert [path for path in files if any(FORBIDDEN.search(part) for part in path.parts)] == []


def test_vae_is_copied_where_links_are_not_allowed(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = locate.with_parts(tiny, {"vae": tiny / "vae"})
    copied = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    original = {str(path.relative_to(tiny)): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    assert copied == original
