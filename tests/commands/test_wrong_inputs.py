"""Wrong inputs, through the real command line: one clear line each, before any weights, and no folder left."""

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

from sdtune.backbone import Pretrained
from sdtune.cli.exit_codes import EXIT_INVALID_INPUT
from sdtune.cli.main import main
from sdtune.config.compose import compose, search_path
from sdtune.formats import LoRAWeights, ModelSpec, kohya_lora

Spoil = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Hydra sets up logging for a run that goes as far as its folder."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, root.level = handlers, level


@dataclass
class CommandLine:
    """``sdtune`` in this process."""

    folder: Path
    tiny: Path
    capfd: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def __call__(self, *arguments: str) -> tuple[int, list[str]]:
        """The exit code and the lines on stderr."""
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
        """One line that holds ``words`` in order, and nothing new on the disk."""
        before = self._state()
        found, lines = self(*arguments)
        assert len(lines) == 1, "\n".join(lines)
        line = lines[0]
        assert found == code, line
        assert line.startswith("sdtune: ")
        assert len(line) < 500
        place = 0
        for word in words:
            assert word in line[place:], f"{word!r} is not in {line!r}"
            place = line.index(word, place) + len(word)
        assert self._state() == before

    def _state(self) -> dict[str, bytes | None]:
        """Every file and folder, but a cache's."""
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
    "misspelt key": (["method.rnak=4"], ("method.rnak", "did you mean rank?")),
    "misspelt top key": (["sede=4"], ("sede", "did you mean seed?")),
    "misspelt group": (["metod=lora"], ("metod",)),
    "misspelt choice": (["method=lroa"], ("method=lroa", "did you mean lora?")),
    "misspelt experiment": (
        ["experiment=lora_subjet", "data.path=./nowhere"],
        ("experiment=lora_subjet", "did you mean lora_subject?"),
    ),
    "key added": (["+method.extra=1"], ("method.extra", "not a setting of LoRA")),
    "no equals sign": (["method.rank"], ("method.rank",)),
    "wrong type": (["method.rank=many"], ("method.rank", "'many'", "integer")),
    "wrong type in a list": (["method.targets=[cross_attention,heads]"], ("method.targets", "cross_attention")),
    "fraction of a step": (["trainer.max_steps=2.5"], ("trainer.max_steps", "2.5")),
    "rank 0": (["method.rank=0"], ("method.rank", "0", "greater than or equal to 1")),
    "dropout 1": (["method.dropout=1"], ("method.dropout", "less than 1")),
    "no targets": (["method.targets=[]"], ("method.targets",)),
    "lr -1": (["optimizer.lr=-1"], ("optimizer.lr", "-1", "greater than 0")),
    "lr 0": (["optimizer.lr=0"], ("optimizer.lr", "0", "greater than 0")),
    "lr no number": (["optimizer.lr=high"], ("optimizer.lr", "'high'")),
    "betas": (["optimizer.betas=[0.9,1.5]"], ("optimizer", "1.5")),
    "max_steps 0": (["trainer.max_steps=0"], ("trainer.max_steps", "0", "greater than or equal to 1")),
    "max_steps -1": (["trainer.max_steps=-1"], ("trainer.max_steps", "greater than or equal to 1")),
    "rank as a float": (["method.rank=8.0"], ("method.rank", "8.0", "valid integer")),
    "no accumulation": (["trainer.accumulate_grad_batches=0"], ("trainer.accumulate_grad_batches", "0")),
    "negative clip": (["trainer.gradient_clip_val=-1"], ("trainer.gradient_clip_val", "-1", "greater than 0")),
    "an argument of the run's own": (["+trainer.max_epochs=3"], ("trainer.max_epochs", "leave it out")),
    "no devices": (["hardware.devices=0"], ("hardware.devices", "0", "at least 1")),
    "a name that leads elsewhere": (["name=../x"], ("name", "../x")),
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
    "resolution no multiple": (["data.resolution=34"], ("data.resolution", "34", "multiple of 4")),
    "random crop of a cached latent": (["data.random_crop=true"], ("data.random_crop", "data.cache_latents=false")),
    "hold out more than there is": (["data.hold_out=10"], ("data.hold_out", "5 images")),
    "target of another package": (["method._target_=os.system"], ("method._target_", "os.system", "not allowed")),
    "target through an import": (
        ["method._target_=pytorch_lightning.trainer.trainer.os.system"],
        ("method._target_", "os.system"),
    ),
    "target that is not there": (["method._target_=sdtune.methods.Lora"], ("method._target_", "sdtune.methods.Lora")),
    "secret of W&B": (["logger=wandb", "logger.wandb.api_key=abc"], ("logger.wandb.api_key", "environment")),
    "secret added": (["+wandb.token=abc"], ("wandb.token", "environment")),
    "secret forced": (["++backbone.hf_token=abc"], ("backbone.hf_token", "environment")),
    "W&B without an account": (["logger=wandb"], ("logger.wandb", "WANDB_API_KEY", "offline=true")),
    "backbone that is not there": (["backbone.path=./nowhere"], ("backbone.path", "./nowhere", "does not exist")),
    "missing value": (["data.path=???"], ("data.path is missing", "data.path=")),
    "missing folder": (["data.path=./nowhere"], ("data.path", "nowhere", "does not exist")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting(line: CommandLine, images: Path, case: str) -> None:
    overrides, words = SETTINGS[case]
    line.train(images, *overrides, words=words)


def test_a_missing_config_folder(line: CommandLine, images: Path) -> None:
    line.train(images, "-cd", "nowhere", words=("--config-dir", "nowhere", "not a folder"))


# --- images


def truncate(folder: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "5.jpg")
    data = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(data[: len(data) // 2])


def pixel(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "5.png")


IMAGES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], ("data.path", "images", "it is empty")),
    "a file for a folder": (lambda f: (shutil.rmtree(f), f.write_text("")), ("data.path", "it is a file")),
    "no images": (lambda f: [p.unlink() for p in f.glob("*.png")], ("data.path", "5 .txt")),
    "truncated JPEG": (truncate, ("data.path", "5.jpg", "truncated")),
    "1-pixel image": (pixel, ("data.path", "5.png", "1x1")),
    "text named .png": (lambda f: (f / "5.png").write_text("hello"), ("data.path", "5.png", "not a readable image")),
    "empty .png": (lambda f: (f / "5.png").write_bytes(b""), ("data.path", "5.png", "the file is empty")),
    "no captions": (
        lambda f: [p.unlink() for p in f.glob("*.txt")],
        ("data.path", "5 of 5 images have no caption", 'data.prompt="a photo of ..."'),
    ),
    "caption of another encoding": (lambda f: (f / "0.txt").write_bytes(b"\xff\xfea"), ("data.path", "0.txt", "UTF-8")),
    "two captions": (lambda f: (f / "0.caption").write_text("a"), ("data.path", "0.png", "two captions")),
    "metadata of nothing": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n'),
        ("data.path", "metadata.jsonl, line 1", "9.png"),
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_wrong_images(line: CommandLine, images: Path, case: str) -> None:
    spoil, words = IMAGES[case]
    spoil(images)
    prompt = [] if case == "no captions" else ["data.prompt=a dog"]
    line.train(images, *prompt, words=words)


def test_images_of_the_class_are_asked_for_by_their_own_key(line: CommandLine, images: Path) -> None:
    shutil.copytree(images, line.folder / "class")
    for caption in (line.folder / "class").glob("*.txt"):
        caption.unlink()
    own = ["method=dreambooth", f"data.class_path={line.folder}/class"]
    line.train(images, *own, words=("data.class_path: 5 of 5 images have no caption", "data.class_prompt="))
    own = ["method=dreambooth", f"data.class_path={line.folder}/nowhere"]
    line.train(images, *own, words=("data.class_path: no images found in", "nowhere"))


def test_a_class_prompt_that_is_a_caption_too(line: CommandLine, images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.write_text("a photo of a dog")
    own = ["method=dreambooth", 'data.class_prompt="a photo of a dog"']
    line.train(images, *own, words=("data.class_prompt: 'a photo of a dog' is a caption of the subject too",))


def test_templates_ask_for_the_bare_word(line: CommandLine, images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.unlink()
    own = ["method=textual_inversion", "data.templates=object", 'new_tokens=[{token: "<cat>", init: cat}]']
    line.train(images, *own, words=("data.path", 'data.prompt="<my_cat>"'))


# --- folders of runs


def test_an_output_that_cannot_be_written(line: CommandLine, images: Path) -> None:
    (line.folder / "file").write_text("")
    run = line.folder / "file" / "run"
    line.train(images, f"hydra.run.dir={run}", words=("hydra.run.dir", str(run), "not a folder"))


def test_a_folder_that_holds_a_run(line: CommandLine, images: Path) -> None:
    line.run.mkdir()
    (line.run / "metrics.csv").write_text("step\n1\n")
    line.train(images, words=("hydra.run.dir", str(line.run), "ended before its first checkpoint; remove it"))
    (line.run / "checkpoints").mkdir()
    (line.run / "checkpoints" / "step00000001.ckpt").touch()
    line.train(images, words=("hydra.run.dir", str(line.run), "already holds a run", "resume="))


def test_an_empty_folder_that_was_there_stays(line: CommandLine, images: Path) -> None:
    line.run.mkdir()
    line.train(images, "method.rank=0", words=("method.rank",))
    assert line.run.is_dir()


def holds_a_run(line: CommandLine, images: Path) -> None:
    (line.run / ".hydra").mkdir(parents=True)
    overrides = "".join(f"- {override}\n" for override in line.training(images)[1:-1])
    (line.run / ".hydra" / "overrides.yaml").write_text(overrides)
    (line.run / ".hydra" / "hydra.yaml").write_text("hydra:\n  runtime:\n    config_sources: []\n")


def test_resuming_a_folder_without_a_run(line: CommandLine) -> None:
    line.refuses("train", f"resume={line.folder}", words=("resume", str(line.folder), "holds no run"))
    line.refuses("train", "resume=./nowhere", words=("resume", "nowhere", "holds no run"))


def test_resuming_a_run_without_a_checkpoint(line: CommandLine, images: Path) -> None:
    holds_a_run(line, images)
    line.refuses("train", f"resume={line.run}", words=("resume", "checkpoints", "step*.ckpt"))


@pytest.mark.parametrize(
    "override", ["method.rank=4", "seed=1", "+method.alpha=3", "data=pocket_subject", "~callbacks", "~data"]
)
def test_resuming_as_another_run(line: CommandLine, images: Path, override: str) -> None:
    holds_a_run(line, images)
    line.refuses("train", f"resume={line.run}", override, words=("resume", override, "another run"))


def test_resuming_a_run_of_an_older_version(line: CommandLine, images: Path) -> None:
    """What it was started with, or its config, has a setting that is no more; neither is passed over."""
    mends = ("finish it with the version of sdtune",)
    holds_a_run(line, images)
    overrides = line.run / ".hydra" / "overrides.yaml"
    before = overrides.read_text()
    overrides.write_text(before + "- data.class_pictures=4\n")
    line.refuses("train", f"resume={line.run}", words=("data.class_pictures", "mean class_images?", "resume=", *mends))

    overrides.write_text(before)
    (line.run / "checkpoints").mkdir()
    (line.run / "checkpoints" / "step2.ckpt").touch()
    config = compose("train", search_path(None), line.training(images)[1:-1])
    OmegaConf.update(config, "data.class_pictures", 200, force_add=True)
    (line.run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config))
    line.refuses("train", f"resume={line.run}", words=("resume", str(line.run), "data.class_pictures", *mends))


def test_evaluating_a_folder_without_a_run(line: CommandLine) -> None:
    line.refuses("evaluate", f"run={line.folder}", words=("run", str(line.folder), "holds no run"))
    line.refuses("evaluate", words=("run is missing",))


# --- sampling


def adapter(path: Path, backbone_hash: str, module: str = "unet.down_blocks.0.attentions.0.proj_in") -> Path:
    pair = (torch.zeros(2, 16, 1, 1), torch.zeros(16, 2, 1, 1))
    spec = ModelSpec(title="x", resolution=32, prediction_type="epsilon", steps=1, seed=0)
    weights = LoRAWeights({module: pair}, {module: 2.0})
    kohya_lora.write(path, weights, spec, {"sdtune_backbone_hash": backbone_hash})
    return path


def test_an_adapter_for_other_layers(line: CommandLine) -> None:
    own = Pretrained(str(line.tiny)).hash()
    file = adapter(line.folder / "other.safetensors", own, "unet.down_blocks.7.attentions.0.proj_in")
    line.refuses(
        *line.sampling(), "prompt=a dog", f"adapters=[{{path: {file}}}]", words=("other.safetensors", "no such module")
    )


def test_an_adapter_that_is_no_safetensors_file(line: CommandLine) -> None:
    (line.folder / "bad.safetensors").write_text("hello")
    line.refuses(
        *line.sampling(),
        "prompt=a dog",
        "adapters=[{path: bad.safetensors}]",
        words=("bad.safetensors", "not a readable"),
    )


SAMPLING: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no prompt": ([], ("prompt is missing", "prompt=")),
    "no such adapter": (
        ["prompt=x", "adapters=[{path: nowhere.safetensors}]"],
        ("nowhere.safetensors", "does not exist"),
    ),
    "adapters as a file": (
        ["prompt=x", "adapters=a.safetensors"],
        ("adapters: a.safetensors is no list", "{path: FILE"),
    ),
    "adapter as a file": (
        ["prompt=x", "adapters=[a.safetensors]"],
        ("adapters[0]: a.safetensors stands alone", "{path:"),
    ),
    "adapter without a path": (["prompt=x", "adapters=[{strength: 1}]"], ("adapters[0]", "path is missing")),
    "misspelt strength": (["prompt=x", "adapters=[{path: a, strenght: 1}]"], ("adapters[0]", "strenght")),
    "strength no number": (
        ["prompt=x", "adapters=[{path: prompts.txt, strength: much}]"],
        ("adapters[0].strength", "'much'"),
    ),
    "no such prompts_file": (["prompts_file=nowhere.txt"], ("prompts_file", "nowhere.txt")),
    "unknown option in prompts_file": (["prompts_file=prompts.txt"], ("prompts.txt", "line 2", "--q", "--n")),
    "width no multiple": (["prompt=x", "sampling.width=33"], ("sampling.width", "33", "multiple of 4")),
    "steps 0": (["prompt=x", "sampling.steps=0"], ("sampling.steps", "0")),
    "unknown sampler": (["prompt=x", "sampling.sampler=dimm"], ("sampling.sampler", "'dimm'", "ddim")),
    "seeds no numbers": (["prompt=x", "seeds=[one]"], ("seeds", "'one'")),
    "strengths no numbers": (["prompt=x", "strengths=[strong]"], ("strengths", "'strong'")),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_wrong_sampling(line: CommandLine, case: str) -> None:
    (line.folder / "prompts.txt").write_text("a dog --s 2\na cat --q 3\n")
    overrides, words = SAMPLING[case]
    line.refuses(*line.sampling(), *overrides, words=words)


def test_no_such_command(line: CommandLine) -> None:
    line.refuses("trian", words=("trian", "no such command", "train"))


# --- and the test itself


def test_what_is_right_is_not_refused(line: CommandLine, images: Path) -> None:
    """The same command line without a mistake trains, so that the refusals above are the mistakes'."""
    code, lines = line(*line.training(images), "debug=smoke", "callbacks.samples=null", "method.rank=2")
    assert code == 0, "\n".join(lines)
    assert (line.run / "metrics.json").is_file()
    assert (line.run / "artifact" / "images.safetensors").is_file()


# --- backbones that cannot be loaded


def spoilt(tiny: Path, folder: Path, spoil: Callable[[Path], object]) -> Path:
    copy = Path(shutil.copytree(tiny, folder / "backbone"))
    spoil(copy)
    return copy


BACKBONES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "pickles alone": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
        ("backbone.path", "unet", "diffusion_pytorch_model.safetensors"),
    ),
    "truncated weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"abc"),
        ("vae", "cut short"),
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ("tokenizer",)),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_a_backbone_that_cannot_be_loaded(line: CommandLine, images: Path, case: str) -> None:
    spoil, words = BACKBONES[case]
    folder = spoilt(line.tiny, line.folder, spoil)
    line.train(images, f"backbone.path={folder}", words=words)


def test_another_top_config_is_not_passed_over(line: CommandLine, images: Path) -> None:
    line.refuses("train", "-cn", "mine", *line.training(images)[1:], words=("-cn", "experiment=mine"))


def test_resuming_elsewhere(line: CommandLine, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    holds_a_run(line, images)
    line.refuses("train", f"resume={line.run}", "hydra.run.dir=x", words=("resume", "hydra.run.dir=x", "another run"))


def test_what_hydra_cannot_read_says_how_to_quote_it(line: CommandLine, images: Path) -> None:
    wanted = """'data.prompt="a photo of <disc>"'"""
    line.train(images, "data.prompt=a photo of <disc>", words=("data.prompt", "quote it", wanted))


def test_images_of_ones_own_need_their_data(line: CommandLine) -> None:
    line.refuses("train", "data.prompt=a dog", "method=lora", words=("data.prompt", "need data=folder"))
