"""Captions of tiny random models: prompts, batches, chat templates, and models that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from caption_models import build_blip, build_llava, save_photos
from sdtune.captioning.captioner import DEFAULT_INSTRUCTION, Captioner, CaptionSettings
from sdtune.captioning.models import check_model_name
from sdtune.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = save_photos(tmp_path_factory.mktemp("photos"), 6)
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def captioner(folder: Path, prompt: str | None = None, tokens: int = 8) -> Captioner:
    return Captioner(folder, CaptionSettings(prompt, tokens), CPU, "32-true")


def test_blip_captions_are_those_of_transformers(blip: Path, photos: list[Image.Image]) -> None:
    model, processor = BlipForConditionalGeneration.from_pretrained(blip), BlipProcessor.from_pretrained(blip)
    expected = [
        processor.decode(
            model.generate(**processor(images=photo, return_tensors="pt"), max_new_tokens=8)[0],
            skip_special_tokens=True,
        )
        for photo in photos
    ]
    assert len(set(expected)) > 2
    assert captioner(blip)(photos) == expected


def test_blip_continues_its_prompt(blip: Path, photos: list[Image.Image]) -> None:
    captions = captioner(blip, "a photo of")(photos)
    assert all(caption.startswith("a photo of ") for caption in captions)
    assert len(set(captions)) > 2


def test_caption_of_blip_that_ends_after_its_prompt_is_the_prompt(blip: Path, photos: list[Image.Image]) -> None:
    loaded = captioner(blip, "a photo of")
    loaded._model.text_decoder.cls.predictions.bias.data[3] = 1e6  # [SEP]
    assert loaded(photos[:2]) == ["a photo of", "a photo of"]


def test_max_new_tokens_limits_the_caption(blip: Path, photos: list[Image.Image]) -> None:
    assert {len(caption.split()) for caption in captioner(blip, tokens=3)(photos)} == {3}


def test_chat_model_answers_without_repeating_the_prompt(llava: Path, photos: list[Image.Image]) -> None:
    loaded = captioner(llava)
    captions = loaded(photos)
    assert len(set(captions)) == len(photos)
    assert not any("USER" in caption or "Describe" in caption for caption in captions)
    assert [loaded([photo])[0] for photo in photos] == captions
    assert captioner(llava, DEFAULT_INSTRUCTION)(photos) == captions


def test_chat_model_depends_on_its_prompt(llava: Path, photos: list[Image.Image]) -> None:
    captions = captioner(llava)(photos)
    assert captioner(llava, "Which colors are in this image?")(photos) != captions


def test_model_that_needs_torchvision_is_refused_in_one_line(llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(llava, folder)
    (folder / "processor_config.json").unlink()
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"^model: .*/qwen needs a package that is not installed \(torchvision\); ch"):
        captioner(folder)


def test_model_without_all_weights_is_refused(blip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "blip"
    shutil.copytree(blip, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"^model: .*/blip is not complete \(\d+ weights are missing, the first is vis"):
        captioner(folder)


def test_damaged_weights_are_refused(blip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "blip"
    shutil.copytree(blip, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^model: .*/blip cannot be loaded \(.*\); choose another model$"):
        captioner(folder)


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"model_type": "blip", "auto_map": {"AutoModel": "code.Model"}}, "needs Python code of its author"),
        ({"model_type": "clipseg"}, "is a model of type clipseg, which makes no captions"),
        ({}, "is a model of type None, which makes no captions"),
        (None, "contains no model (config.json is missing)"),
    ],
)
def test_unsupported_model_is_refused_before_it_is_loaded(
    config: dict[str, object] | None, fragment: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_model_name(str(tmp_path), "caption")
    assert f"model: {tmp_path} {fragment}" in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"contains no weights \(\*\.safetensors is missing\)"):
        check_model_name(str(tmp_path), "caption")
