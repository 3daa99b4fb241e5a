"""One Stable Diffusion in every form that people have it: the same tensors, the same name, the same images."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import EACH, FAMILIES, Family, build_family
from original_files import original_tensors
from sdtune.backbone import Pretrained
from sdtune.errors import UserError


@pytest.fixture(scope="session", params=EACH)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: build_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def folder(folders: dict[Family, Path], family: Family) -> Path:
    return folders[family]


@pytest.fixture
def single(folder: Path, tmp_path: Path) -> Path:
    """The same as one file, by the rules of the public script."""
    save_file(original_tensors(folder), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def weights(**settings: Any) -> dict[str, Tensor]:
    return Pretrained(**settings).load().state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def half(folder: Path, target: Path, shard: str | None = None) -> Path:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
    pipeline.save_pretrained(target, variant="fp16", **({"max_shard_size": shard} if shard else {}))
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name, dirs_exist_ok=True)
    return target


def test_four_forms_are_one_model(folder: Path, single: Path, tmp_path: Path, family: Family) -> None:
    plain = weights(path=str(folder), family=family)
    ckpt = single.with_suffix(".ckpt")
    # As the authors' files, which name the callbacks of their training.
    callbacks = {ModelCheckpoint: {"best_model_path": "x"}}
    torch.save({"state_dict": load_file(single), "global_step": 7, "callbacks": callbacks}, ckpt)
    forms: dict[str, dict[str, Any]] = {
        "fp16 folder": {"path": str(half(folder, tmp_path / "half")), "variant": "fp16"},
        "fp16 folder, unnamed": {"path": str(tmp_path / "half")},
        "shards": {"path": str(half(folder, tmp_path / "shards", "100KB")), "variant": "fp16"},
        "safetensors": {"path": str(single), "config": str(folder)},
        "ckpt": {"path": str(ckpt), "config": str(folder), "allow_pickle": True},
    }
    assert len(list((tmp_path / "shards/unet").glob("*.fp16-0*.safetensors"))) > 1
    for name, settings in forms.items():
        Pretrained(**settings, family=family).check()
        assert same(weights(**settings), plain), name
    names = {Pretrained(**forms[name]).hash() for name in ("safetensors", "ckpt")}
    assert names == {Pretrained(str(folder)).hash()}  # the layout is no part of the name


def test_a_single_file_draws_what_its_folder_draws(folder: Path, single: Path) -> None:
    from sdtune.sampling.loop import Request, Sampling, generate

    drawn = [
        next(generate(Pretrained(**settings).load(), [Request("a cat", 1)], Sampling(steps=2)))
        for settings in ({"path": str(folder)}, {"path": str(single), "config": str(folder)})
    ]
    assert (drawn[0] == drawn[1]).all()


def test_it_is_unpacked_once_and_again_when_it_changes(folder: Path, single: Path, family: Family) -> None:
    first = Pretrained(str(single), config=str(folder)).folder()
    made = (first / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert Pretrained(str(single), config=str(folder)).folder() == first
    assert (first / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == made
    assert not list(first.parent.glob("*.partial"))
    tensors = load_file(single)
    save_file({**tensors, "model.diffusion_model.out.2.bias": torch.ones(4)}, single)
    assert torch.equal(weights(path=str(single), config=str(folder))["unet.conv_out.bias"], torch.ones(4))


def test_markers_say_what_the_unet_predicts(folder: Path, single: Path, family: Family) -> None:
    assert Pretrained(str(single), config=str(folder)).facts.prediction_type == (
        "v_prediction" if family == "sd2" else "epsilon"
    )
    save_file({**load_file(single), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, single)
    source = Pretrained(str(single), config=str(folder))
    assert source.facts.prediction_type == "v_prediction"
    assert source.scheduler()["rescale_betas_zero_snr"] is True


def test_the_kind_must_be_the_configs(folders: dict[Family, Path], tmp_path: Path) -> None:
    save_file(original_tensors(folders["sdxl"]), tmp_path / "xl.safetensors")
    for path in (folders["sdxl"], tmp_path / "xl.safetensors"):
        with pytest.raises(UserError, match=r"is SDXL, and backbone=sd15 asks for SD 1\.x; give backbone=sdxl"):
            _ = Pretrained(str(path), family="sd1", config=str(folders["sdxl"])).facts
    with pytest.raises(UserError, match=r"^backbone\.config: .* is of SD 1\.x, and .*xl\.safetensors is SDXL"):
        _ = Pretrained(str(tmp_path / "xl.safetensors"), config=str(folders["sd1"])).facts


def test_without_configs_a_file_of_other_sizes_is_refused_by_its_tensors(single: Path, family: Family) -> None:
    with pytest.raises(UserError, match=r"^backbone\.path: .*model\.safetensors \((unet|vae)\) (lacks|has) ") as caught:
        _ = Pretrained(str(single)).facts
    assert "instead of [" in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[Any, str]] = {
    "inpainting": (
        lambda t: t.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}),
        r"takes 9 channels \(an inpainting model\)",
    ),
    "missing": (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"\(unet\) lacks conv_out\.bias"),
    "surplus": (
        lambda t: t.update({"model.diffusion_model.extra.weight": torch.zeros(1)}),
        r"\(unet\) holds model\.diffusion_model\.extra\.weight, which the model does not have",
    ),
    "misshaped": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
        r"\(unet\) has conv_out\.bias \[5\] instead of \[4\]",
    ),
    "no text encoder": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")],
        "a UNet without its text encoder",
    ),
    "a VAE": (
        lambda t: [
            t.update({k[18:]: v} if k.startswith("first_stage") else {}) for k, v in [*t.items()] if t.pop(k) is v
        ],
        "holds a VAE alone",
    ),
    "a LoRA": (
        lambda t: (t.clear(), t.update({"lora_unet_x.lora_down.weight": torch.zeros(1)})),
        "holds a LoRA, no Stable Diffusion",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(folders: dict[Family, Path], tmp_path: Path, case: str) -> None:
    tensors = original_tensors(folders["sd1"])
    spoil, words = WRONG[case]
    spoil(tensors)
    file = tmp_path / "wrong.safetensors"
    save_file(tensors, file)
    before = set((Path(pytest_cache()) / "backbones").glob("*[!k]"))
    with pytest.raises(UserError, match=rf"^backbone\.path: {file} .*({words})") as caught:
        _ = Pretrained(str(file), config=str(folders["sd1"])).facts
    assert "\n" not in str(caught.value)
    assert set((Path(pytest_cache()) / "backbones").glob("*[!k]")) == before


def pytest_cache() -> str:
    from sdtune.paths import cache_folder

    return str(cache_folder())


def test_a_folder_with_other_tensors_is_refused_too(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    file = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("conv_out.bias")
    save_file({**tensors, "more.weight": bias}, file)
    with pytest.raises(UserError, match=r"unet lacks conv_out\.bias; holds more\.weight, which the model"):
        Pretrained(str(tmp_path / "copy")).check()


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x40" + b"\0" * 7 + b"not json" * 8])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file") as caught:
        _ = Pretrained(str(file)).facts
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_short_is_refused(single: Path, folder: Path) -> None:
    single.write_bytes(single.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        _ = Pretrained(str(single), config=str(folder)).facts


# --- pickles


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "harm")


def test_a_pickle_needs_leave(folders: dict[Family, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save(original_tensors(folders["sd1"]), file)
    with pytest.raises(UserError, match=r"^backbone\.path: .*model\.ckpt is a pickle.*allow_pickle=true"):
        _ = Pretrained(str(file), config=str(folders["sd1"])).facts


@pytest.mark.parametrize("form", ["torch", "torch, old", "plain"])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, form: str) -> None:
    file, target = tmp_path / "model.ckpt", tmp_path / "harm.txt"
    content = {"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": Bomb(target)}}
    if form == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"^backbone\.path: .*model\.ckpt (holds more than tensors|cannot)") as caught:
        _ = Pretrained(str(file), allow_pickle=True).facts
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_hostile_bin_in_a_folder_does_nothing(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    (tmp_path / "copy/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "harm.txt")}, tmp_path / "copy/unet/diffusion_pytorch_model.bin")
    for allow in (False, True):
        source = Pretrained(str(tmp_path / "copy"), allow_pickle=allow)
        with pytest.raises(UserError, match=r"unet holds no .*diffusion_pytorch_model\.bin is a pickle"):
            source.check()
        with pytest.raises(UserError, match="is a pickle"):
            source.load()
    assert not (tmp_path / "harm.txt").exists()


# --- another VAE


@pytest.mark.parametrize("form", ["folder", "original", "diffusers", "prefixed"])
def test_a_vae_of_ones_own(folders: dict[Family, Path], tmp_path: Path, form: str) -> None:
    other = build_family(tmp_path / "other", "sd1", seed=5) / "vae"
    ours = {key.removeprefix("first_stage_model."): value for key, value in original_tensors(other.parent).items()}
    files = {
        "original": {
            key: value for key, value in ours.items() if key.startswith(("encoder.", "decoder.", "quant", "post"))
        },
        "diffusers": load_file(other / "diffusion_pytorch_model.safetensors"),
        "prefixed": {k: v for k, v in original_tensors(other.parent).items() if k.startswith("first_stage_model.")},
    }
    place = other
    if form != "folder":
        place = tmp_path / "vae.safetensors"
        save_file(files[form], place)
    source = Pretrained(str(folders["sd1"]), vae=str(place))
    source.check()
    loaded, plain, wanted = (
        s.load().state_dict() for s in (source, Pretrained(str(folders["sd1"])), Pretrained(str(other.parent)))
    )
    for key, value in loaded.items():
        assert torch.equal(value, (wanted if key.startswith("vae.") else plain)[key]), key
    assert source.hash() != Pretrained(str(folders["sd1"])).hash()
    assert source.folder() == Pretrained(str(folders["sd1"]), vae=str(place)).folder()


def test_what_is_no_vae_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"^backbone\.vae: .*lora\.safetensors lacks decoder\."):
        _ = Pretrained(str(folders["sd1"]), vae=str(tmp_path / "lora.safetensors")).facts
    for place in (tmp_path, folders["sd1"] / "unet"):
        with pytest.raises(UserError, match=r"^backbone\.vae: .* is no AutoencoderKL's folder"):
            _ = Pretrained(str(folders["sd1"]), vae=str(place)).facts


def test_the_shipped_vocabulary_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from sdtune.backbone.vocabulary import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer", pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    # As OpenAI's own tokenizer numbers it.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 0)
    assert json.loads((tmp_path / "tokenizer/vocab.json").read_text())["<|endoftext|>"] == 49407


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_what_is_trained_from_half_precision_files_is_whole(
    folders: dict[Family, Path], tmp_path: Path, shard: str | None
) -> None:
    """The frozen parts go into the artifact, under the names that every program looks for."""
    from sdtune.methods import Full

    source = Pretrained(str(half(folders["sd1"], tmp_path / "half", shard)), variant="fp16")
    model = Full(backbone=source, parts=["text_encoder"])
    model.configure_model()
    model.write_artifact(tmp_path / "artifact", "it")
    made = Pretrained(str(tmp_path / "artifact/it"))
    made.check()
    assert not list((tmp_path / "artifact/it").rglob("*fp16*"))
    assert same(made.load().state_dict(), source.load().state_dict())
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "artifact/it", safety_checker=None, local_files_only=True)
    assert torch.equal(theirs.unet.conv_in.weight, model.backbone.unet.conv_in.weight)


@pytest.mark.parametrize(
    "content", [b"\x80\x02h\x05.", b"\x80\x02K", b"\x80\x02]K\x01\x86R.", b"", b"PK\x03\x04", b"\0" * 9]
)
def test_bytes_that_are_no_pickle_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^backbone\.path: {file} (cannot be read|holds more than tensors|is no checkpoint)"
    ) as caught:
        _ = Pretrained(str(file), allow_pickle=True).facts
    assert "\n" not in str(caught.value)


def test_a_header_that_does_not_fit_its_bytes_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    file = tmp_path / "copy/vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file"):
        Pretrained(str(tmp_path / "copy")).check()


def test_an_edited_config_is_heeded(folders: dict[Family, Path], single: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "configs")
    scheduler = tmp_path / "configs/scheduler/scheduler_config.json"
    first = Pretrained(str(single), config=str(tmp_path / "configs")).facts.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[first]
    scheduler.write_text(scheduler.read_text().replace(first, other))
    assert Pretrained(str(single), config=str(tmp_path / "configs")).facts.prediction_type == other


def test_settings_that_cannot_be_read_are_named(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    (tmp_path / "copy/unet/config.json").write_text("{")
    with pytest.raises(UserError, match=r"^backbone\.path: .*unet/config\.json cannot be read"):
        _ = Pretrained(str(tmp_path / "copy")).facts
    with pytest.raises(UserError, match=r"^backbone\.clip_skip: 3 of 3 layers; give 2 at most"):
        _ = Pretrained(str(folders["sd1"]), clip_skip=3).facts
