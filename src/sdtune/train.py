"""``sdtune train``: one training run, from a composed config to a folder with its artifact and figures."""

from __future__ import annotations

from sdtune.launch import main, quietly
from sdtune.resume import rewrite

prepare = quietly("sdtune.run")


if __name__ == "__main__":
    main("train", prepare, rewrite=rewrite)
