"""``sdtune import-kohya``: the printed command composes, and says the same as the configuration of kohya."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from running import sdtune
from sdtune.cli.as_typed import for_hydra
from sdtune.config.compose import compose, search_path

CONFIG = """
[model_arguments]
pretrained_model_name_or_path = "/models/sd v15.safetensors"
v2 = false
[dataset_arguments]
dataset_config = "/elsewhere/dataset.toml"
[network]
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
unet_lr = 1e-4
text_encoder_lr = 5e-5
learning_rate = 2e-4
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 100
max_train_epochs = 10
mixed_precision = "bf16"
save_every_n_epochs = 1
output_name = "otter"
min_snr_gamma = 5
seed = 42
sdpa = false
multires_noise_iterations = 6
my_option = 3
"""

DATASET = """
[general]
shuffle_caption = true
flip_aug = true
[[datasets]]
resolution = 512
batch_size = 2
  [[datasets.subsets]]
  image_dir = "/data/sks otter"
  class_tokens = "sks otter, wet"
  num_repeats = 10
  [[datasets.subsets]]
  image_dir = "/data/more"
  [[datasets.subsets]]
  is_reg = true
  image_dir = "/data/reg"
  class_tokens = "otter"
"""


def converted(capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[Any, list[str]]:
    """The composed config of the printed command, and the printed notes."""
    assert sdtune("import-kohya", *map(str, files)) == 0
    command, *notes = capsys.readouterr().out.splitlines()
    words = shlex.split(command)
    assert words[:2] == ["sdtune", "train"]
    assert all(note.startswith("# ") for note in notes)
    return compose("train", search_path(None), for_hydra("train", words[2:])), [note[2:] for note in notes]


def write(folder: Path, **texts: str) -> list[Path]:
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return [folder / f"{name}.toml" for name in texts]


def test_config_and_dataset_become_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that dataset_config names is looked for beside the config too, because configs are copied with it."""
    [config, dataset] = write(tmp_path, config=CONFIG, dataset=DATASET)
    composed, notes = converted(capsys, config)
    assert (composed, notes) == converted(capsys, config, dataset)
    expected = {
        "backbone.path": "/models/sd v15.safetensors",
        "method.rank": 16,
        "method.alpha": 8,
        "method.targets": ["cross_attention", "self_attention", "text_encoder"],
        "method.text_encoder_lr": 5e-5,
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.1,
        "optimizer.betas": [0.9, 0.99],
        "lr_schedule.warmup_steps": 100,
        "trainer.epochs": 10,
        "hardware.precision": "bf16-mixed",
        "name": "otter",
        "seed": 42,
        "objective.weighting.gamma": 5,
        "data.path": "/data/sks otter",
        "data.prompt": "sks otter, wet",
        "data.repeats": 10,
        "data.resolution": 512,
        "data.batch_size": 2,
        "data.flip": True,
        "data.class_path": "/data/reg",
        "data.class_prompt": "otter",
    }
    for key, value in expected.items():
        node = composed
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert composed.hydra.runtime.choices.optimizer == "adamw8bit"
    assert composed.hydra.runtime.choices.lr_schedule == "cosine"
    assert "multires_noise_iterations: not available" in notes
    assert "my_option: unknown, not translated" in notes
    assert "shuffle_caption: captions are not shuffled" in notes
    assert "/data/more: one image folder per training; put its images below /data/sks otter" in notes
    assert not any("sdpa" in note or "v2" in note for note in notes), "options that are off need no note"


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ('network_dim = 4\n', "sd15_lora"),
        ('network_dim = 4\nsdxl = true\n', "sdxl_lora"),
        ('token_string = "sks"\ninit_word = "cat"\n', "sd15_textual_inversion"),
        ('conditioning_data_dir = "maps"\n', "sd15_controlnet"),
        ('reg_data_dir = "reg"\n', "sd15_dreambooth"),
        ('train_data_dir = "images"\n', "sd15_full"),
    ],
)  # fmt: skip
def test_recipe_is_that_of_the_training_script(
    text: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed, _ = converted(capsys, *write(tmp_path, config=text))
    assert composed.hydra.runtime.choices.experiment == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "import-kohya: {file}: No such file or directory; use an existing TOML file"),
        ("a = [1", "import-kohya: {file}: not TOML (Unclosed array"),
        ("", "import-kohya: {file} has no options; use a file of --config_file"),
        ("datasets = 3", "import-kohya: {file}: datasets is not a list of tables; write [[datasets]]"),
        ("[[datasets]]\n[[datasets.subsets]]\nx = 1", "import-kohya: {file}: a subset has no image_dir; add it"),
    ],
)
def test_damaged_files_are_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert sdtune("import-kohya", str(file)) == 2
    assert capsys.readouterr().err.startswith(f"sdtune: {message.format(file=file)}")


def test_number_of_files_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtune("import-kohya") == 2
    assert "import-kohya: expected one or two files, got nothing" in capsys.readouterr().err
    assert sdtune("import-kohya", "--help") == 0
    assert "usage: sdtune import-kohya CONFIG.toml" in capsys.readouterr().out
