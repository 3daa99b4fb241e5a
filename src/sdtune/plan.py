"""``sdtune plan``: parameters, memory and arithmetic of a training, before anything is loaded."""

from __future__ import annotations

from sdtune.launch import main, quietly

prepare = quietly("sdtune.plan_run")


if __name__ == "__main__":
    main("plan", prepare, writes=False)
