"""What is refused, each with one line that names the file; and files that are whole or not there."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from lora_files import read_diffusers
from sdtune.errors import UserError
from sdtune.formats import read_lora, read_safetensors, write_safetensors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MODULES = [f"unet.{Q}", "unet.conv_in"]
KOHYA = f"lora_unet_{Q.replace('.', '_')}"
DOWN, UP = torch.ones(2, 6), torch.ones(5, 2)


def refusal(path, tensors, metadata=None):
    """The message with which ``read_lora`` refuses such a file."""
    write_safetensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, metadata or {"note": ""})
    with pytest.raises(UserError, match=".") as caught:
        read_lora(path, MODULES)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def kohya(down=DOWN, up=UP, **more):
    return {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, **more}


def plain(prefix=f"unet.{Q}", down=DOWN, up=UP):
    return {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "not a LoRA"),
        ({"conv_in.weight": DOWN}, "not a LoRA"),
        (kohya(**{f"{KOHYA}.dora_scale": UP}), "dora_scale: not read"),
        (kohya(**{f"{KOHYA}.alpha": torch.ones(2)}), "alpha has shape [2]"),
        (kohya(**{f"{KOHYA}.alpha": torch.tensor(float("nan"))}), "alpha is nan"),
        (kohya(**{"lora_unet_conv_in.alpha": torch.tensor(1.0)}), "unet.conv_in: without both"),
        ({f"{KOHYA}.lora_up.weight": UP}, "without both"),
        (kohya(up=torch.ones(5, 3)), "shapes [2, 6] and [5, 3]"),
        (kohya(down=torch.tensor(1.0)), "shapes [] and [5, 2]"),
        (kohya(down=DOWN.int()), "make no low-rank pair"),
        (kohya(down=torch.ones(0, 6), up=torch.ones(5, 0)), "make no low-rank pair"),
        (kohya(down=torch.ones(2, 6, 3, 3), up=torch.ones(5, 2, 3, 3)), "make no low-rank pair"),
        ({f"lora_te2_{i}.alpha": UP for i in range(5)}, "lora_te2_0, lora_te2_1, lora_te2_2 and 2 more: no such"),
        (plain("unet.label_embedding"), "unet.label_embedding: no such module"),
        (plain("text_encoder_2.layers.0"), "text_encoder_2.text_model.layers.0: no such module"),
        (plain() | {f"unet.{Q}.lora_magnitude_vector": UP}, "lora_magnitude_vector: not read"),
        ({f"unet.{Q}.lora_A.weight": DOWN}, "without both"),
        (plain("unet.a\n\x1b[2J"), "unet.a\\n\\x1b[2J"),
        (plain(down=torch.tensor(1.0)), "make no low-rank pair"),
    ],
)
def test_tensors_that_are_no_lora_of_this_backbone(tmp_path, tensors, words):
    assert words in refusal(tmp_path / "it.safetensors", tensors)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("[]", "should be an object"),
        ({}, "lora_alpha: Field required"),
        ({"text_encoder.lora_alpha": 4}, "lora_alpha: Field required"),
        ({"unet.lora_alpha": "4"}, "valid number"),
        ('{"unet.lora_alpha": 1e999}', "finite"),
        ({"unet.lora_alpha": 4, "unet.use_dora": True}, "use_dora"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}, "valid dictionary"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+b": 1}}, "match pattern"),
    ],
)
def test_settings_that_give_no_alpha(tmp_path, settings, words):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    assert words in refusal(tmp_path / "it.safetensors", plain(), {"lora_adapter_metadata": text})


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ({}, 4),
        ({"to_q": 1}, 1),
        ({"attn1.to_q": 1}, 1),
        ({"q": 1}, 4),
        ({f"^{Q}": 1}, 1),
        ({"^attn1.to_q": 1}, 4),
        ({"to_k": 2, "to_q": 1, Q: 3}, 1),
    ],
)
def test_alpha_patterns_match_as_in_peft(tmp_path, pattern, alpha):
    path = tmp_path / "it.safetensors"
    settings = {"unet.lora_alpha": 4, "unet.alpha_pattern": pattern}
    write_safetensors(path, plain(), {"lora_adapter_metadata": json.dumps(settings)})
    assert read_diffusers(path).alphas == {f"unet.{Q}": alpha}


def test_flat_text_encoder_names_are_read_with_text_model(tmp_path):
    path = tmp_path / "it.safetensors"
    write_safetensors(path, plain("text_encoder.encoder.layers.0.mlp.fc1"), {})
    assert read_diffusers(path).alphas == {"text_encoder.text_model.encoder.layers.0.mlp.fc1": 2.0}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", ["empty", "text", "cut", "header", "pickle"])
def test_files_that_are_not_safetensors(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it.safetensors"
    write_safetensors(path, kohya(), {})
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "cut": whole[:-1],
            "header": whole[:8] + b"?" + whole[9:],
            "pickle": pickle.dumps(Bomb()),
        }[content]
    )
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        read_lora(tmp_path / "gone.safetensors", MODULES)
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors: no such file"):
        read_lora(tmp_path, MODULES)


def test_tensors_are_stored_as_they_are_seen(tmp_path):
    table = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    write_safetensors(tmp_path / "it", {"turned": table.T, "row": table[1], "half": table.half()}, {"a": "b"})
    tensors, metadata = read_safetensors(tmp_path / "it")
    assert torch.equal(tensors["turned"], table.T)
    assert torch.equal(tensors["row"], table[1])
    assert tensors["half"].dtype == torch.float16
    assert metadata == {"a": "b"}
    assert list(tmp_path.iterdir()) == [tmp_path / "it"]


@pytest.mark.parametrize("place", ["sdtune.formats.files.save_file", "os.fsync"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, place):
    path = tmp_path / "it.safetensors"
    write_safetensors(path, {"a": DOWN}, {})

    def full(*given):
        for file in given[1:2]:
            file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(UserError, match="it.safetensors: cannot be written .*No space left"):
        write_safetensors(path, {"a": UP}, {})
    assert torch.equal(read_safetensors(path)[0]["a"], DOWN)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_no_draft(tmp_path):
    with pytest.raises(TypeError):
        write_safetensors(tmp_path / "it", {"a": DOWN}, {"number": 1})  # type: ignore[dict-item]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(UserError, match="folder: cannot be written"):
        write_safetensors(tmp_path / "folder", {"a": DOWN}, {})
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "it", {"a": DOWN}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
