"""Two LoRAs (one in kohya format), an embedding and a ControlNet together, on a merged single-file model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients import make
from families import EACH, Family, build_family
from lora_files import lora
from running import sample
from sdtune.backbone import Pretrained
from sdtune.exporting import Export, find_artifact


@pytest.mark.parametrize("family", EACH)
def test_all_adapters_act_together_on_a_merged_single_file(family: Family, tmp_path: Path) -> None:
    base = build_family(tmp_path / "base", family)
    source = Pretrained(str(base))
    first = lora(base, tmp_path / "first")
    [merged] = Export("single_file", dtype="fp32").write(find_artifact(first, "artifact"), source, tmp_path / "merged")
    [second] = Export("kohya").write(
        find_artifact(lora(base, tmp_path / "second", 2), "artifact"), source, tmp_path / "kohya"
    )
    data = make.folder_data(make.images(tmp_path / "shown"), prompt="a <cat>", resolution=64)
    method = make.TextualInversion(backbone=source, new_tokens=[make.NewToken("<cat>", "cat", 2)])
    embedding = make.trained(method, data, tmp_path / "words", "it") / "embeddings" / "cat.safetensors"
    data_with_maps = make.folder_data(tmp_path / "shown", prompt="a cat", resolution=64, control=make.Canny())
    net = make.trained(make.ControlNet(backbone=source), data_with_maps, tmp_path / "net", "it") / "it"
    [single] = Export("single_file").write(find_artifact(net, "artifact"), source, tmp_path / "net-file")
    Image.fromarray(np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2) * 255).save(tmp_path / "map.png")
    group = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[family]
    common = [f"backbone={group}", f"backbone.path={merged}", f"backbone.config={base}", 'prompt="a <cat> cat"']
    common += ["sampling.steps=2", "hardware=cpu"]
    parts = {
        "first": f"{{path: {first}, strength: 0.5}}",
        "second": f"{{path: {second}, strength: 0.8}}",
        "embedding": f"{{path: {embedding}}}",
    }
    control = f"control=[{{path: {single}, image: {tmp_path / 'map.png'}, strength: 0.9}}]"

    def generated(name: str, adapters: list[str], *more: str) -> np.ndarray:
        command = [*common, f"adapters=[{', '.join(adapters)}]", *more, f"hydra.run.dir={tmp_path / name}"]
        assert sample(*command) == 0
        [file] = (tmp_path / name).glob("000_*.png")
        return np.asarray(Image.open(file)).astype(int)

    full = generated("full", [*parts.values()], control)
    for removed in parts:
        image = generated(f"without-{removed}", [part for name, part in parts.items() if name != removed], control)
        assert np.abs(full - image).max() > 1, f"{removed} has no effect"
    assert np.abs(full - generated("without-net", [*parts.values()])).max() > 1
