"""Invalid files are refused in one line that names the file; files are written completely or not at all."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from lora_files import read_diffusers, sd1_table
from sdtune.errors import UserError
from sdtune.formats import read_lora, read_safetensors, write_safetensors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TABLE = sd1_table([f"unet.{Q}", "unet.conv_in"])
KOHYA = f"lora_unet_{Q.replace('.', '_')}"
DOWN, UP = torch.ones(2, 6), torch.ones(5, 2)


def refusal(path, tensors, metadata=None):
    """Message of ``read_lora`` for an invalid file with these tensors."""
    write_safetensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, metadata or {"note": ""})
    with pytest.raises(UserError, match=".") as caught:
        read_lora(path, TABLE)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def kohya_tensors(down=DOWN, up=UP, **more):
    return {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, **more}


def diffusers_tensors(prefix=f"unet.{Q}", down=DOWN, up=UP):
    return {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "not a LoRA"),
        ({"conv_in.weight": DOWN}, "not a LoRA"),
        (kohya_tensors(**{f"{KOHYA}.dora_scale": UP}), f"unsupported tensors: {KOHYA}.dora_scale"),
        (kohya_tensors(**{f"{KOHYA}.alpha": torch.ones(2)}), "alpha must be a single number, got shape [2]"),
        (kohya_tensors(**{f"{KOHYA}.alpha": torch.tensor(float("nan"))}), f"NaN or infinite values in {KOHYA}.alpha"),
        (kohya_tensors(**{"lora_unet_conv_in.alpha": torch.tensor(1.0)}), "unet.conv_in: a low-rank matrix is missing"),
        ({f"{KOHYA}.lora_up.weight": UP}, "a low-rank matrix is missing"),
        (kohya_tensors(up=torch.ones(5, 3)), "shapes [2, 6] and [5, 3]"),
        (kohya_tensors(down=torch.tensor(1.0)), "shapes [] and [5, 2]"),
        (kohya_tensors(down=DOWN.int()), "are not a low-rank pair"),
        (kohya_tensors(down=torch.ones(0, 6), up=torch.ones(5, 0)), "are not a low-rank pair"),
        (kohya_tensors(down=torch.ones(2, 6, 3, 3), up=torch.ones(5, 2, 3, 3)), "are not a low-rank pair"),
        (
            {f"lora_te2_{i}.alpha": UP for i in range(5)},
            "unknown target modules: lora_te2_0 and 4 more; use an SDXL backbone",
        ),
        (diffusers_tensors("unet.label_embedding"), "unet.label_embedding; use the backbone of its training"),
        (diffusers_tensors("text_encoder_2.layers.0"), "unknown target modules: text_encoder_2.text_model.layers.0"),
        (
            diffusers_tensors() | {f"unet.{Q}.lora_magnitude_vector": UP},
            f"unsupported tensors: unet.{Q}.lora_magnitude_vector",
        ),
        ({f"unet.{Q}.lora_A.weight": DOWN}, "a low-rank matrix is missing"),
        (diffusers_tensors("unet.a\n\x1b[2J"), "unet.a\\n\\x1b[2J"),
        (diffusers_tensors(down=torch.tensor(1.0)), "are not a low-rank pair"),
    ],
)
def test_tensors_that_are_not_a_lora_of_this_backbone_are_refused(tmp_path, tensors, message):
    assert message in refusal(tmp_path / "it.safetensors", tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
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
def test_settings_without_a_valid_alpha_are_refused(tmp_path, settings, message):
    settings_json = settings if isinstance(settings, str) else json.dumps(settings)
    assert message in refusal(
        tmp_path / "it.safetensors", diffusers_tensors(), {"lora_adapter_metadata": settings_json}
    )


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
    write_safetensors(path, diffusers_tensors(), {"lora_adapter_metadata": json.dumps(settings)})
    assert read_diffusers(path).alphas == {f"unet.{Q}": alpha}


def test_text_encoder_names_are_read_with_the_prefix_text_model(tmp_path):
    path = tmp_path / "it.safetensors"
    write_safetensors(path, diffusers_tensors("text_encoder.encoder.layers.0.mlp.fc1"), {})
    assert read_diffusers(path).alphas == {"text_encoder.text_model.encoder.layers.0.mlp.fc1": 2.0}


class MaliciousPickle:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", ["empty", "text", "cut", "header", "pickle"])
def test_file_that_is_not_safetensors_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it.safetensors"
    write_safetensors(path, kohya_tensors(), {})
    valid = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "cut": valid[:-1],
            "header": valid[:8] + b"?" + valid[9:],
            "pickle": pickle.dumps(MaliciousPickle()),
        }[content]
    )
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        read_lora(tmp_path / "gone.safetensors", TABLE)
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors: no such file"):
        read_lora(tmp_path, TABLE)


def test_views_are_stored_with_their_visible_values(tmp_path):
    table = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    write_safetensors(tmp_path / "it", {"turned": table.T, "row": table[1], "half": table.half()}, {"a": "b"})
    tensors, metadata = read_safetensors(tmp_path / "it")
    assert torch.equal(tensors["turned"], table.T)
    assert torch.equal(tensors["row"], table[1])
    assert tensors["half"].dtype == torch.float16
    assert metadata == {"a": "b"}
    assert list(tmp_path.iterdir()) == [tmp_path / "it"]


@pytest.mark.parametrize("failing_function", ["sdtune.formats.files.save_file", "os.fsync"])
def test_failed_write_keeps_the_existing_file(tmp_path, monkeypatch, failing_function):
    path = tmp_path / "it.safetensors"
    write_safetensors(path, {"a": DOWN}, {})

    def fail_with_full_disk(*arguments):
        for file in arguments[1:2]:
            file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing_function, fail_with_full_disk)
    with pytest.raises(UserError, match="it.safetensors: cannot be written .*No space left"):
        write_safetensors(path, {"a": UP}, {})
    assert torch.equal(read_safetensors(path)[0]["a"], DOWN)
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_no_partial_file(tmp_path):
    with pytest.raises(TypeError):
        write_safetensors(tmp_path / "it", {"a": DOWN}, {"number": 1})  # type: ignore[dict-item]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("in the way of a folder", encoding="utf-8")
    with pytest.raises(UserError, match="folder: cannot be written"):
        write_safetensors(tmp_path / "folder", {"a": DOWN}, {})
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "it", {"a": DOWN}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
