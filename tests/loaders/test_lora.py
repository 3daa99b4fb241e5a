"""What training leaves behind is what plain diffusers loads, and what sampling puts on comes off again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sdtune
from pipelines import build_pipeline
from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.loaders import lora as adapters
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling

PROMPTS = ["a photo of sks fox", "two foxes"]
SEEDS = [5, 6]
SAMPLING = Sampling(steps=4, guidance=5.0)

PLAIN = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

torch.set_num_threads(1)
tiny, folder, file, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
pipe.set_progress_bar_config(disable=True)

def draw():
    return np.stack([
        pipe(p, num_inference_steps=4, guidance_scale=5.0, output_type="np",
             generator=torch.Generator().manual_seed(s)).images[0]
        for p in {prompts} for s in {seeds}
    ])

found = dict(base=draw())
for name in ("pytorch_lora_weights.safetensors", file):
    pipe.load_lora_weights(folder, weight_name=name, adapter_name="it", use_safetensors=True)
    found[name] = draw()
    pipe.set_adapters("it", 0.5)
    found[name + "/half"] = draw()
    pipe.unload_lora_weights()
np.savez(out, **found)
""".replace("{prompts}", repr(PROMPTS)).replace("{seeds}", repr(SEEDS))


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few steps at a high rate, alpha not the rank, on all targets."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("adapters")
    (folder / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 30, 255 - 60 * i)).save(folder / "images" / f"{i}.png")
    model = LoRA(
        rank=4,
        alpha=10.0,
        alpha_policy="constant",
        targets=("cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder"),
        backbone=Pretrained(str(tiny)),
        optimizer=adamw(1e-2),
    )
    fit(model, folder_data(folder / "images", prompt="a photo of sks fox"), 4)
    model.artifact(folder / "artifact", "fox")
    return folder / "artifact"


def draw(tiny: Path, files: Sequence[dict[str, Any]], patch: pytest.MonkeyPatch) -> np.ndarray:
    """What ``sdtune.sample`` draws, before it becomes bytes."""
    kept: list[torch.Tensor] = []
    decode = Backbone.decode
    with patch.context() as inner:
        inner.setattr(Backbone, "decode", lambda self, latents: kept.append(decode(self, latents)) or kept[-1])
        images = sdtune.sample(PROMPTS, files, backbone=Pretrained(str(tiny)), seeds=SEEDS, sampling=SAMPLING)
    exact = torch.cat(kept).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([np.asarray(p) for p in images]) / 255 - exact).max() <= 0.5 / 255 + 1e-6
    return exact


def test_plain_diffusers_in_a_fresh_process_draws_the_same(
    tiny: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plain.npz"
    command = [sys.executable, "-c", PLAIN, str(tiny), str(artifact), "fox.safetensors", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    with np.load(out) as theirs:
        base = draw(tiny, [], monkeypatch)
        assert np.abs(base - theirs["base"]).max() <= 1e-4
        for name in (FILE_NAME, "fox.safetensors"):
            ours = draw(tiny, [{"path": str(artifact / name)}], monkeypatch)
            half = draw(tiny, [{"path": str(artifact / name), "strength": 0.5}], monkeypatch)
            assert np.abs(ours - theirs[name]).max() <= 1e-4
            assert np.abs(half - theirs[f"{name}/half"]).max() <= 1e-4
            assert np.abs(ours - base).max() > 0.02
            assert np.abs(ours - half).max() > 0.01
    folder = draw(tiny, [{"path": str(artifact)}], monkeypatch)
    assert np.array_equal(folder, draw(tiny, [{"path": str(artifact / FILE_NAME)}], monkeypatch))
    nothing = draw(tiny, [{"path": str(artifact), "strength": 0.0}], monkeypatch)
    assert np.array_equal(nothing, base)


def test_applied_comes_off_to_the_bit_and_strengths_add(tiny: Path, artifact: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    both = adapters.load_adapters(
        backbone,
        [adapters.AdapterFile(str(artifact / FILE_NAME)), adapters.AdapterFile(str(artifact / "fox.safetensors"))],
    )
    with adapters.adapters_applied(backbone, both, [0.25, 0.5]):
        added = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with adapters.adapters_applied(backbone, both[:1], [0.75]):
        once = {name: value.clone() for name, value in backbone.state_dict().items()}
    changed = {name for name, value in once.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in added.items() if not torch.equal(value, before[name])}
    assert len(changed) == len(load_file(artifact / FILE_NAME)) / 2
    assert any(name.startswith("text_encoder.") for name in changed)
    for name in changed:
        torch.testing.assert_close(added[name], once[name], rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="inside"), adapters.adapters_applied(backbone, both, [1.0, 1.0]):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", [FILE_NAME, "fox.safetensors"])
def test_of_another_backbone_it_is_said(
    name: str, tiny: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """People put a LoRA on models that were made from its own; only one that does not fit is refused."""
    other = Pretrained(str(build_pipeline(tmp_path / "other", seed=1)))
    [image] = sdtune.sample("a fox", [{"path": str(artifact / name)}], backbone=other, sampling=SAMPLING)
    [plain] = sdtune.sample("a fox", backbone=other, sampling=SAMPLING)
    assert (np.asarray(image) != np.asarray(plain)).any()
    [said] = [record.message for record in caplog.records if "another backbone" in record.message]
    assert Pretrained(str(tiny)).hash()[:12] in said
