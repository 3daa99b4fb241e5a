"""A full disk while a cache is filled is an OSError that names the file; nothing half-written stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import resource, signal, sys
from pathlib import Path
import torch
from sdtune.data.cache import TensorCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = TensorCache(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    cache.put("key", {"x": torch.zeros(1000)})
except OSError as error:
    assert error.filename == str(cache.path("key")), error
    assert error.strerror == "File too large", error
    print("refused")
"""


def test_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
