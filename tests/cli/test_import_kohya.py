"""``sdtune import-kohya``: the printed command composes, and says the same as the configuration of kohya."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from running import rows, sdtune
from sdtune.cli.as_typed import for_hydra
from sdtune.cli.import_kohya import main
from sdtune.config.compose import compose, search_path
from sdtune.config.sources import with_targets

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
    config, dataset = write(tmp_path, config=CONFIG, dataset=DATASET)
    composed, notes = converted(capsys, config)
    assert (composed, notes) == converted(capsys, config, dataset)
    expected = {
        "backbone.path": "/models/sd v15.safetensors",
        "method.rank": 16,
        "method.alpha": 8,
        "method.targets": ["cross_attention", "self_attention", "feed_forward", "text_encoder"],
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
    assert (composed.data.captions.kind, composed.data.captions.shuffle) == ("tags", True)
    assert not any("sdpa" in note or "v2" in note for note in notes), "options that are off need no note"


MIX = """
[general]
shuffle_caption = true
keep_tokens_separator = "|||"
enable_wildcard = true
[[datasets]]
resolution = 768
batch_size = 4
  [[datasets.subsets]]
  image_dir = "/data/10_sks girl"
  num_repeats = 10
  caption_prefix = "sks girl,"
  keep_tokens = 1
  [[datasets.subsets]]
  image_dir = "/other/style"
  class_tokens = "zzz style, painting"
  caption_tag_dropout_rate = 0.1
  flip_aug = true
[[datasets]]
resolution = 512
batch_size = 8
  [[datasets.subsets]]
  is_reg = true
  image_dir = "/reg/style"
  class_tokens = "girl"
"""


def test_several_subsets_become_a_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIG.replace("seed = 42", "seed = 42\nprior_loss_weight = 0.5")
    composed, notes = converted(capsys, *write(tmp_path, config=config, mix=MIX))
    captions = {"kind": "tags"}
    assert OmegaConf.to_container(composed.data.sources) == {
        "sks_girl": {
            "path": "/data/10_sks girl",
            "repeats": 10,
            "resolution": 768,
            "captions": {**captions, "keep_tokens": 1, "prefix": "sks girl,"},
        },
        "style": {
            "path": "/other/style",
            "prompt": "zzz style, painting",
            "resolution": 768,
            "flip": True,
            "captions": {**captions, "caption_tag_dropout_rate": 0.1},
        },
        "style_2": {"path": "/reg/style", "prompt": "girl", "loss_weight": 0.5, "resolution": 512},
    }
    shared = composed.data.captions
    assert (shared.kind, shared.shuffle, shared.keep_tokens_separator) == ("tags", True, "|||")
    assert (shared.wildcards, shared.lines, composed.data.batch_size) == (True, True, 4)
    assert "batch_size: one for all sources; the command has that of the first data set" in notes
    assert any(note.startswith("is_reg: class images are a source of their own") for note in notes)


def test_control_maps_of_several_subsets_belong_to_their_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subset = '[[datasets.subsets]]\nimage_dir = "/{0}"\nconditioning_data_dir = "/maps {0}"\n'
    text = f"[[datasets]]\n{subset.format('a')}{subset.format('b')}"
    composed, _ = converted(capsys, *write(tmp_path, config="max_train_steps = 100\n", data=text))
    assert composed.hydra.runtime.choices.method == "controlnet"
    assert composed.data.sources.b.control == {"option": "paired", "path": "/maps b"}
    with_targets(OmegaConf.to_container(composed.data))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "method", "backbone"),
    [
        ('network_dim = 4\n', "lora", "sd15"),
        ('network_module = "networks.lora"\nsdxl = true\n', "lora", "sdxl"),
        ('token_string = "sks"\ninit_word = "cat"\n', "textual_inversion", "sd15"),
        ('conditioning_data_dir = "maps"\n', "controlnet", "sd15"),
        ('reg_data_dir = "reg"\nv2 = true\n', "dreambooth", "sd21"),
        ('train_data_dir = "images"\n', "full", "sd15"),
    ],
)  # fmt: skip
def test_method_is_that_of_the_training_script(
    text: str, method: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed, _ = converted(capsys, *write(tmp_path, config=text))
    choices = composed.hydra.runtime.choices
    assert (choices.method, choices.backbone, choices.experiment) == (method, backbone, None)


def test_defaults_of_kohya_are_explicit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed, _ = converted(capsys, *write(tmp_path, config='network_module = "networks.lora"\n'))
    assert (composed.trainer.max_steps, composed.data.batch_size, composed.lr_schedule.warmup_steps) == (1600, 1, 0)
    assert (composed.optimizer.lr, composed.method.text_encoder_lr) == (2e-6, 2e-6)
    assert (composed.method.rank, composed.method.alpha_policy, composed.method.alpha) == (4, "constant", 1)
    assert "text_encoder" in composed.method.targets
    unet_only = 'network_module = "networks.lora"\nnetwork_train_unet_only = true\n'
    composed, _ = converted(capsys, *write(tmp_path, config=unet_only))
    assert composed.method.targets == ["cross_attention", "self_attention", "feed_forward"]


DERIVED = {
    "train_batch_size = 2\ngradient_accumulation_steps = 4": {
        "data.batch_size": 8,
        "trainer.accumulate_grad_batches": 4,
    },
    "max_train_steps = 100\nmax_train_epochs = 3": {"trainer.epochs": 3, "trainer.max_steps": 1500},
    "max_train_epochs = 0\nmin_snr_gamma = 0": {"trainer.epochs": None, "trainer.max_steps": 1600},
    "max_grad_norm = 0.0": {"trainer.gradient_clip_val": None},
    "network_dim = 8\nnetwork_alpha = 0": {"method.alpha": 8},
    'network_dim = 8\ntext_encoder_lr = 0': {
        "method.targets": ["cross_attention", "self_attention", "feed_forward"],
        "method.text_encoder_lr": None,
    },
    'resume = "state"': {"resume": None},
    'optimizer_type = "Adafactor"\noptimizer_args = ["warmup_init=False", "weight_decay=0.1"]': {
        "optimizer.weight_decay": 0.1
    },
}  # fmt: skip


@pytest.mark.parametrize("text", DERIVED)
def test_values_mean_the_same_as_in_kohya(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed, _ = converted(capsys, *write(tmp_path, config=f"{text}\n"))
    for key, value in DERIVED[text].items():
        assert OmegaConf.select(composed, key) == value, key


def test_what_a_dataset_cannot_express_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DATASET.replace("resolution = 512", "resolution = [512, 768]").replace(
        'class_tokens = "otter"', "num_repeats = 3"
    )
    _, notes = converted(capsys, *write(tmp_path, config="train_batch_size = 1\n", dataset=text))
    assert "resolution: one number sets the area of the buckets; each image keeps its aspect ratio" in notes
    assert "/data/reg: num_repeats of class images is not translated" in notes


def test_dataset_alone_becomes_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [dataset] = write(tmp_path, dataset=DATASET)
    assert sdtune("import-kohya", str(dataset)) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("data=folder data.captions.kind=tags data.captions.shuffle=true data.flip=true ")
    assert line.endswith(" data.class_path=/data/reg data.class_prompt=otter")


def test_converted_training_passes_the_checks(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (
        f'pretrained_model_name_or_path = "{tiny}"\nnetwork_module = "networks.lora"\nnetwork_dim = 2\n'
        f'train_data_dir = "{images}"\ntrain_batch_size = 1\ngradient_accumulation_steps = 2\nmax_train_epochs = 1\n'
        'resolution = "32,32"\noutput_name = "mine"\nmixed_precision = "no"\n'
    )
    assert sdtune("import-kohya", *map(str, write(tmp_path, config=config))) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[0])
    more = ("evaluation=none", "callbacks.samples=null", "hardware=cpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert sdtune(*words[1:], *more) == 0
    assert (tmp_path / "run" / "artifact" / "mine.safetensors").is_file()
    assert len(rows(tmp_path / "run")) == 3  # five images, two per step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "import-kohya: {file}: No such file or directory; use an existing TOML file"),
        ("a = [1", "import-kohya: {file}: not TOML (Unclosed array"),
        ("", "import-kohya: {file} has no options; use a file of --config_file"),
        ("datasets = 3", "import-kohya: {file}: datasets is not a list of tables; write [[datasets]]"),
        ("[[datasets]]\n[[datasets.subsets]]\nx = 1", "import-kohya: {file}: a subset has no image_dir; add it"),
        ("general = 3\n[[datasets]]", "import-kohya: {file}: general is not a table; write [general]"),
        ("[[datasets]]\nsubsets = [3]", "import-kohya: {file}: subsets is not a list of tables"),
        ("[[datasets]]", "import-kohya: the dataset file has no subset with images of the subject"),
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


SD3 = """
pretrained_model_name_or_path = "/models/sd 3.safetensors"
clip_l = "/models/clip_l.safetensors"
clip_g = "/models/clip g.safetensors"
t5xxl = "/models/t5xxl.safetensors"
t5xxl_max_token_length = 154
network_module = "networks.lora_sd3"
network_dim = 16
learning_rate = 1e-4
text_encoder_lr = [5e-5, 5e-5, 0.0]
cache_text_encoder_outputs = true
apply_t5_attn_mask = true
t5_dropout_rate = 0.1
clip_l_dropout_rate = 0.0
blocks_to_swap = 18
clip_skip = 2
min_snr_gamma = 5
disable_mmap_load_safetensors = true
"""


def printed(capsys: pytest.CaptureFixture[str], folder: Path, text: str) -> tuple[list[str], list[str]]:
    """Overrides of the printed command, and the printed notes."""
    main([str(path) for path in write(folder, config=text)])
    command, *notes = capsys.readouterr().out.splitlines()
    return shlex.split(command)[2:], [note.removeprefix("# ") for note in notes]


def test_lora_of_sd3_becomes_overrides_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, notes = printed(capsys, tmp_path, SD3)
    assert sorted(overrides) == [
        'backbone.path="/models/sd 3.safetensors"',
        "backbone.t5_tokens=154",
        "backbone.text_encoder=/models/clip_l.safetensors",
        'backbone.text_encoder_2="/models/clip g.safetensors"',
        "backbone.text_encoder_3=/models/t5xxl.safetensors",
        "backbone=sd35_medium",
        "data.batch_size=1",
        "data.cache_text=true",
        "data=folder",
        "lr_schedule.warmup_steps=0",
        "method.alpha=1",
        "method.alpha_policy=constant",
        "method.rank=16",
        "method.targets=[joint_attention,self_attention,feed_forward,text_encoder]",
        "method.text_encoder_lr=5e-05",
        "method=lora",
        "objective.timesteps.kind=uniform",
        "objective.timesteps.shift=1.0",
        "optimizer.lr=0.0001",
        "trainer.max_steps=1600",
    ]
    assert sorted(notes) == [
        "apply_t5_attn_mask: not available",
        "backbone.tokenizer_3: set a folder or hub id with T5's vocabulary; kohya has google/t5-v1_1-xxl",
        "backbone=sd35_medium: sd3_medium, sd35_medium or sd35_large, the model of the file",
        "blocks_to_swap: not available; backbone.quantize=fp8 hardware.offload=true saves memory too",
        "clip_skip: it has no effect on SD 3 in kohya's scripts",
        "disable_mmap_load_safetensors: it is not needed: it only changes how files are read",
        "kohya's default of network_alpha is 1",
        "method.targets: kohya also trains the modulation layers (adaLN) of the blocks",
        "min_snr_gamma: it has no effect on SD 3 in kohya's scripts",
        "objective: kohya multiplies the squared error of the velocity by sigma^2; sdtune does not",
        "t5_dropout_rate: not available",
    ]


SCHEMES = {
    'weighting_scheme = "none"': ("uniform", []),
    'weighting_scheme = "logit_normal"\nlogit_std = 1.0\nlogit_mean = 0.5': (
        "logit_normal",
        ["logit_mean: not available"],
    ),
    'weighting_scheme = "mode"\nlogit_mean = 0.5\nmode_scale = 1.0': (
        "uniform",
        [
            "mode_scale: not available",
            "weighting_scheme: mode is not available; use objective.timesteps.kind=uniform|logit_normal; the command"
            " has uniform",
        ],
    ),
}


@pytest.mark.parametrize("text", SCHEMES)
def test_weighting_scheme_becomes_the_kind_of_timesteps(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, notes = printed(capsys, tmp_path, f"training_shift = 3.0\n{text}\n")
    kind, expected = SCHEMES[text]
    assert f"objective.timesteps.kind={kind}" in overrides
    assert "objective.timesteps.shift=3.0" in overrides
    assert sorted(note for note in notes if note.startswith(("logit_", "mode_", "weighting_"))) == expected
    assert any(note.startswith("objective: ") for note in notes)


def test_sigma_sqrt_is_the_plain_loss_of_sdtune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kohya's loss is the error of the velocity times sigma^2, and this scheme divides by sigma^2."""
    overrides, notes = printed(capsys, tmp_path, 'training_shift = 1.0\nweighting_scheme = "sigma_sqrt"\n')
    assert "objective.timesteps.kind=uniform" in overrides
    assert not any(note.startswith(("objective", "weighting_scheme")) for note in notes)


PARTS = {
    '"context_attn_dim=0", "x_attn_dim=0", "x_mlp_dim=4"': (["feed_forward"], ["adaLN"]),
    '"context_mlp_dim=0", "x_mlp_dim=0", "context_mod_dim=0", "x_mod_dim=0"': (
        ["joint_attention", "self_attention"],
        [],
    ),
    '"x_attn_dim=8", "train_block_indices=0-11", "verbose=True", "split_qkv=True"': (
        ["joint_attention", "self_attention", "feed_forward"],
        ["adaLN", "x_attn_dim=8, train_block_indices=0-11: not translated"],
    ),
    '"train_t5xxl=True", "conv_dim=8", "train_block_indices=all"': (
        ["joint_attention", "self_attention", "feed_forward"],
        ["train_t5xxl=True: LoRA pairs of T5 are not available", "adaLN"],
    ),
    '"context_attn_dim=0", "x_attn_dim=0", "context_mlp_dim=0", "x_mlp_dim=0"': (
        ["joint_attention", "self_attention", "feed_forward"],
        ["adaLN", "context_attn_dim=0, x_attn_dim=0, context_mlp_dim=0, x_mlp_dim=0: not translated"],
    ),
}


@pytest.mark.parametrize("arguments", PARTS)
def test_network_args_of_sd3_choose_the_layers(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'network_module = "networks.lora_sd3"\nnetwork_train_unet_only = true\nnetwork_dim = 4\n'
    overrides, notes = printed(capsys, tmp_path, f"{text}network_args = [{arguments}]\n")
    layers, expected = PARTS[arguments]
    assert f"method.targets=[{','.join(layers)}]" in overrides
    of_layers = [note for note in notes if note.startswith(("network_args", "method.targets"))]
    assert len(of_layers) == len(expected)
    assert all(text in note for text, note in zip(expected, of_layers, strict=True))


def test_feed_forward_layers_of_text_encoders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'network_module = "networks.lora_sd3"\nnetwork_args = ["context_mlp_dim=0", "x_mlp_dim=0"]\n'
    overrides, notes = printed(capsys, tmp_path, text)
    assert "method.targets=[joint_attention,self_attention,text_encoder]" in overrides
    assert "method.targets: kohya also trains the feed-forward layers of the text encoders" in notes


def test_text_encoders_with_different_rates_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'network_module = "networks.lora_sd3"\ntext_encoder_lr = [1e-5, 2e-5, 0.0]\n'
    _, notes = printed(capsys, tmp_path, text)
    assert "text_encoder_lr: one learning rate is used for all text encoders: method.text_encoder_lr" in notes
    overrides, _ = printed(capsys, tmp_path, text.replace("[1e-5, 2e-5, 0.0]", "[0, 0, 1e-5]"))
    assert "method.targets=[joint_attention,self_attention,feed_forward]" in overrides


def test_full_fine_tuning_of_sd3_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "train_t5xxl = true\nlearning_rate_te1 = 1e-6\nnum_last_block_to_freeze = 4\nfused_backward_pass = true\n"
    overrides, notes = printed(capsys, tmp_path, text)
    assert {"method=full", "backbone=sd35_medium"} <= set(overrides)
    assert {
        "train_t5xxl: T5 cannot be trained",
        "learning_rate_te1: set method.text_encoder_lr, one rate for all text encoders",
        "num_last_block_to_freeze: not available",
        "fused_backward_pass: not available",
    } <= set(notes)


def test_options_of_flux_are_not_taken_for_those_of_sd3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'network_module = "networks.lora_flux"\nclip_l = "a"\nt5xxl = "b"\nae = "c"\ntimestep_sampling = "sigma"\n'
    overrides, _ = printed(capsys, tmp_path, text)
    assert "backbone=sd15" in overrides


def test_typed_options_of_sd3_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--clip_g=/g.safetensors", "--text_encoder_lr=1e-5", "--weighting_scheme=cosmap", "--clip_skip=2")
    assert sdtune("train", *options, "--network_args=train_t5xxl=True") == 2
    message = capsys.readouterr().err
    assert "backbone.text_encoder_2=/g.safetensors" in message
    assert "'method.targets=[joint_attention,self_attention,text_encoder]'" in message
    assert "--weighting_scheme: cosmap is not available; use objective.timesteps.kind=uniform|logit_normal" in message
    assert "--clip_skip: it has no effect on SD 3 in kohya's scripts" in message
    assert "backbone=sd3_medium|sd35_medium|sd35_large" in message
    assert "convolutions" not in message


def test_number_of_files_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtune("import-kohya") == 2
    assert "import-kohya: expected one or two files, got nothing" in capsys.readouterr().err
    assert sdtune("import-kohya", "--help") == 0
    assert "usage: sdtune import-kohya CONFIG.toml" in capsys.readouterr().out


def test_lycoris_and_a_missing_network_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('network_module = "lycoris.kohya"\nnetwork_dim = 8\n', encoding="utf-8")
    main([str(file)])
    assert "# network_module: LyCORIS networks are not available" in capsys.readouterr().out
    file.write_text("learning_rate = 1e-5\n", encoding="utf-8")
    main([str(file)])
    assert "# method=full: there is no option of a network" in capsys.readouterr().out


def test_share_of_warm_up_becomes_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    text = "network_dim = 8\nlr_warmup_steps = 0.05\nmax_train_steps = 2000\nnetwork_train_unet_only = true\n"
    file.write_text(text, encoding="utf-8")
    main([str(file)])
    out = capsys.readouterr().out
    assert "lr_schedule.warmup_steps=100" in out
    assert "text encoder" not in out


def test_notes_name_the_default_that_replaces_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('lr_scheduler = "cosine_with_restarts"\noptimizer_type = "Lion"\n', encoding="utf-8")
    main([str(file)])
    out = capsys.readouterr().out
    assert "polynomial; the command has the default, constant" in out
    assert "; the command has the default, adamw" in out
