"""``sdtune export``: what a run has left, in the form that another program reads."""

from __future__ import annotations

from sdtune.launch import main, quietly

prepare = quietly("sdtune.export_run")


if __name__ == "__main__":
    main("export", prepare)
