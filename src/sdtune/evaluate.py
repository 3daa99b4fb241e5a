"""``sdtune evaluate run=RUN``: the figures of a finished run again, from its artifact, before and after."""

from __future__ import annotations

from sdtune.launch import main, quietly

prepare = quietly("sdtune.evaluate_run")


if __name__ == "__main__":
    main("evaluate", prepare)
