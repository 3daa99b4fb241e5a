"""CLIP metrics on a tiny CLIP with random weights, compared with embeddings computed directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sdtune.backbone import Facts, Pretrained
from sdtune.backbone.families import SD1
from sdtune.data import Folder
from sdtune.errors import UserError
from sdtune.evaluation import ClipMetrics
from sdtune.evaluation.clip import Clip, clip_image, clip_text
from sdtune.sampling.run_models import RunModels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{b}</w>" for b in alphabet), "<|startoftext|>", "<|endoftext|>"]
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={**layers, **ends, "vocab_size": len(tokens), "max_position_embeddings": 24},
            vision_config={**layers, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
    ).save_pretrained(folder)
    CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=24).save_pretrained(folder)
    return folder


def test_embeddings_equal_those_of_the_model(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), CPU)
    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(3)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    tokens = clip.tokenizer(["a dog", "a cat", "x"], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**tokens, pixel_values=(pixels - mean) / std)
    torch.testing.assert_close(clip.images(images), F.normalize(output.image_embeds, dim=-1))
    torch.testing.assert_close(clip.prompts(["a dog", "a cat", "x"]), F.normalize(output.text_embeds, dim=-1))


def test_an_image_is_most_similar_to_itself(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), CPU)
    images = [np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8) for i in range(4)]
    assert clip_image(clip, images[:1], images[:1]) == pytest.approx(1.0, abs=1e-5)
    assert clip_image(clip, images[:1], images[1:]) < 1.0 - 1e-5


def test_each_image_is_compared_with_its_prompt(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), CPU)
    images = [np.full((16, 16, 3), value, dtype=np.uint8) for value in (0, 255)]
    cosines = clip.images(images) @ clip.prompts(["dark", "bright"]).T
    assert clip_text(clip, images, ["dark", "bright"]) == pytest.approx(float(cosines.diagonal().mean()), abs=1e-6)


def test_metrics_without_a_clip_are_null_with_a_reason(tiny: Path, images: Path, tmp_path: Path) -> None:
    data = Folder(path=str(images))
    data.open(32, 4)
    metrics = ClipMetrics(clip=None).run(RunModels(Pretrained(str(tiny)), tmp_path, "x", CPU), data, tmp_path)
    reasons = metrics.pop("reasons")
    assert set(metrics.values()) == {None}
    assert set(reasons) == set(metrics)
    json.dumps(metrics, allow_nan=False)


def test_missing_clip_folder_is_refused_before_weights_are_loaded(images: Path) -> None:
    data = Folder(path=str(images))
    with pytest.raises(UserError, match=r"evaluation\.clip: /nowhere is not a folder"):
        ClipMetrics(clip="/nowhere").check(data, Facts(32, 4, 4, "epsilon", 77, SD1))
