"""SDXL's conditioning is that of plain diffusers: states, pooled state, sizes; images and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from families import build_family
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.words import begin_tokens
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


def wanted(pipe: Any, prompt: str, **more: Any) -> torch.Tensor:
    states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **more)
    row = torch.nn.functional.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
    return torch.cat([states, row[:, None]], dim=1)


@pytest.mark.parametrize("prompt", ["a dog", "", "a " * 100])
def test_text_is_both_encoders_and_the_pooled_state(backbone: Backbone, pipe: Any, prompt: str) -> None:
    with torch.no_grad():
        ours = backbone.encode_text([prompt])
    theirs = wanted(pipe, prompt)
    # Of plain words transformers' largest id is the end token here, as in CLIP's own vocabulary.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.shape[1:] == backbone.text_shape == (78, 40)


def test_clip_skip_counts_on_top_of_the_one_that_sdxl_skips(base: Path, pipe: Any) -> None:
    with torch.no_grad():
        ours = Pretrained(str(base), clip_skip=1).load().encode_text(["a dog"])
    torch.testing.assert_close(ours, wanted(pipe, "a dog", clip_skip=1), rtol=1e-4, atol=1e-5)


def test_a_new_word_is_not_the_end(backbone: Backbone) -> None:
    """With `eos_token_id: 2` transformers pools at the largest id, which a new word has."""
    with torch.no_grad():
        before = backbone.encode_text(["a dog", "a cat"])
        begin_tokens(backbone, [NewToken("<dog>", "dog", 2)])
        rows = [backbone.tokenize(["a <dog>"], tokenizer) for tokenizer in backbone.tokenizers]
        assert all(row.max() == backbone.words.first + 1 for row in rows)
        after = backbone.encode_text(["a dog", "a <dog> cat"])
    assert torch.equal(after[0], before[0])
    ids = rows[1][0].tolist()
    out = backbone.text_encoder_2(backbone.tokenize(["a <dog> cat"], backbone.tokenizers[1]), output_hidden_states=True)
    end = (
        backbone.tokenize(["a <dog> cat"], backbone.tokenizers[1])[0]
        .tolist()
        .index(backbone.tokenizers[1].eos_token_id)
    )
    pooled = backbone.text_encoder_2.text_projection(out.last_hidden_state[0, end])
    torch.testing.assert_close(after[1, -1, :24], pooled)
    assert ids.index(backbone.tokenizers[1].eos_token_id) > ids.index(backbone.words.first)


def test_a_long_prompt_has_the_pooled_state_of_its_first_window(base: Path, backbone: Backbone) -> None:
    long = Pretrained(str(base), max_tokens=150).load()
    first, second = " ".join("abcdefghij" * 7 + "abcde"), "x y z"
    with torch.no_grad():
        states = long.encode_text([f"{first} {second}"])[0]
        one, two = backbone.encode_text([first])[0], backbone.encode_text([second])[0]
    assert states.shape == long.text_shape == (155, 40)
    torch.testing.assert_close(states[:77], one[:77])
    torch.testing.assert_close(states[77:154], two[:77])
    torch.testing.assert_close(states[154], one[77])


def test_sizes_and_crops_reach_the_unet(backbone: Backbone, pipe: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    noisy, times = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([3, 900])
    frames = torch.tensor([[72.0, 80, 0, 4, 64, 64], [640, 480, 16, 0, 64, 64]])
    with torch.no_grad():
        text = backbone.encode_text(["a dog", "a cat"])
        ours = backbone.predict(noisy, times, text, frame=frames)
        added = {"text_embeds": text[:, -1, :24], "time_ids": frames}
        theirs = pipe.unet(noisy, times, encoder_hidden_states=text[:, :-1], added_cond_kwargs=added).sample
        whole = backbone.predict(noisy, times, text)
        alone = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        same = backbone.predict(noisy, times, text, frame=alone)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # layouts differ, and sums with them
    assert torch.equal(whole, same)
    assert not torch.allclose(ours, whole)


def test_images_are_those_of_plain_diffusers(backbone: Backbone, pipe: Any) -> None:
    theirs = pipe(
        "a dog", negative_prompt="", num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(4), output_type="np",
    ).images[0]  # fmt: skip
    [ours] = generate(backbone, [Request("a dog", 4)], Sampling(steps=3, guidance=5.0))
    assert np.abs(ours.astype(int) - (theirs * 255).round()).max() <= 1


def test_layers_behind_its_states_are_named(backbone: Backbone) -> None:
    for name, encoder in backbone.encoders.items():
        encoder.requires_grad_(True)
        backbone.encode_text(["a dog"]).square().sum().backward()
        dead = {n for n, p in encoder.named_parameters() if p.grad is None}
        assert dead == {n for n, _ in encoder.named_parameters() if n.startswith(backbone.unused(name))}
        assert bool(dead) is (name == "text_encoder")


@pytest.mark.parametrize(
    ("whole", "size", "offset", "flip", "wanted"),
    [
        ((80, 72), (64, 64), (0.5, 0.5), False, (72, 80, 0, 4, 64, 64)),
        ((100, 200), (50, 50), (0.5, 0.5), False, (200, 100, 25, 0, 50, 50)),
        ((200, 100), (50, 50), (0.0, 0.5), False, (100, 200, 0, 0, 50, 50)),
        # The mirrored image is cropped where the mirrored crop lies.
        ((200, 100), (50, 50), (0.0, 0.5), True, (100, 200, 0, 50, 50, 50)),
    ],
)
def test_a_frame_says_where_the_crop_is_from(
    whole: tuple[int, int], size: tuple[int, int], offset: tuple[float, float], flip: bool, wanted: tuple[int, ...]
) -> None:
    assert frame(whole, size, offset, flip) == wanted
