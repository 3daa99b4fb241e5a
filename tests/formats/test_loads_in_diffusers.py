"""LoRA files loaded by diffusers give the same output as weight changes merged by hand."""

from __future__ import annotations

import pytest
import torch

from lora_files import write_kohya
from sdtune.formats import canonical, diffusers_lora


def predict(pipeline):
    """The UNet's output [2, 4, 8, 8] for fixed latents and token ids through the text encoder."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randint(0, 48, (2, 8), generator=generator)
    with torch.no_grad():
        text = pipeline.text_encoder(tokens)[0]
        return pipeline.unet(latents, torch.tensor([10, 700]), text).sample


def merge(pipeline, weights, delta):
    for component in ("unet", "text_encoder"):
        for path, module in getattr(pipeline, component).named_modules():
            key = canonical(f"{component}.{path}")
            if key in weights.pairs:
                module.weight.data += delta(weights, key).float()


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [((4,), (3.0,)), ((4,), (3.0, 8.0, 1.0)), ((4, 2, 6), (5.0,)), ((4, 2, 6), (3.0, 8.0, 1.0))],
    ids=["one alpha", "several alphas", "several ranks", "several of both"],
)
def test_loaded_lora_equals_merged_weights(pipeline, load, make_weights, delta, spec, tmp_path, form, ranks, alphas):
    weights = make_weights(ranks, alphas)
    if form == "diffusers":
        file = tmp_path / diffusers_lora.FILE_NAME
        diffusers_lora.write(file, weights, {"sdtune_backbone_hash": "abc"})
    else:
        file = tmp_path / "otter.safetensors"
        write_kohya(file, weights, spec, {})
    base = predict(pipeline)
    merged_pipeline = load()
    merge(merged_pipeline, weights, delta)
    merged = predict(merged_pipeline)
    assert (merged - base).abs().max() > 1e-2

    pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="it", use_safetensors=True)
    torch.testing.assert_close(predict(pipeline), merged, rtol=0, atol=1e-5)
    pipeline.set_adapters("it", 0.0)
    torch.testing.assert_close(predict(pipeline), base, rtol=0, atol=1e-6)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline), base)
