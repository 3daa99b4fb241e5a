"""One Stable Diffusion model in all supported file formats: the same tensors, the same hash, the same images."""

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
    """The pipeline as a single file, written by the rules of the public conversion script."""
    save_file(original_tensors(folder), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def weights(**settings: Any) -> dict[str, Tensor]:
    return Pretrained(**settings).load().state_dict()


def equal_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def half_precision_copy(folder: Path, target: Path, shard: str | None = None) -> Path:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
    pipeline.save_pretrained(target, variant="fp16", **({"max_shard_size": shard} if shard else {}))
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name, dirs_exist_ok=True)
    return target


def test_all_file_formats_load_the_same_model(folder: Path, single: Path, tmp_path: Path, family: Family) -> None:
    plain = weights(path=str(folder), family=family)
    ckpt = single.with_suffix(".ckpt")
    # As in the authors' files, which reference the callbacks of their training.
    callbacks = {ModelCheckpoint: {"best_model_path": "x"}}
    torch.save({"state_dict": load_file(single), "global_step": 7, "callbacks": callbacks}, ckpt)
    sources: dict[str, dict[str, Any]] = {
        "fp16 folder": {"path": str(half_precision_copy(folder, tmp_path / "half")), "variant": "fp16"},
        "fp16 folder, variant not set": {"path": str(tmp_path / "half")},
        "shards": {"path": str(half_precision_copy(folder, tmp_path / "shards", "100KB")), "variant": "fp16"},
        "safetensors": {"path": str(single), "config": str(folder)},
        "ckpt": {"path": str(ckpt), "config": str(folder), "allow_pickle": True},
    }
    assert len(list((tmp_path / "shards/unet").glob("*.fp16-0*.safetensors"))) > 1
    for name, settings in sources.items():
        Pretrained(**settings, family=family).check()
        assert equal_weights(weights(**settings), plain), name
    hashes = {Pretrained(**sources[name]).hash() for name in ("safetensors", "ckpt")}
    assert hashes == {Pretrained(str(folder)).hash()}  # the hash does not depend on the layout


def test_single_file_and_folder_generate_the_same_image(folder: Path, single: Path) -> None:
    from sdtune.sampling.loop import Request, Sampling, generate

    images = [
        next(generate(Pretrained(**settings).load(), [Request("a cat", 1)], Sampling(steps=2)))
        for settings in ({"path": str(folder)}, {"path": str(single), "config": str(folder)})
    ]
    assert (images[0] == images[1]).all()


def test_single_file_is_converted_once_and_again_after_a_change(folder: Path, single: Path, family: Family) -> None:
    first = Pretrained(str(single), config=str(folder)).folder()
    converted_at = (first / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert Pretrained(str(single), config=str(folder)).folder() == first
    assert (first / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == converted_at
    assert not list(first.parent.glob("*.partial"))
    tensors = load_file(single)
    save_file({**tensors, "model.diffusion_model.out.2.bias": torch.ones(4)}, single)
    assert torch.equal(weights(path=str(single), config=str(folder))["denoiser.conv_out.bias"], torch.ones(4))


def test_markers_in_the_file_set_the_prediction_type(folder: Path, single: Path, family: Family) -> None:
    assert Pretrained(str(single), config=str(folder)).facts.prediction_type == (
        "v_prediction" if family == "sd2" else "epsilon"
    )
    save_file({**load_file(single), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, single)
    source = Pretrained(str(single), config=str(folder))
    assert source.facts.prediction_type == "v_prediction"
    assert source.scheduler()["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("name", ["v", "epsilon"])
def test_model_spec_sets_the_prediction_type(folder: Path, single: Path, name: str) -> None:
    save_file(load_file(single), single, {"modelspec.prediction_type": name})
    settings = {"path": str(single), "config": str(folder)}
    stated = {"v": "v_prediction", "epsilon": "epsilon"}[name]
    source = Pretrained(**settings)
    assert source.facts.prediction_type == stated
    assert source.scheduler().keys() == Pretrained(str(folder)).scheduler().keys()
    # Metadata can be wrong, so an explicit setting counts more.
    other = {"v": "epsilon", "epsilon": "v_prediction"}[name]
    assert Pretrained(**settings, prediction_type=other).facts.prediction_type == other


def test_marker_counts_more_than_metadata_and_cannot_be_contradicted(folder: Path, single: Path) -> None:
    """kohya's scripts for merging write "epsilon" also for v-prediction models."""
    save_file({**load_file(single), "v_pred": torch.ones(1)}, single, {"modelspec.prediction_type": "epsilon"})
    settings = {"path": str(single), "config": str(folder)}
    assert Pretrained(**settings).facts.prediction_type == "v_prediction"
    assert Pretrained(**settings, prediction_type="v_prediction").facts.prediction_type == "v_prediction"
    message = r"^backbone\.prediction_type: got epsilon, but .* states v_prediction; remove it"
    with pytest.raises(UserError, match=message):
        _ = Pretrained(**settings, prediction_type="epsilon").facts


def test_flow_model_is_recognized_by_its_metadata_and_cannot_be_contradicted(folder: Path, single: Path) -> None:
    save_file(load_file(single), single, {"modelspec.prediction_type": "flow"})
    settings = {"path": str(single), "config": str(folder)}
    source = Pretrained(**settings, flow_shift=2.0)
    assert source.facts.prediction_type == "flow_prediction"
    assert (source.facts.scheduler, source.load().path.shift) == ("DPMSolverMultistepScheduler", 2.0)
    with pytest.raises(UserError, match=r"^backbone\.prediction_type: got epsilon, but .* states flow_prediction"):
        _ = Pretrained(**settings, prediction_type="epsilon").facts


def test_infinite_values_are_refused_only_in_tensors_that_are_used(folder: Path, single: Path) -> None:
    tensors = load_file(single)
    unused = {"model_ema.x": torch.full((1,), float("nan"))}
    save_file({**tensors, **unused}, single)
    Pretrained(str(single), config=str(folder)).check()
    name = "model.diffusion_model.out.2.bias"
    save_file({**tensors, name: torch.full_like(tensors[name], float("inf"))}, single)
    with pytest.raises(UserError, match=r"^backbone\.path: .*\(unet\): NaN or infinite values in conv_out\.bias"):
        Pretrained(str(single), config=str(folder)).check()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (("edm_vpred.sigma_max",), {}, r"is an EDM model \(it has edm_vpred\.sigma_max\)"),
        (("edm_mean", "edm_std"), {}, r"is an EDM model \(it has edm_mean\)"),
        ((), {"modelspec.prediction_type": "x0"}, r"states modelspec\.prediction_type x0; sdtune trains"),
    ],
)
def test_file_with_other_or_contradictory_noise_is_refused(
    folder: Path, single: Path, tensors: tuple[str, ...], metadata: dict[str, str], message: str
) -> None:
    save_file({**load_file(single), **{name: torch.ones(1) for name in tensors}}, single, metadata)
    with pytest.raises(UserError, match=rf"^backbone\.path: .*model\.safetensors {message}"):
        _ = Pretrained(str(single), config=str(folder)).facts


def test_family_must_match_the_config(folders: dict[Family, Path], tmp_path: Path) -> None:
    save_file(original_tensors(folders["sdxl"]), tmp_path / "xl.safetensors")
    for path in (folders["sdxl"], tmp_path / "xl.safetensors"):
        with pytest.raises(UserError, match=r"is SDXL, but backbone=sd15 requires SD 1\.x; use backbone=sdxl"):
            _ = Pretrained(str(path), family="sd1", config=str(folders["sdxl"])).facts
    with pytest.raises(UserError, match=r"^backbone\.config: .* is for SD 1\.x, but .*xl\.safetensors is SDXL"):
        _ = Pretrained(str(tmp_path / "xl.safetensors"), config=str(folders["sd1"])).facts


def test_file_of_another_architecture_is_refused_without_configs(single: Path, family: Family) -> None:
    with pytest.raises(UserError, match=r"^backbone\.path: .*model\.safetensors \((unet|vae)\) (lacks|has) ") as caught:
        _ = Pretrained(str(single)).facts
    assert "instead of [" in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[Any, str]] = {
    "inpainting": (
        lambda t: t.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}),
        r"has 9 input channels \(an inpainting model\)",
    ),
    "missing": (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"\(unet\) lacks conv_out\.bias"),
    "surplus": (
        lambda t: t.update({"model.diffusion_model.extra.weight": torch.zeros(1)}),
        r"\(unet\) contains model\.diffusion_model\.extra\.weight, which the model does not have",
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
        "contains only a VAE",
    ),
    "a LoRA": (
        lambda t: (t.clear(), t.update({"lora_unet_x.lora_down.weight": torch.zeros(1)})),
        "is a LoRA, not a Stable Diffusion checkpoint",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mismatched_checkpoint_is_refused_in_one_line(folders: dict[Family, Path], tmp_path: Path, case: str) -> None:
    tensors = original_tensors(folders["sd1"])
    modify, message = WRONG[case]
    modify(tensors)
    file = tmp_path / "wrong.safetensors"
    save_file(tensors, file)
    cached = set((Path(cache_path()) / "backbones").glob("*[!k]"))
    with pytest.raises(UserError, match=rf"^backbone\.path: {file} .*({message})") as caught:
        _ = Pretrained(str(file), config=str(folders["sd1"])).facts
    assert "\n" not in str(caught.value)
    assert set((Path(cache_path()) / "backbones").glob("*[!k]")) == cached


def cache_path() -> str:
    from sdtune.paths import cache_folder

    return str(cache_folder())


def test_folder_with_other_tensors_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    file = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("conv_out.bias")
    save_file({**tensors, "more.weight": bias}, file)
    with pytest.raises(UserError, match=r"unet lacks conv_out\.bias; contains more\.weight, which the model"):
        Pretrained(str(tmp_path / "copy")).check()


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x40" + b"\0" * 7 + b"not json" * 8])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file") as caught:
        _ = Pretrained(str(file)).facts
    assert "\n" not in str(caught.value)


def test_truncated_file_is_refused(single: Path, folder: Path) -> None:
    single.write_bytes(single.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        _ = Pretrained(str(single), config=str(folder)).facts


# --- pickles


class MaliciousPickle:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "harm")


def test_pickle_is_refused_by_default(folders: dict[Family, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save(original_tensors(folders["sd1"]), file)
    with pytest.raises(UserError, match=r"^backbone\.path: .*model\.ckpt is a pickle.*allow_pickle=true"):
        _ = Pretrained(str(file), config=str(folders["sd1"])).facts


@pytest.mark.parametrize("form", ["torch", "torch, old", "plain"])
def test_malicious_pickle_is_not_executed(tmp_path: Path, form: str) -> None:
    file, target = tmp_path / "model.ckpt", tmp_path / "harm.txt"
    content = {"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": MaliciousPickle(target)}}
    if form == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(
        UserError, match=r"^backbone\.path: .*model\.ckpt (contains more than tensors|cannot)"
    ) as caught:
        _ = Pretrained(str(file), allow_pickle=True).facts
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_malicious_bin_in_a_folder_is_not_executed(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    (tmp_path / "copy/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": MaliciousPickle(tmp_path / "harm.txt")}, tmp_path / "copy/unet/diffusion_pytorch_model.bin")
    for allow in (False, True):
        source = Pretrained(str(tmp_path / "copy"), allow_pickle=allow)
        with pytest.raises(UserError, match=r"unet contains no .*diffusion_pytorch_model\.bin is a pickle"):
            source.check()
        with pytest.raises(UserError, match="is a pickle"):
            source.load()
    assert not (tmp_path / "harm.txt").exists()


# --- another VAE


@pytest.mark.parametrize("form", ["folder", "original", "diffusers", "prefixed"])
def test_vae_can_be_replaced(folders: dict[Family, Path], tmp_path: Path, form: str) -> None:
    other_vae = build_family(tmp_path / "other", "sd1", seed=5) / "vae"
    original = {
        key.removeprefix("first_stage_model."): value for key, value in original_tensors(other_vae.parent).items()
    }
    files = {
        "original": {
            key: value for key, value in original.items() if key.startswith(("encoder.", "decoder.", "quant", "post"))
        },
        "diffusers": load_file(other_vae / "diffusion_pytorch_model.safetensors"),
        "prefixed": {k: v for k, v in original_tensors(other_vae.parent).items() if k.startswith("first_stage_model.")},
    }
    vae_path = other_vae
    if form != "folder":
        vae_path = tmp_path / "vae.safetensors"
        save_file(files[form], vae_path)
    source = Pretrained(str(folders["sd1"]), vae=str(vae_path))
    source.check()
    loaded, plain, expected = (
        s.load().state_dict() for s in (source, Pretrained(str(folders["sd1"])), Pretrained(str(other_vae.parent)))
    )
    for key, value in loaded.items():
        assert torch.equal(value, (expected if key.startswith("vae.") else plain)[key]), key
    assert source.hash() != Pretrained(str(folders["sd1"])).hash()
    assert source.folder() == Pretrained(str(folders["sd1"]), vae=str(vae_path)).folder()


def test_file_without_a_vae_needs_another_one(folders: dict[Family, Path], tmp_path: Path) -> None:
    tensors = {k: v for k, v in original_tensors(folders["sd1"]).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "no_vae.safetensors")
    settings = {"path": str(tmp_path / "no_vae.safetensors"), "config": str(folders["sd1"])}
    source = Pretrained(**settings, vae=str(folders["sd1"] / "vae"))
    source.check()
    assert equal_weights(source.load().state_dict(), Pretrained(str(folders["sd1"])).load().state_dict())
    for _ in range(2):  # also after the conversion without a VAE
        with pytest.raises(UserError, match=r"^backbone\.path: .*no_vae\.safetensors contains no VAE; set"):
            _ = Pretrained(**settings).facts


def test_fp8_tensors_are_read_with_their_scales(folders: dict[Family, Path], tmp_path: Path) -> None:
    tensors, scaled = original_tensors(folders["sd1"]), "model.diffusion_model.time_embed.0"
    tensors = {key: value.to(torch.float8_e4m3fn) if value.dim() > 1 else value for key, value in tensors.items()}
    save_file({**tensors, f"{scaled}.scale_weight": torch.tensor(0.5)}, tmp_path / "fp8.safetensors")
    source = Pretrained(str(tmp_path / "fp8.safetensors"), config=str(folders["sd1"]))
    source.check()
    loaded = source.load().state_dict()
    expected = tensors[f"{scaled}.weight"].float() / 2
    assert torch.equal(loaded["denoiser.time_embedding.linear_1.weight"], expected)
    assert torch.equal(
        loaded["denoiser.conv_in.weight"], tensors["model.diffusion_model.input_blocks.0.0.weight"].float()
    )
    save_file({**tensors, f"{scaled}.comfy_quant": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"^backbone\.path: .*other\.safetensors has quantized weights in a format"):
        _ = Pretrained(str(tmp_path / "other.safetensors"), config=str(folders["sd1"])).facts


@pytest.mark.parametrize("key", ["logit_scale", "text_projection", "transformer.text_projection.weight"])
def test_unused_tensors_of_the_text_encoder_are_ignored(folders: dict[Family, Path], tmp_path: Path, key: str) -> None:
    tensors = original_tensors(folders["sd1"])
    save_file({**tensors, f"cond_stage_model.{key}": torch.ones(2, 2)}, tmp_path / "more.safetensors")
    source = Pretrained(str(tmp_path / "more.safetensors"), config=str(folders["sd1"]))
    assert equal_weights(source.load().state_dict(), Pretrained(str(folders["sd1"])).load().state_dict())


def test_layout_of_sd21_turbo_is_read(folders: dict[Family, Path], tmp_path: Path) -> None:
    """It has the text encoder of SD 2.x with the key prefix of the SDXL refiner."""
    tensors = {
        key.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): value
        for key, value in original_tensors(folders["sd2"]).items()
    }
    save_file(tensors, tmp_path / "turbo.safetensors")
    source = Pretrained(str(tmp_path / "turbo.safetensors"), config=str(folders["sd2"]), family="sd2")
    assert equal_weights(source.load().state_dict(), Pretrained(str(folders["sd2"])).load().state_dict())
    save_file(
        {**tensors, "model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}, tmp_path / "refiner.safetensors"
    )
    with pytest.raises(UserError, match="is the SDXL refiner"):
        _ = Pretrained(str(tmp_path / "refiner.safetensors")).facts


def test_file_or_folder_that_is_not_a_vae_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"^backbone\.vae: .*lora\.safetensors lacks decoder\."):
        _ = Pretrained(str(folders["sd1"]), vae=str(tmp_path / "lora.safetensors")).facts
    for folder in (tmp_path, folders["sd1"] / "unet"):
        with pytest.raises(UserError, match=r"^backbone\.vae: .* is not the folder of an AutoencoderKL"):
            _ = Pretrained(str(folders["sd1"]), vae=str(folder)).facts


def test_included_vocabulary_equals_that_of_clip(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from sdtune.backbone.vocabulary import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer", pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    # The ids of OpenAI's tokenizer.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 0)
    assert json.loads((tmp_path / "tokenizer/vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"] == 49407


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_artifact_trained_from_half_precision_files_is_complete(
    folders: dict[Family, Path], tmp_path: Path, shard: str | None
) -> None:
    """The artifact contains the frozen components, under file names without a variant."""
    from sdtune.methods import Full

    source = Pretrained(str(half_precision_copy(folders["sd1"], tmp_path / "half", shard)), variant="fp16")
    model = Full(backbone=source, parts=["text_encoder"])
    model.configure_model()
    model.write_artifact(tmp_path / "artifact", "it")
    artifact = Pretrained(str(tmp_path / "artifact/it"))
    artifact.check()
    assert not list((tmp_path / "artifact/it").rglob("*fp16*"))
    assert equal_weights(artifact.load().state_dict(), source.load().state_dict())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "artifact/it", safety_checker=None, local_files_only=True)
    assert torch.equal(pipeline.unet.conv_in.weight, model.backbone.denoiser.conv_in.weight)


@pytest.mark.parametrize(
    "content", [b"\x80\x02h\x05.", b"\x80\x02K", b"\x80\x02]K\x01\x86R.", b"", b"PK\x03\x04", b"\0" * 9]
)
def test_invalid_pickle_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf"^backbone\.path: {file} (cannot be read|contains more than tensors|is not a torch checkpoint)",
    ) as caught:
        _ = Pretrained(str(file), allow_pickle=True).facts
    assert "\n" not in str(caught.value)


def test_safetensors_header_with_wrong_sizes_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    file = tmp_path / "copy/vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file"):
        Pretrained(str(tmp_path / "copy")).check()


def test_edited_config_is_used(folders: dict[Family, Path], single: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "configs")
    scheduler = tmp_path / "configs/scheduler/scheduler_config.json"
    first = Pretrained(str(single), config=str(tmp_path / "configs")).facts.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[first]
    scheduler.write_text(scheduler.read_text(encoding="utf-8").replace(first, other), encoding="utf-8")
    assert Pretrained(str(single), config=str(tmp_path / "configs")).facts.prediction_type == other


def test_unreadable_config_and_invalid_clip_skip_are_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    (tmp_path / "copy/unet/config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"^backbone\.path: .*unet/config\.json cannot be read"):
        _ = Pretrained(str(tmp_path / "copy")).facts
    with pytest.raises(UserError, match=r"^backbone\.clip_skip: cannot skip 3 of 3 layers; set at most 2"):
        _ = Pretrained(str(folders["sd1"]), clip_skip=3).facts
