"""diffusers loads trained LoRAs with the same result, and applied LoRAs are removed exactly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdtune
from lora_files import lora
from pipelines import build_pipeline
from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.errors import UserError
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.loaders import lora as adapters
from sdtune.loaders.artifact import artifacts_applied
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling

PROMPTS = ["a photo of sks fox", "two foxes"]
SEEDS = [5, 6]
SAMPLING = Sampling(steps=4, guidance=5.0)

DIFFUSERS_SCRIPT = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

torch.set_num_threads(1)
tiny, folder, file, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
pipe.set_progress_bar_config(disable=True)

def generate():
    return np.stack([
        pipe(p, num_inference_steps=4, guidance_scale=5.0, output_type="np",
             generator=torch.Generator().manual_seed(s)).images[0]
        for p in {prompts} for s in {seeds}
    ])

images = dict(base=generate())
for name in ("pytorch_lora_weights.safetensors", file):
    pipe.load_lora_weights(folder, weight_name=name, adapter_name="it", use_safetensors=True)
    images[name] = generate()
    pipe.set_adapters("it", 0.5)
    images[name + "/half"] = generate()
    pipe.unload_lora_weights()
np.savez(out, **images)
""".replace("{prompts}", repr(PROMPTS)).replace("{seeds}", repr(SEEDS))


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifact of a LoRA on all targets, with alpha different from the rank, after 4 steps at a high learning rate."""
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


def sampled(tiny: Path, files: Sequence[dict[str, Any]], patch: pytest.MonkeyPatch) -> np.ndarray:
    """Images [B, H, W, 3] in [0, 1] of ``sdtune.sample``, before the conversion to uint8."""
    decoded: list[torch.Tensor] = []
    decode = Backbone.decode
    with patch.context() as inner:
        inner.setattr(Backbone, "decode", lambda self, latents: decoded.append(decode(self, latents)) or decoded[-1])
        images = sdtune.sample(PROMPTS, files, backbone=Pretrained(str(tiny)), seeds=SEEDS, sampling=SAMPLING)
    exact = torch.cat(decoded).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([np.asarray(p) for p in images]) / 255 - exact).max() <= 0.5 / 255 + 1e-6
    return exact


@pytest.mark.slow
def test_diffusers_in_another_process_generates_the_same_images(
    tiny: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plain.npz"
    command = [sys.executable, "-c", DIFFUSERS_SCRIPT, str(tiny), str(artifact), "fox.safetensors", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    with np.load(out) as expected:
        base = sampled(tiny, [], monkeypatch)
        assert np.abs(base - expected["base"]).max() <= 1e-4
        for name in (FILE_NAME, "fox.safetensors"):
            full = sampled(tiny, [{"path": str(artifact / name)}], monkeypatch)
            half = sampled(tiny, [{"path": str(artifact / name), "strength": 0.5}], monkeypatch)
            assert np.abs(full - expected[name]).max() <= 1e-4
            assert np.abs(half - expected[f"{name}/half"]).max() <= 1e-4
            assert np.abs(full - base).max() > 0.02
            assert np.abs(full - half).max() > 0.01
    folder = sampled(tiny, [{"path": str(artifact)}], monkeypatch)
    assert np.array_equal(folder, sampled(tiny, [{"path": str(artifact / FILE_NAME)}], monkeypatch))
    at_zero = sampled(tiny, [{"path": str(artifact), "strength": 0.0}], monkeypatch)
    assert np.array_equal(at_zero, base)


def test_applied_lora_is_removed_bit_for_bit_and_strengths_add_up(tiny: Path, artifact: Path) -> None:
    source = Pretrained(str(tiny))
    backbone = source.load()
    originals = {name: value.clone() for name, value in backbone.state_dict().items()}
    files = [(FILE_NAME, 0.25), ("fox.safetensors", 0.5)]
    loras = adapters.load_adapters(
        backbone, [adapters.AdapterFile(str(artifact / name), strength) for name, strength in files], source
    )
    with artifacts_applied(backbone, loras):
        both_applied = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert all(torch.equal(value, originals[name]) for name, value in backbone.state_dict().items())
    with artifacts_applied(backbone, loras[:1], 3):
        one_applied = {name: value.clone() for name, value in backbone.state_dict().items()}
    changed = {name for name, value in one_applied.items() if not torch.equal(value, originals[name])}
    assert changed == {name for name, value in both_applied.items() if not torch.equal(value, originals[name])}
    assert len(changed) == len(load_file(artifact / FILE_NAME)) / 2
    assert any(name.startswith("text_encoder.") for name in changed)
    for name in changed:
        torch.testing.assert_close(both_applied[name], one_applied[name], rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="inside"), artifacts_applied(backbone, loras):
        raise RuntimeError("inside")
    assert all(torch.equal(value, originals[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", [FILE_NAME, "fox.safetensors"])
def test_lora_of_another_backbone_is_applied_with_a_warning(
    name: str, tiny: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models derived from the same base have other hashes; only shapes that do not fit are refused."""
    other = Pretrained(str(build_pipeline(tmp_path / "other", seed=1)))
    [image] = sdtune.sample("a fox", [{"path": str(artifact / name)}], backbone=other, sampling=SAMPLING)
    [without_lora] = sdtune.sample("a fox", backbone=other, sampling=SAMPLING)
    assert (np.asarray(image) != np.asarray(without_lora)).any()
    [message] = [record.message for record in caplog.records if "another backbone" in record.message]
    assert Pretrained(str(tiny)).hash()[:12] in message


def test_strength_of_an_embedding_is_warned_about(
    tiny: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"<my_cat>": torch.ones(2, 32)}, tmp_path / "cat.safetensors")
    files = [adapters.AdapterFile(str(path), 0.5) for path in (artifact / FILE_NAME, tmp_path / "cat.safetensors")]
    source = Pretrained(str(tiny))
    adapters.load_adapters(source.load(), files, source)
    assert [record.getMessage() for record in caplog.records] == [
        f"WARNING: adapters: strength 0.5 has no effect on the embedding {tmp_path}/cat.safetensors"
    ]


@pytest.mark.parametrize("suffix", ["clip_l", "string_to_param.*"])
def test_embeddings_in_a_lora_file_of_onetrainer_are_loaded(tiny: Path, tmp_path: Path, suffix: str) -> None:
    tensors, vectors = load_file(lora(tiny, tmp_path / "lora")), torch.ones(2, 32)
    save_file({**tensors, f"bundle_emb.<my.cat>.{suffix}": vectors}, tmp_path / "both.safetensors")
    source = Pretrained(str(tiny))
    backbone = source.load()
    words, loaded = adapters.AdapterFile(str(tmp_path / "both.safetensors")).load(backbone, source)
    assert loaded.weights.pairs
    assert words.vectors.keys() == {"<my.cat>"}
    with words.applied(backbone):
        assert torch.equal(backbone.new_token_vectors[0], vectors)
    assert backbone.new_token_vectors == []
    save_file({**tensors, "bundle_emb.<my.cat>.clip_l_out": vectors}, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"embedding '<my\.cat>' has clip_l_out, which sdtune does not support"):
        adapters.AdapterFile(str(tmp_path / "out.safetensors")).load(backbone, source)
