"""``sdtune prepare``: everything that a training makes before its first step, to be looked at and kept."""

from __future__ import annotations

from sdtune.launch import main, quietly

prepare = quietly("sdtune.prepare_run")


if __name__ == "__main__":
    main("prepare", prepare)
