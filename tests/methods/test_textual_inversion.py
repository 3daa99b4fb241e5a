"""Textual Inversion: only the embedding vectors change, prompts use all of them, and other programs load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import sdtune
from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_token_vectors import initialize_tokens, token_vectors
from sdtune.backbone.new_tokens import NewToken
from sdtune.callbacks.data_summary import caption_summary
from sdtune.errors import UserError
from sdtune.formats import embeddings
from sdtune.methods import LoRA, TextualInversion
from sdtune.methods.base import check_trainable
from sdtune.sampling.loop import Sampling
from sdtune.training.caption_facts import caption_facts

CAT, DOG = NewToken("<my_cat>", "cat", vectors=2), NewToken("<my_dog>", "a big dog")


def frozen_tensors(model: Any) -> dict[str, Tensor]:
    trainable_names = {name for name, _ in model.trainable()}
    return {k: v.clone() for k, v in model.state_dict().items() if k not in trainable_names}


def trained_model(tiny: Path, images: Path, steps: int = 2, **settings: Any) -> tuple[TextualInversion, Spy]:
    settings = {"new_tokens": [CAT, DOG], **settings}
    model = TextualInversion(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-1), **settings)
    spy = Spy()
    data = folder_data(images, templates=["a photo of <my_cat> and <my_dog>, {}"], cache_latents=False)
    model.configure_model()
    model.before = frozen_tensors(model)
    fit(model, data, steps, [spy])
    return model, spy


def test_only_the_embedding_vectors_are_trained(tiny: Path, images: Path) -> None:
    model, spy = trained_model(tiny, images)
    [(name, vectors)] = model.trainable()
    assert name.endswith("token_embedding.vectors")
    assert vectors.shape == (3, 32)
    [group] = model.trainer.optimizers[0].param_groups
    assert [p.shape for p in group["params"]] == [vectors.shape]
    assert group["weight_decay"] == 0
    assert spy.gradients[1][name].any(1).all(), "a vector without a gradient"
    after = frozen_tensors(model)
    assert model.before.keys() == after.keys()
    for key, value in model.before.items():
        assert torch.equal(value, after[key]), key


def test_vectors_are_initialized_with_the_mean_of_the_init_tokens(tiny: Path) -> None:
    model = TextualInversion(backbone=Pretrained(str(tiny)), new_tokens=[CAT, DOG])
    model.configure_model()
    backbone = model.backbone
    table = backbone.text_encoder.get_input_embeddings().table.weight
    for token in (CAT, DOG):
        ids = backbone.tokenizer(token.init, add_special_tokens=False).input_ids
        assert len(ids) > 1
        [rows] = token_vectors(backbone)[token.token]
        assert len(rows) == token.vectors
        for row in rows:
            torch.testing.assert_close(row, table[ids].mean(0))


def test_prompt_is_expanded_to_all_vectors_of_a_token(tiny: Path) -> None:
    model = TextualInversion(backbone=Pretrained(str(tiny)), new_tokens=[CAT, DOG])
    model.configure_model()
    backbone = model.backbone
    first = len(backbone.tokenizer)
    ids = backbone.tokenize(["A <My_Cat>, a <my_dog>.", "<my_cat>s x<my_cat> <my_dog>_1"])
    assert [i for i in ids[0].tolist() if i >= first] == [first, first + 1, first + 2]
    assert not (ids[1] >= first).any(), "a part of another word is not the token"
    assert len(backbone.token_ids(["<my_cat>"])[0]) == 2


def test_invalid_tokens_are_refused(tiny: Path) -> None:
    source = Pretrained(str(tiny))
    with pytest.raises(UserError, match="^new_tokens: '<Cat>' is not a single lower-case word.*use '<cat>'"):
        TextualInversion(backbone=source, new_tokens=[NewToken("<Cat>", "cat")])
    with pytest.raises(UserError, match="use 'my_cat'"):
        TextualInversion(backbone=source, new_tokens=[NewToken("my cat", "cat")])
    with pytest.raises(UserError, match="'<a>_1' is defined twice"):
        TextualInversion(backbone=source, new_tokens=[NewToken("<a>", "cat", 2), NewToken("<a>_1", "cat")])
    for tokens in ([NewToken("<cat>", "cat"), NewToken("[cat]", "cat")], [NewToken("cat-best", "cat")]):
        with pytest.raises(UserError, match="would be saved as cat"):
            TextualInversion(backbone=source, new_tokens=tokens)
    with pytest.raises(UserError, match="^new_tokens: the list is empty"):
        TextualInversion(backbone=source)


@pytest.mark.parametrize(
    ("prompt", "vectors"),
    [
        ("a sks", [0, 1]),
        ("a sks-dog", [2, 3]),
        ("a sks-style, a sks_dog", []),
        ("a pre-sks", []),
        ("SKS-Dog and SKS", [2, 3, 0, 1]),
        ("sks, (sks) sks's", [0, 1, 0, 1, 0, 1]),
        ("<cat>.", [4, 5]),
        ("<cat>-big <cat>s", []),
        ("<cat><cat>", [4, 5, 4, 5]),
        ("sks_1 <cat>_1", []),
        ("cafe\N{COMBINING ACUTE ACCENT}", [6, 7]),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_either_all_vectors_of_a_token_are_in_a_prompt_or_none(
    tiny: Path, prompt: str, vectors: list[int], is_reversed: bool
) -> None:
    names = ["sks", "sks-dog", "<cat>", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    backbone = Pretrained(str(tiny)).load()
    ordered = names[::-1] if is_reversed else names
    initialize_tokens(backbone, [NewToken(name, "cat", vectors=2) for name in ordered])
    first = len(backbone.tokenizer)
    known = backbone.new_tokens["text_encoder"]
    numbers = {first + row: 2 * names.index(name) + i for name in names for i, row in enumerate(known.rows(name))}
    [ids] = backbone.tokenize([prompt]).tolist()
    assert [numbers[i] for i in ids if i >= first] == vectors


@pytest.mark.parametrize("token", ["bird", "a"])
def test_word_of_the_vocabulary_is_replaced_only_on_purpose(token: str, images: Path) -> None:
    """On pocket; "bird" is in its vocabulary only with its end-of-word mark."""
    source = Pretrained("pocket")
    data = folder_data(images, templates=[f"a photo of {token}, {{}}"])
    data.open(source.facts.side, source.facts.factor)
    model = TextualInversion(backbone=source, new_tokens=[NewToken(token, "cat")])
    with pytest.raises(
        UserError, match=f"^new_tokens: '{token}' is already in the tokenizer's vocabulary.*use <{token}>"
    ):
        check_trainable(model, data)
    check_trainable(TextualInversion(backbone=source, new_tokens=[NewToken(token, "cat", overwrite=True)]), data)


def test_new_token_replaces_a_word_of_the_vocabulary(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    initialize_tokens(backbone, [NewToken("a", "cat", overwrite=True)])
    assert backbone.tokenize(["a cat"])[0, 1] == len(backbone.tokenizer)


def test_plain_diffusers_generates_the_same_image(tiny: Path, images: Path, tmp_path: Path) -> None:
    model, _ = trained_model(tiny, images)
    model.artifact(tmp_path, "mine")
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors")}
    assert names == {
        "learned_embeds_my_cat.safetensors",
        "learned_embeds_my_dog.safetensors",
        "embeddings/my_cat.safetensors",
        "embeddings/my_dog.safetensors",
    }
    assert set(load_file(tmp_path / "learned_embeds_my_cat.safetensors")) == {"<my_cat>"}
    assert load_file(tmp_path / "embeddings/my_cat.safetensors")["emb_params"].shape == (2, 32)

    prompt, source = "a photo of <my_cat> with <my_dog>", Pretrained(str(tiny))
    settings = Sampling(steps=3, guidance=4.0, negative_prompt="bad <my_dog>")
    [image] = sdtune.sample(prompt, [{"path": str(tmp_path)}], backbone=source, seeds=[5], sampling=settings)
    [base] = sdtune.sample(prompt, backbone=source, seeds=[5], sampling=settings)
    pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for name in ("my_cat", "my_dog"):
        pipe.load_textual_inversion(str(tmp_path), weight_name=f"learned_embeds_{name}.safetensors")
    [diffusers_image] = pipe(
        prompt,
        negative_prompt="bad <my_dog>",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    ).images
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(diffusers_image)).max()
    assert difference <= 1
    assert np.abs(np.asarray(image).astype(int) - np.asarray(base)).max() > 2

    [without_brackets] = sdtune.sample(
        prompt.replace("<my_dog>", "my_dog").replace("<my_cat>", "my_cat"),
        backbone=source,
        seeds=[5],
        sampling=settings,
    )
    assert np.abs(np.asarray(image).astype(int) - np.asarray(without_brackets)).max() > 2


def test_new_tokens_and_a_lora_are_trained_in_one_run(tiny: Path, images: Path, tmp_path: Path) -> None:
    """Pivotal tuning is a LoRA run with new_tokens; it has no separate class."""
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2), new_tokens=[DOG], tokens_lr=1e-1)
    fit(model, folder_data(images, templates=["<my_dog>, {}"]), 2)
    groups = model.trainer.optimizers[0].param_groups
    assert [(g["name"], g["lr"] > 5e-2) for g in groups] == [("denoiser", False), ("tokens", True)]
    model.artifact(tmp_path, "mine")
    source, prompt = Pretrained(str(tiny)), "one <my_dog>"
    with_lora, without_lora = (
        np.asarray(sdtune.sample(prompt, files, backbone=source, sampling=Sampling(steps=2))[0]).astype(int)
        for files in ([{"path": str(tmp_path)}], [{"path": str(tmp_path / "learned_embeds.safetensors")}])
    )
    assert np.abs(with_lora - without_lora).max() > 0


def test_new_token_in_no_caption_is_refused(tiny: Path, images: Path) -> None:
    model = TextualInversion(backbone=Pretrained(str(tiny)), new_tokens=[NewToken("<new>", "a")])
    with pytest.raises(UserError, match=r"^new_tokens: <new> occurs in no caption \(.*'picture number 0'"):
        fit(model, folder_data(images), 1)


def test_token_with_step_in_its_name_is_not_a_snapshot(tmp_path: Path) -> None:
    embeddings.write(tmp_path, {"<two-step>": torch.ones(1, 4), "<b>": torch.zeros(1, 4)}, "", {})
    embeddings.write(tmp_path, {"<two-step>": torch.ones(1, 4)}, "-step00000400", {})
    assert set(embeddings.read_folder(tmp_path)) == {"<two-step>", "<b>"}


def test_caption_length_counts_every_vector_of_a_token(tiny: Path, images: Path) -> None:
    for file in images.glob("*.txt"):
        file.write_text("<new>", encoding="utf-8")
    data, source = folder_data(images), Pretrained(str(tiny))
    data.open(32, 4)
    backbone = source.load()
    initialize_tokens(backbone, [NewToken("<new>", "a", 5)])
    lines = caption_summary(caption_facts(data, backbone, source.tokenizer_folder()))
    assert "captions: 1 distinct; the longest has 7 tokens, the limit is 77" in lines
