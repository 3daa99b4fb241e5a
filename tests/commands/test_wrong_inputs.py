"""Invalid input on the command line: one clear line, before weights are loaded, and no folder remains."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lora_files import write_kohya
from sdtune.backbone import Pretrained
from sdtune.backbone.families import SD1
from sdtune.cli.exit_codes import EXIT_INVALID_INPUT
from sdtune.cli.main import main
from sdtune.config.compose import compose, search_path
from sdtune.formats import LoRAWeights, ModelSpec

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Restore the root logger, which Hydra configures for each run that creates its folder."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, root.level = handlers, level


@dataclass
class CommandLine:
    """Runs ``sdtune`` in this process."""

    folder: Path
    tiny: Path
    capfd: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def __call__(self, *arguments: str) -> tuple[int, list[str]]:
        """Run the command; return the exit code and the lines on stderr."""
        self.capfd.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["sdtune", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = self.capfd.readouterr()
        assert "Traceback" not in out + err
        return code, err.splitlines()

    def refuses(self, *arguments: str, words: tuple[str, ...], code: int = EXIT_INVALID_INPUT) -> None:
        """Assert that the command prints one line with ``words`` in this order, and changes no file."""
        files_before = self._files()
        exit_code, lines = self(*arguments)
        assert len(lines) == 1, "\n".join(lines)
        line = lines[0]
        assert exit_code == code, line
        assert line.startswith("sdtune: ")
        assert len(line) < 500
        start = 0
        for word in words:
            assert word in line[start:], f"{word!r} is not in {line!r}"
            start = line.index(word, start) + len(word)
        assert self._files() == files_before

    def _files(self) -> dict[str, bytes | None]:
        """Relative path -> content of each file, None for a folder."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }

    def train(self, images: Path, *overrides: str, words: tuple[str, ...]) -> None:
        self.refuses(*self.training(images), *overrides, words=words)

    def training(self, images: Path) -> list[str]:
        return [
            "train",
            "backbone=sd15",
            f"backbone.path={self.tiny}",
            "data=folder",
            f"data.path={images}",
            "evaluation=none",
            "hardware=cpu",
            "trainer.max_steps=2",
            f"hydra.run.dir={self.run}",
        ]

    def sampling(self) -> list[str]:
        return ["sample", "backbone=sd15", f"backbone.path={self.tiny}", "hardware=cpu", f"hydra.run.dir={self.run}"]


@pytest.fixture
def line(tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "LOCAL_RANK", "SDTUNE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return CommandLine(tmp_path, tiny, capfd, monkeypatch)


# --- settings

SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "misspelt key": (["method.rnak=4"], ("method.rnak", "did you mean method.rank?")),
    "unquoted text": (["data.prompt=a", "photo"], ("data.prompt", "split the text at its spaces", "a photo")),
    "option of kohya": (["--network_dim", "8"], ("--network_dim: ", "use method.rank=8 ")),
    "option of kohya at the end": (["--network_dim"], ("--network_dim: ", "use method.rank=VALUE")),
    "options of kohya": (
        ["--network_dim", "--learning_rate=1e-4", "--shuffle_caption", "network_alpha=4", "--other"],
        (
            "--network_dim, --learning_rate, --shuffle_caption, network_alpha, --other: unknown options; ",
            "use method.rank=VALUE optimizer.lr=1e-4 data.captions.kind=tags data.captions.shuffle=true"
            " method.alpha_policy=constant method.alpha=4 ",
            "; remove --other, which is unknown; ",
            "; see docs/from-kohya.md",
        ),
    ),
    "unquoted folder of kohya": (
        ["--train_data_dir", "/x/10_sks", "hedgehog", "--network_dim", "8"],
        ("use data=folder 'data.path=\"/x/10_sks hedgehog\"' method.rank=8 ",),
    ),
    "sweep over an option of kohya": (["-m", "--network_dim", "4,8"], ("use method.rank=4,8 ",)),
    "schedule that is not available": (
        ["--lr_scheduler", "cosine_with_restarts"],
        ("cosine_with_restarts is not available; use lr_schedule=constant|cosine|linear|polynomial;",),
    ),
    "option that is not available": (
        ["--scale_weight_norms=1"],
        ("--scale_weight_norms: unknown option; not available",),
    ),
    "word of kohya": (
        ["--token_string=sks-hog", "--init_word", "animal", "--num_vectors_per_token=4"],
        ("use method=textual_inversion 'new_tokens=[{token: sks-hog, init: animal, vectors: 4}]' ",),
    ),
    "bracketed word of kohya": (
        ["--token_string=<hog>"],
        ("'new_tokens=[{token: \"<hog>\", init: WORD, vectors: N}]' ",),
    ),
    "convolutions of kohya": (
        ["--text_encoder_lr=1e-5", "--network_args", "conv_dim=4", "conv_alpha=1"],
        ("'method.targets=[cross_attention,self_attention,text_encoder,convolutions]' method.text_encoder_lr=1e-5 ",),
    ),
    "defaults of kohya": (
        ["--network_dim=8", "--pretrained_model_name_or_path=x.safetensors"],
        (
            "use method.rank=8 backbone.path=x.safetensors method.alpha_policy=constant method.alpha=1 ",
            "; kohya's default of network_alpha is 1; kohya also trains the text encoder: add text_encoder to ",
            "; begin with experiment=sd15_lora, or with experiment=sdxl_lora for SDXL; ",
        ),
    ),
    "maps of kohya": (["--conditioning_data_dir=maps"], ("data/control=paired data.control.path=maps ",)),
    "quantization of kohya": (["--fp8_base"], ("use backbone.quantize=fp8 ",)),
    "last parts of keys": (
        ["rank=8", "lr=1e-3"],
        ("rank, lr: unknown settings; did you mean method.rank=8 optimizer.lr=1e-3?",),
    ),
    "rate of an untrained text encoder": (
        ["method.text_encoder_lr=1e-5"],
        ("method.text_encoder_lr: got 1e-05, but the text encoder is not trained; ", "text_encoder]'"),
    ),
    "value added to a list": (
        ["method.targets+=convolutions"],
        ("method.targets: += does not add to a list; write the complete list: 'method.targets=[FIRST,convolutions]'",),
    ),
    "space after a comma": (["-m", "method.rank=4,", "8"], ("write method.rank=4,8",)),
    "value after a space": (
        ["trainer.max_steps", "5"],
        ("trainer.max_steps: the value is missing; write trainer.max_steps=5",),
    ),
    "word without quotes": (
        ["new_tokens=[{token: <dog>, init: dog}]"],
        ("write 'new_tokens=[{token: \"<dog>\", init: dog}]'",),
    ),
    "arguments of the optimizer": (
        ["--optimizer_args", "weight_decay=0.01", "betas=0.9,0.99", "decouple=True", "--network_dim", "4"],
        ("use optimizer.weight_decay=0.01 'optimizer.betas=[0.9,0.99]' optimizer.decouple=true method.rank=4 ",),
    ),
    "LyCORIS": (
        ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "conv_dim=4"],
        ("--network_module: LyCORIS networks are not available", "--network_args: set method.rank"),
    ),
    "two learning rates of kohya": (
        ["--unet_lr=1e-4", "--learning_rate=2e-4"],
        ("use optimizer.lr=1e-4 (settings have no dashes)",),
    ),
    "two rates of text encoders": (
        ["--text_encoder_lr", "1e-5", "1e-6"],
        ("one learning rate is used for all text encoders",),
    ),
    "sweep over a group": (["optimizer=adamw,adafactor"], ("optimizer: several values", "add -m for a sweep")),
    "option similar to one of Hydra": (
        ["--cfg_scale=7"],
        ("--cfg_scale: unknown option; write settings as KEY=VALUE",),
    ),
    "sweep with spaces": (["-m", "--network_dim", "4", "8"], ("use method.rank=4,8 ",)),
    "sweep split by the shell": (
        ["-m", "method.rank=4", "8"],
        ("method.rank: the shell has split", "write method.rank=4,8"),
    ),
    "keys with spaces": (
        ["method.rank", "8", "optimizer.lr", "1e-3"],
        ("method.rank: the value is missing; write method.rank=8",),
    ),
    "steps": (["steps=100", "alpha=4"], ("use trainer.max_steps=100 method.alpha_policy=constant method.alpha=4;",)),
    "share of warm-up": (["--lr_warmup_steps", "0.1"], ("a number of steps is required",)),
    "settings of kohya": (
        ["network_dim=8", "learning_rate=1e-4"],
        ("network_dim, learning_rate: options of kohya; use method.rank=8 optimizer.lr=1e-4",),
    ),
    "checkpoint folder of kohya": (["--resume=RUN"], ("--resume: ", "use resume=RUN")),
    "last part of a key": (["lr=1e-3"], ("lr: unknown setting; did you mean optimizer.lr?",)),
    "last part of two keys": (["path=X"], ("path: unknown setting; did you mean backbone.path or data.path?",)),
    "two sides": (["data.resolution=512,512"], ("data.resolution: several values (512,512); add -m for a sweep",)),
    "list without brackets": (
        ["method.targets=cross_attention,self_attention"],
        ("method.targets: several values", "add -m for a sweep or write a list: [cross_attention,self_attention]"),
    ),
    "choice in capitals": (["optimizer=ADAMW8BIT"], ("optimizer=ADAMW8BIT", "did you mean adamw8bit?")),
    "choice with an ending": (["lr_schedule=constant_with_warmup"], ("lr_schedule=", "did you mean constant?")),
    "option of kohya with hyphens": (["--learning-rate=1e-4"], ("--learning-rate: ", "use optimizer.lr=1e-4 ")),
    "resolution of kohya": (["--resolution=512,512"], ("--resolution: ", "use data.resolution=512 ")),
    "two sides of kohya": (["--resolution", "512,768"], ("--resolution: ", "one number sets the area of the buckets")),
    "option of kohya with a space": (["--output_name=my lora"], ("--output_name: ", "use 'name=\"my lora\"'")),
    "option of kohya with one dash": (["-clip_skip=2"], ("-clip_skip: ", "use backbone.clip_skip=1")),
    "option of kohya with more settings": (
        ["--min-snr-gamma", "5"],
        ("use objective=min_snr objective.weighting.gamma",),
    ),
    "option of kohya without a value": (["--v_parameterization"], ("use backbone.prediction_type=v_prediction",)),
    "option of kohya in a resumed run": (["resume=nowhere", "--network_dim", "8"], ("--network_dim: ",)),
    "two options that are similar to short ones": (
        ["-rank=8", "--lr=1e-4"],
        ("-rank: unknown option; write settings",),
    ),
    "a dash in a text": (["data.prompt=a", "cat", "-", "oil"], ("data.prompt: the shell has split", "a cat - oil")),
    "index of a list": (
        ["optimizer.betas.foo=1"],
        ("optimizer.betas.foo=1", "cannot be composed", "check these overrides"),
    ),
    "group of a value": (
        ["method.rank.foo=1"],
        ("method.rank.foo: unknown setting; method.rank contains no other settings",),
    ),
    "hydra.output_subdir": (["hydra.output_subdir=null"], ("hydra.output_subdir: ", "hydra.run.dir")),
    "hydra.job": (["hydra.job.chdir=true"], ("hydra.job.chdir: ",)),
    "hydra.job.name": (["hydra.job.name=x"], ("hydra.job.name: ",)),
    "hydra.mode": (["hydra.mode=MULTIRUN"], ("hydra.mode: ",)),
    "hydra.sweep.subdir": (["hydra.sweep.subdir=x"], ("hydra.sweep.subdir: ",)),
    "hydra/job_logging": (["hydra/job_logging=disabled"], ("hydra/job_logging: ",)),
    "hydra.callbacks": (["+hydra.callbacks.x._target_=os.system"], ("hydra.callbacks.x._target_: ",)),
    "misspelt option": (["--multrun"], ("--multrun: ", "did you mean --multirun?")),
    "two dashes": (["--", "method.rank=4"], ("--: ", "without dashes")),
    "value of an option": (
        ["--cfg", "all_of_it"],
        ("--cfg", "invalid choice", "job", "sdtune train --help lists the options"),
    ),
    "unquoted text after an option": (
        ["-cd", ".", "data.prompt=a", "cat"],
        ("data.prompt: the shell has split", "a cat"),
    ),
    "setting of kohya": (["learning_rate=1e-4"], ("learning_rate", "use optimizer.lr=1e-4")),
    "value of kohya": (["mixed_precision=bf16"], ("mixed_precision", "use hardware.precision=bf16-mixed")),
    "clip skip of kohya": (["clip_skip=2"], ("clip_skip", "use backbone.clip_skip=1")),
    "option of kohya without a setting": (
        ["keep_tokens=1"],
        ("keep_tokens", "use data.captions.kind=tags data.captions.keep_tokens=1"),
    ),
    "epochs": (["trainer.max_epochs=3"], ("trainer.max_epochs", "set trainer.epochs or trainer.max_steps")),
    "list that Hydra cannot parse": (
        ["data.templates=[a (b)]"],
        ("data.templates", "cannot parse", "write 'data.templates=[\"a (b)\"]'"),
    ),
    "option of kohya with dashes": (
        ["--mixed_precision=fp16"],
        ("--mixed_precision", "use hardware.precision=16-mixed"),
    ),
    "folder of kohya": (["train_data_dir=my images"], ("train_data_dir", "data=folder 'data.path=")),
    "list split by the shell": (["data.templates=[a"], ("data.templates", "single quotes")),
    "misspelt top key": (["sede=4"], ("sede", "did you mean seed?")),
    "misspelt group": (["metod=lora"], ("metod",)),
    "misspelt choice": (["method=lroa"], ("method=lroa", "did you mean lora?")),
    "misspelt experiment": (
        ["experiment=lora_subjet", "data.path=./nowhere"],
        ("experiment=lora_subjet", "did you mean lora_subject?"),
    ),
    "key added": (["+method.extra=1"], ("method.extra", "not a setting of LoRA")),
    "no equals sign": (["method.rank"], ("method.rank",)),
    "wrong type": (["method.rank=many"], ('method.rank: got "many"; expected int >= 1',)),
    "wrong type in a list": (["method.targets=[cross_attention,heads]"], ("method.targets", "cross_attention")),
    "fraction of a step": (["trainer.max_steps=2.5"], ("trainer.max_steps", "2.5")),
    "rank 0": (["method.rank=0"], ("method.rank: got 0; expected int >= 1",)),
    "dropout 1": (["method.dropout=1"], ("method.dropout: got 1; expected float >= 0, < 1",)),
    "no targets": (["method.targets=[]"], ("method.targets",)),
    "lr -1": (["optimizer.lr=-1"], ("optimizer.lr: got -1; expected float > 0",)),
    "lr 0": (["optimizer.lr=0"], ("optimizer.lr: got 0; expected float > 0",)),
    "lr not a number": (["optimizer.lr=high"], ('optimizer.lr: got "high"; expected a number',)),
    "betas": (["optimizer.betas=[0.9,1.5]"], ("optimizer", "1.5")),
    "no lr": (["optimizer.lr=null"], ("optimizer.lr: got null; expected a number",)),
    "relative step of Adafactor": (
        ["optimizer=adafactor", "optimizer.relative_step=true"],
        ("optimizer: ", "relative_step", "correct the settings"),
    ),
    "no lr of Prodigy": (["optimizer=prodigy", "optimizer.lr=null"], ("optimizer.lr: got null; expected float > 0",)),
    "one beta": (["optimizer=prodigy", "optimizer.betas=0.9"], ("optimizer: ", "betas=0.9")),
    "weight decay as a text": (["optimizer=prodigy", "optimizer.weight_decay=abc"], ("optimizer", "abc")),
    "no eps": (["optimizer=adamw8bit", "optimizer.eps=null"], ("optimizer", "eps=None")),
    "max_steps 0": (["trainer.max_steps=0"], ("trainer.max_steps: got 0; expected int >= 1",)),
    "max_steps -1": (["trainer.max_steps=-1"], ("trainer.max_steps: got -1; expected int >= 1",)),
    "list for a group": (["data=[[]]"], ("data=[[]]", "cannot be composed", "check these overrides")),
    "no option of a group": (["objective=[]"], ("objective: no option is chosen; set objective=OPTION",)),
    "number for a callback": (
        ["callbacks.samples=8"],
        ("callbacks.samples: got 8 without _target_; set it to null, or set its",),
    ),
    "text for an object": (["callbacks.samples.sampling=x"], ("callbacks.samples.sampling: got",)),
    "number for a group": (["+hardware=1"], ("hardware",)),
    "trust as a number": (["trust=1"], ("trust: got 1; expected list of text",)),
    "object for a text": (
        ["data.templates={_target_: sdtune.methods.LoRA}"],
        ("data.templates: got a node with _target_; expected object or style or list of text or null",),
    ),
    "mapping for an optimizer": (
        ["optimizer=prodigy", "optimizer.d_coef={}"],
        ("optimizer.d_coef: got {}; expected a number, text or a list",),
    ),
    "rank as a float": (["method.rank=8.0"], ("method.rank: got 8.0; expected int >= 1 or null",)),
    "no accumulation": (["trainer.accumulate_grad_batches=0"], ("trainer.accumulate_grad_batches", "0")),
    "negative clip": (
        ["trainer.gradient_clip_val=-1"],
        ("trainer.gradient_clip_val: got -1; expected float > 0 or null",),
    ),
    "argument set by sdtune": (["+trainer.max_epochs=3"], ("trainer.max_epochs", "remove this override")),
    "no devices": (["hardware.devices=0"], ("hardware.devices", "0", "at least 1")),
    "name outside of the folder": (["name=../x"], ("name", "../x")),
    "seed -1": (["seed=-1"], ("seed", "-1")),
    "save_every 0": (["save_every=0"], ("save_every", "0")),
    "checkpoint 0": (["checkpoint.every_steps=0"], ("checkpoint.every_steps", "0")),
    "gamma 0": (["objective=min_snr", "objective.weighting.gamma=0"], ("objective.weighting.gamma", "0")),
    "precision": (["hardware.precision=fp8"], ("hardware.precision", "fp8", "32-true")),
    "batch that does not divide": (
        ["data.batch_size=3", "trainer.accumulate_grad_batches=2"],
        ("data.batch_size", "3", "multiple of 2"),
    ),
    "batch of 0": (["data.batch_size=0"], ("data.batch_size", "0")),
    "caption dropout 2": (["data.caption_dropout=2"], ("data.caption_dropout", "2")),
    "resolution not a multiple": (["data.resolution=34"], ("data.resolution", "34", "multiple of 4")),
    "random crop of a cached latent": (["data.random_crop=true"], ("data.random_crop", "data.cache_latents=false")),
    "more held-out images than images": (["data.hold_out=10"], ("data.hold_out", "5 images")),
    "target of another package": (["method._target_=os.system"], ("method._target_", "os.system", "not allowed")),
    "target through an import": (
        ["method._target_=pytorch_lightning.trainer.trainer.os.system"],
        ("method._target_", "os.system"),
    ),
    "missing target": (["method._target_=sdtune.methods.Lora"], ("method._target_", "sdtune.methods.Lora")),
    "secret of W&B": (["logger=wandb", "logger.wandb.api_key=abc"], ("logger.wandb.api_key", "environment")),
    "secret added": (["+wandb.token=abc"], ("wandb.token", "environment")),
    "secret forced": (["++backbone.hf_token=abc"], ("backbone.hf_token", "environment")),
    "W&B without an API key": (["logger=wandb"], ("logger.wandb", "WANDB_API_KEY", "offline=true")),
    "missing backbone": (["backbone.path=./nowhere"], ("backbone.path", "./nowhere", "does not exist")),
    "missing value": (["data.path=???"], ("data.path: missing value", "data.path=")),
    "missing folder": (["data.path=./nowhere"], ("data.path", "nowhere", "does not exist")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_invalid_setting_is_refused(line: CommandLine, images: Path, case: str) -> None:
    overrides, words = SETTINGS[case]
    line.train(images, *overrides, words=words)


SAMPLE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "last part of a key": (["prompt=x", "precision=32"], ("precision: unknown", "did you mean hardware.precision?")),
    "option of kohya without dashes": (["prompt=x", "scale=7"], ("scale: option of kohya; use sampling.guidance=7",)),
    "range of seeds that is empty": (["prompt=x", "seeds=3-0"], ("seeds: 3-0 is empty; write seeds=0-3",)),
    "no seed": (["prompt=x", "seeds=[]"], ("seeds: no seed; set one seed for each image of a prompt",)),
    "text that may be a sweep": (["-m", "prompt=a, b"], ("prompt: with -m, a comma separates",)),
    "options of kohya": (
        [
            "--prompt",
            "a cat",
            "--seed=3",
            "--textual_inversion_embeddings",
            "a b.safetensors",
            "--W",
            "64",
            "--n_iter=2",
        ],
        (
            "--prompt, --seed, --textual_inversion_embeddings, --W, --n_iter: unknown options; ",
            "use 'prompt=\"a cat\"' seeds=[3,4] 'adapters=[{path: \"a b.safetensors\"}]' sampling.width=64 ",
        ),
    ),
    "adapter without quotes": (
        ["sks", "hedgehog,", "green", "adapters=[{path:", "x.safetensors}]"],
        ("sdtune sample 'sks hedgehog, green' ", " 'adapters=[{path: x.safetensors}]'"),
    ),
    "ControlNet of kohya": (
        ["--control_net_models=NET", "--guide_image_path", "a", "map.png", "--control_net_multipliers=0.8"],
        ("use 'control=[{path: NET, image: ", "strength: 0.8}]' "),
    ),
    "strengths of kohya": (
        ["--network_weights", "a.safetensors", "b.safetensors", "--network_mul", "0.8", "0.4"],
        ("use 'adapters=[{path: a.safetensors, strength: 0.8}, {path: b.safetensors, strength: 0.4}]' ",),
    ),
    "text without quotes": (
        ["a", "cat", "on", "grass"],
        ("sdtune sample: 4 words without a key (a cat on grass); ", "sdtune sample 'a cat on grass' backbone=sd15"),
    ),
}


@pytest.mark.parametrize("case", SAMPLE)
def test_invalid_argument_of_sample_is_refused(line: CommandLine, case: str) -> None:
    arguments, words = SAMPLE[case]
    line.refuses(*line.sampling(), *arguments, words=words)


def test_file_without_a_key_is_proposed_as_an_adapter(line: CommandLine) -> None:
    (line.folder / "my lora.safetensors").touch()
    adapters = "sdtune sample 'a cat, red' 'adapters=[{path: \"my lora.safetensors\"}]' backbone="
    line.refuses(*line.sampling(), "a cat, red", "my lora.safetensors", words=("2 words without a key", adapters))
    words = ("2 words without a key", "use one run, file or folder per command: sdtune export 'my lora.safetensors'")
    line.refuses("export", "my lora.safetensors", "other", words=words)


def test_several_prompts_without_a_key_are_proposed_as_a_list(line: CommandLine) -> None:
    proposed = 'write a list: sdtune sample \'prompt=["a cat, red","a green cat"]\' backbone='
    line.refuses(*line.sampling(), "a cat, red", "a green cat", words=("2 words without a key", proposed))


EXPORTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "option of kohya": (["run=x", "--save_precision", "float"], ("--save_precision: ", "use dtype=fp32")),
    "options of kohya": (
        ["--model=x.safetensors", "--new_rank", "4", "--save_to=out", "--dynamic_method=sv_fro"],
        ("use artifact=x.safetensors format=kohya rank=4 hydra.run.dir=out ", "dynamic_param is that of sv_fro"),
    ),
    "energy of kohya": (
        ["--dynamic_method", "sv_fro", "--dynamic_param", "0.9"],
        ("use format=kohya energy=0.81 ",),
    ),
    "merge of several LoRAs": (
        ["--sd_model=M", "--models", "a.safetensors", "b.safetensors", "--ratios", "0.8", "0.4"],
        (
            "use format=single_file backbone.path=M ",
            "--models: one LoRA is merged into a model per command: artifact=a.safetensors, then b.safetensors into",
        ),
    ),
    "folder without a key": (["nowhere", "format=kohya"], ("run: ", "nowhere")),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_invalid_argument_of_export_is_refused(line: CommandLine, case: str) -> None:
    arguments, words = EXPORTS[case]
    line.refuses("export", *arguments, words=words)


def test_missing_config_folder_is_refused(line: CommandLine, images: Path) -> None:
    line.train(images, "-cd", "nowhere", words=("--config-dir", "nowhere", "not a folder"))


# --- images


def add_truncated_jpeg(folder: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "5.jpg")
    data = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(data[: len(data) // 2])


def add_one_pixel_image(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "5.png")


IMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], ("data.path", "images", "it is empty")),
    "file instead of a folder": (
        lambda f: (shutil.rmtree(f), f.write_text("", encoding="utf-8")),
        ("data.path", "it is a file"),
    ),
    "no images": (lambda f: [p.unlink() for p in f.glob("*.png")], ("data.path", "5 .txt")),
    "truncated JPEG": (add_truncated_jpeg, ("data.path", "5.jpg", "truncated")),
    "1-pixel image": (add_one_pixel_image, ("data.path", "5.png", "1x1")),
    "text named .png": (
        lambda f: (f / "5.png").write_text("hello", encoding="utf-8"),
        ("data.path", "5.png", "not a readable image"),
    ),
    "empty .png": (lambda f: (f / "5.png").write_bytes(b""), ("data.path", "5.png", "the file is empty")),
    "no captions": (
        lambda f: [p.unlink() for p in f.glob("*.txt")],
        ("data.path", "5 of 5 images have no caption", 'data.prompt="a photo of ..."'),
    ),
    "caption of another encoding": (lambda f: (f / "0.txt").write_bytes(b"\xff\xfea"), ("data.path", "0.txt", "UTF-8")),
    "two captions": (
        lambda f: (f / "0.caption").write_text("a", encoding="utf-8"),
        ("data.path", "0.png", "two captions"),
    ),
    "metadata of a missing image": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n', encoding="utf-8"),
        ("data.path", "metadata.jsonl, line 1", "9.png"),
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_invalid_images_are_refused(line: CommandLine, images: Path, case: str) -> None:
    damage, words = IMAGES[case]
    damage(images)
    prompt = [] if case == "no captions" else ["data.prompt=a dog"]
    line.train(images, *prompt, words=words)


def test_invalid_class_images_are_reported_by_their_key(line: CommandLine, images: Path) -> None:
    shutil.copytree(images, line.folder / "class")
    for caption in (line.folder / "class").glob("*.txt"):
        caption.unlink()
    overrides = ["method=dreambooth", f"data.class_path={line.folder}/class"]
    line.train(images, *overrides, words=("data.class_path: 5 of 5 images have no caption", "data.class_prompt="))
    overrides = ["method=dreambooth", f"data.class_path={line.folder}/nowhere"]
    line.train(images, *overrides, words=("data.class_path: no images found in", "nowhere"))


def test_class_prompt_that_is_also_a_caption_is_refused(line: CommandLine, images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.write_text("a photo of a dog", encoding="utf-8")
    overrides = ["method=dreambooth", 'data.class_prompt="a photo of a dog"']
    line.train(images, *overrides, words=("data.class_prompt: 'a photo of a dog' is also a caption of the subject",))


def test_templates_require_a_prompt_with_only_the_token(line: CommandLine, images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.unlink()
    overrides = ["method=textual_inversion", "data.templates=object", 'new_tokens=[{token: "<cat>", init: cat}]']
    line.train(images, *overrides, words=("data.path", 'data.prompt="<my_cat>"'))


def test_cache_that_cannot_be_written_is_refused(
    line: CommandLine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    line.train(images, words=("the cache folder /proc/nowhere/sdtune cannot be used", "SDTUNE_CACHE"))


# --- folders of runs


def test_run_folder_that_cannot_be_created_is_refused(line: CommandLine, images: Path) -> None:
    (line.folder / "file").write_text("", encoding="utf-8")
    run = line.folder / "file" / "run"
    line.train(images, f"hydra.run.dir={run}", words=("hydra.run.dir", str(run), "is not a writable folder"))


def test_folder_that_contains_a_run_is_refused(line: CommandLine, images: Path) -> None:
    line.run.mkdir()
    (line.run / "metrics.csv").write_text("step\n1\n", encoding="utf-8")
    line.train(images, words=("hydra.run.dir", str(line.run), "already contains a run", "resume="))
    (line.run / "checkpoints").mkdir()
    (line.run / "checkpoints" / "step00000001.ckpt").touch()
    line.train(images, words=("hydra.run.dir", str(line.run), "already contains a run", "resume="))


def test_existing_empty_folder_is_not_removed(line: CommandLine, images: Path) -> None:
    line.run.mkdir()
    line.train(images, "method.rank=0", words=("method.rank",))
    assert line.run.is_dir()


def write_run_config(line: CommandLine, images: Path) -> None:
    (line.run / ".hydra").mkdir(parents=True)
    overrides = "".join(f"- {override}\n" for override in line.training(images)[1:-1])
    (line.run / ".hydra" / "overrides.yaml").write_text(overrides, encoding="utf-8")
    (line.run / ".hydra" / "hydra.yaml").write_text("hydra:\n  runtime:\n    config_sources: []\n", encoding="utf-8")


def test_resuming_a_folder_without_a_run_is_refused(line: CommandLine) -> None:
    line.refuses("train", f"resume={line.folder}", words=("resume", str(line.folder), "not a run folder"))
    line.refuses("train", "resume=./nowhere", words=("resume", "nowhere does not exist"))
    (line.folder / "run" / ".hydra").mkdir(parents=True)
    (line.folder / "run" / "checkpoints").mkdir()
    (line.folder / "run" / ".hydra" / "overrides.yaml").write_text("[]")
    line.refuses("train", f"resume={line.folder}/run/checkpoints", words=("not a run", f"use resume={line.folder}/run"))


@pytest.mark.parametrize(
    "override", ["method.rank=4", "seed=1", "+method.alpha=3", "data=pocket_subject", "~callbacks", "~data"]
)
def test_resuming_with_other_settings_is_refused(line: CommandLine, images: Path, override: str) -> None:
    write_run_config(line, images)
    line.refuses("train", f"resume={line.run}", override, words=("resume", override, "resumed run"))


def test_resuming_a_run_with_a_removed_setting_is_refused(line: CommandLine, images: Path) -> None:
    """The overrides or the saved config of the run contain a setting that no longer exists."""
    remedy = ("use the version of sdtune and the recipe that started it",)
    write_run_config(line, images)
    overrides = line.run / ".hydra" / "overrides.yaml"
    current_overrides = overrides.read_text(encoding="utf-8")
    overrides.write_text(current_overrides + "- data.class_pictures=4\n", encoding="utf-8")
    words = ("data.class_pictures", "mean data.class_images?", "resume=", *remedy)
    line.refuses("train", f"resume={line.run}", words=words)

    overrides.write_text(current_overrides, encoding="utf-8")
    (line.run / "checkpoints").mkdir()
    (line.run / "checkpoints" / "step2.ckpt").touch()
    config = compose("train", search_path(None), line.training(images)[1:-1])
    OmegaConf.update(config, "data.class_pictures", 200, force_add=True)
    (line.run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    line.refuses("train", f"resume={line.run}", words=("resume", str(line.run), "data.class_pictures", *remedy))


def test_evaluating_a_folder_without_a_run_is_refused(line: CommandLine) -> None:
    line.refuses("evaluate", f"run={line.folder}", words=("run", str(line.folder), "not a run folder"))
    line.refuses("evaluate", words=("run: missing value",))


# --- sampling


def adapter(path: Path, backbone_hash: str, module: str = "unet.down_blocks.0.attentions.0.proj_in") -> Path:
    pair = (torch.zeros(2, 16, 1, 1), torch.zeros(16, 2, 1, 1))
    spec = ModelSpec("x", resolution=32, prediction_type="epsilon", steps=1, seed=0, model=SD1.lora_names("epsilon"))
    weights = LoRAWeights({module: pair}, {module: 2.0})
    write_kohya(path, weights, spec, {"sdtune_backbone_hash": backbone_hash})
    return path


def test_adapter_for_other_layers_is_refused(line: CommandLine) -> None:
    backbone_hash = Pretrained(str(line.tiny)).hash()
    file = adapter(line.folder / "other.safetensors", backbone_hash, "unet.down_blocks.7.attentions.0.proj_in")
    line.refuses(
        *line.sampling(), "prompt=a dog", f"adapters=[{{path: {file}}}]", words=("other.safetensors", "unknown target")
    )


def test_adapter_that_is_not_a_safetensors_file_is_refused(line: CommandLine) -> None:
    (line.folder / "bad.safetensors").write_text("hello", encoding="utf-8")
    line.refuses(
        *line.sampling(),
        "prompt=a dog",
        "adapters=[{path: bad.safetensors}]",
        words=("bad.safetensors", "not a readable"),
    )


SAMPLING: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no prompt": ([], ("prompt: missing value", "prompt=")),
    "missing adapter": (
        ["prompt=x", "adapters=[{path: nowhere.safetensors}]"],
        ("nowhere.safetensors", "does not exist"),
    ),
    "adapters as a file": (
        ["prompt=x", "adapters=a.safetensors"],
        ("adapters: expected a list, got a.safetensors", "[{path: a.safetensors"),
    ),
    "adapter as a file": (
        ["prompt=x", "adapters=[a.safetensors]"],
        ("adapters[0]: expected a mapping, got a.safetensors", "{path:"),
    ),
    "adapter without a path": (["prompt=x", "adapters=[{strength: 1}]"], ("adapters[0]", "path is missing")),
    "misspelt strength": (["prompt=x", "adapters=[{path: a, strenght: 1}]"], ("adapters[0]", "strenght")),
    "strength not a number": (
        ["prompt=x", "adapters=[{path: prompts.txt, strength: much}]"],
        ("adapters[0].strength", 'got "much"'),
    ),
    "missing prompts_file": (["prompts_file=nowhere.txt"], ("prompts_file", "nowhere.txt")),
    "unknown option in prompts_file": (["prompts_file=prompts.txt"], ("prompts.txt", "line 2", "--q", "--n")),
    "width not a multiple": (["prompt=x", "sampling.width=33"], ("sampling.width", "33", "multiple of 4")),
    "steps 0": (["prompt=x", "sampling.steps=0"], ("sampling.steps", "0")),
    "unknown sampler": (["prompt=x", "sampling.sampler=dimm"], ("sampling.sampler", 'got "dimm"', "ddim")),
    "seeds not numbers": (["prompt=x", "seeds=[one]"], ("seeds", 'got "one"')),
    "strengths not numbers": (["prompt=x", "strengths=[strong]"], ("strengths", 'got "strong"')),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_invalid_sampling_setting_is_refused(line: CommandLine, case: str) -> None:
    (line.folder / "prompts.txt").write_text("a dog --s 2\na cat --q 3\n", encoding="utf-8")
    overrides, words = SAMPLING[case]
    line.refuses(*line.sampling(), *overrides, words=words)


def test_unknown_command_is_refused(line: CommandLine) -> None:
    line.refuses("trian", words=("trian", "unknown command", "train"))


def test_group_of_another_command_is_refused(line: CommandLine) -> None:
    words = ("evaluation: sdtune evaluate has no such config group; see sdtune evaluate --help",)
    line.refuses("evaluate", "run=x", "evaluation=clip", words=words)


def test_script_of_kohya_is_answered_by_the_command_and_its_overrides(line: CommandLine) -> None:
    line.refuses("merge_lora.py", "--save_to", "x.safetensors", words=("use sdtune export; ", "hydra.run.dir=x"))
    line.refuses("sdxl_train_network.py", words=("use sdtune train",))


# --- valid input


def test_valid_command_line_trains(line: CommandLine, images: Path) -> None:
    """The command line of the tests above is valid, so only their changes to it cause the errors."""
    code, lines = line(*line.training(images), "debug=smoke", "callbacks.samples=null", "method.rank=2")
    assert code == 0, "\n".join(lines)
    assert (line.run / "metrics.json").is_file()
    assert (line.run / "artifact" / "images.safetensors").is_file()


# --- backbones that cannot be loaded


def damaged_copy(tiny: Path, folder: Path, damage: Damage) -> Path:
    copy = Path(shutil.copytree(tiny, folder / "backbone"))
    damage(copy)
    return copy


BACKBONES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "only pickled weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
        ("backbone.path", "unet", "diffusion_pytorch_model.safetensors"),
    ),
    "truncated weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"abc"),
        ("vae", "truncated"),
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ("tokenizer",)),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_backbone_that_cannot_be_loaded_is_refused(line: CommandLine, images: Path, case: str) -> None:
    damage, words = BACKBONES[case]
    folder = damaged_copy(line.tiny, line.folder, damage)
    line.train(images, f"backbone.path={folder}", words=words)


def test_another_primary_config_is_refused(line: CommandLine, images: Path) -> None:
    line.refuses("train", "-cn", "mine", *line.training(images)[1:], words=("-cn", "experiment=mine"))


def test_resuming_in_another_folder_is_refused(
    line: CommandLine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    write_run_config(line, images)
    line.refuses("train", f"resume={line.run}", "hydra.run.dir=x", words=("resume", "hydra.run.dir=x", "resumed run"))


def test_override_that_hydra_cannot_parse_is_shown_quoted(line: CommandLine, images: Path) -> None:
    line.train(images, "name=my <disc>", words=("name", "quote it", """'name="my <disc>"'"""))


def test_folder_settings_without_data_folder_are_refused(line: CommandLine) -> None:
    line.refuses("train", "data.prompt=a dog", "method=lora", words=("data.prompt", "set data=folder"))
