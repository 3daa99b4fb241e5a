"""SDXL conditioning equals that of diffusers: hidden states, pooled text embedding, sizes; so do the images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from families import build_family
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_token_vectors import initialize_tokens
from sdtune.backbone.new_tokens import NewToken
from sdtune.conditioning import Conditioning
from sdtune.images.files import frame
from sdtune.sampling.loop import Request, Sampling, generate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="module")
def pipe(base: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False, local_files_only=True)


@pytest.fixture
def backbone(base: Path) -> Backbone:
    return Pretrained(str(base)).load()


def assert_embeddings_of(pipe: Any, actual: Conditioning, prompt: str, **settings: Any) -> None:
    states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **settings)
    torch.testing.assert_close(actual.states, states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.pooled, pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", ["a dog", "", "a " * 100])
def test_text_embeddings_contain_both_encoders_and_the_pooled_embedding(
    backbone: Backbone, pipe: Any, prompt: str
) -> None:
    with torch.no_grad():
        actual = backbone.encode_text([prompt])
    # Without new tokens the end token has the largest id, as in CLIP's vocabulary, and transformers pools there.
    assert_embeddings_of(pipe, actual, prompt)
    shapes = {name: tuple(value.shape[1:]) for name, value in actual.tensors().items()}
    assert shapes == backbone.text_shapes == {"states": (77, 40), "pooled": (24,)}


def test_clip_skip_adds_to_the_layer_that_sdxl_always_skips(base: Path, pipe: Any) -> None:
    with torch.no_grad():
        actual = Pretrained(str(base), clip_skip=1).load().encode_text(["a dog"])
    assert_embeddings_of(pipe, actual, "a dog", clip_skip=1)


def test_pooling_uses_the_end_token_and_not_a_new_token(backbone: Backbone) -> None:
    """With `eos_token_id: 2`, transformers pools at the largest id, which is that of a new token."""
    with torch.no_grad():
        before = backbone.encode_text(["a dog", "a cat"])
        initialize_tokens(backbone, [NewToken("<dog>", "dog", 2)])
        rows = [backbone.tokenize(["a <dog>"], name) for name in backbone.encoders]
        assert all(row.max() == backbone.new_tokens["text_encoder"].first_id + 1 for row in rows)
        after = backbone.encode_text(["a dog", "a <dog> cat"])
    assert torch.equal(after.states[0], before.states[0])
    assert torch.equal(after.pooled[0], before.pooled[0])
    ids = rows[1][0].tolist()
    out = backbone.text_encoder_2(backbone.tokenize(["a <dog> cat"], "text_encoder_2"), output_hidden_states=True)
    end = backbone.tokenize(["a <dog> cat"], "text_encoder_2")[0].tolist().index(backbone.tokenizers[1].eos_token_id)
    pooled = backbone.text_encoder_2.text_projection(out.last_hidden_state[0, end])
    torch.testing.assert_close(after.pooled[1], pooled)
    assert ids.index(backbone.tokenizers[1].eos_token_id) > ids.index(backbone.new_tokens["text_encoder_2"].first_id)


def test_long_prompt_has_the_pooled_embedding_of_its_first_window(base: Path, backbone: Backbone) -> None:
    long_backbone = Pretrained(str(base), max_tokens=150).load()
    first, second = " ".join("abcdefghij" * 7 + "abcde"), "x y z"
    with torch.no_grad():
        embeddings = long_backbone.encode_text([f"{first} {second}"])
        one, two = backbone.encode_text([first]), backbone.encode_text([second])
    assert embeddings.states.shape[1:] == long_backbone.text_shapes["states"] == (154, 40)
    torch.testing.assert_close(embeddings.states[:, :77], one.states)
    torch.testing.assert_close(embeddings.states[:, 77:], two.states)
    torch.testing.assert_close(embeddings.pooled, one.pooled)


def test_size_conditions_are_passed_to_the_unet(backbone: Backbone, pipe: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([3, 900])
    frames = torch.tensor([[72.0, 80, 0, 4, 64, 64], [640, 480, 16, 0, 64, 64]])
    with torch.no_grad():
        text = backbone.encode_text(["a dog", "a cat"])
        actual = backbone.predict(noisy, timesteps, replace(text, frame=frames))
        added = {"text_embeds": text.pooled, "time_ids": frames}
        expected = pipe.unet(noisy, timesteps, encoder_hidden_states=text.states, added_cond_kwargs=added).sample
        without_frame = backbone.predict(noisy, timesteps, text)
        default_frame = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        with_default_frame = backbone.predict(noisy, timesteps, replace(text, frame=default_frame))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # memory layouts differ, and so does rounding
    assert torch.equal(without_frame, with_default_frame)
    assert not torch.allclose(actual, without_frame)


def test_images_equal_those_of_diffusers(backbone: Backbone, pipe: Any) -> None:
    expected = pipe(
        "a dog", negative_prompt="", num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(4), output_type="np",
    ).images[0]  # fmt: skip
    [image] = generate(backbone, [Request("a dog", 4)], Sampling(steps=3, guidance=5.0))
    assert np.abs(image.astype(int) - (expected * 255).round()).max() <= 1


def test_layers_without_gradient_are_reported_as_unused(backbone: Backbone) -> None:
    for name, encoder in backbone.encoders.items():
        encoder.requires_grad_(True)
        text = backbone.encode_text(["a dog"])
        (text.states.square().sum() + text.pooled.square().sum()).backward()
        without_gradient = {n for n, p in encoder.named_parameters() if p.grad is None}
        assert without_gradient == {
            n for n, _ in encoder.named_parameters() if n.startswith(backbone.frozen_prefixes(name))
        }
        assert bool(without_gradient) is (name == "text_encoder")


@pytest.mark.parametrize(
    ("original_size", "size", "offset", "flip", "expected"),
    [
        ((80, 72), (64, 64), (0.5, 0.5), False, (72, 80, 0, 4, 64, 64)),
        ((100, 200), (50, 50), (0.5, 0.5), False, (200, 100, 25, 0, 50, 50)),
        ((200, 100), (50, 50), (0.0, 0.5), False, (100, 200, 0, 0, 50, 50)),
        # The crop offset in a mirrored image is mirrored as well.
        ((200, 100), (50, 50), (0.0, 0.5), True, (100, 200, 0, 50, 50, 50)),
    ],
)
def test_frame_contains_original_size_crop_offset_and_crop_size(
    original_size: tuple[int, int],
    size: tuple[int, int],
    offset: tuple[float, float],
    flip: bool,
    expected: tuple[int, ...],
) -> None:
    assert frame(original_size, size, offset, flip) == expected
