"""ControlNet: trainable weights, effect of every residual, and equal images in plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from drawings import drawing, save_drawings
from pipelines import build_pipeline
from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families.unet_backbone import UNetBackbone
from sdtune.backbone.families.unet_controlnet import embedding_widths
from sdtune.data.control.edges import Canny
from sdtune.errors import UserError
from sdtune.loaders import controlnet as controlnets
from sdtune.loaders.artifact import artifacts_applied
from sdtune.methods import ControlNet
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.run_models import RunModels

MODES = ["frozen", "decoder", "all"]


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    return save_drawings(tmp_path / "drawings")


def configured(tiny: Path, **settings: Any) -> ControlNet:
    model = ControlNet(backbone=Pretrained(str(tiny)), **settings)
    model.configure_model()
    model.eval()
    return model


def with_noise(model: ControlNet, seed: int = 2, scale: float = 0.1) -> ControlNet:
    """The model with noise added to all trainable tensors, as if it had been trained."""
    rng = torch.Generator().manual_seed(seed)
    for _, p in model.trainable():
        p.data += torch.randn(p.shape, generator=rng) * scale
    return model


def predict(model: ControlNet, maps: Tensor | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    text = model.backbone.encode_text(["a fox", "two foxes"])
    conditions = {} if maps is None else {"control": maps}
    with torch.no_grad():
        return model.denoise(noisy, torch.tensor([3, 800]), text, conditions)


def maps() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_parameter_count_on_sd15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        model = ControlNet()
        model.__dict__["backbone"] = SimpleNamespace(
            denoiser=unet,
            facts=SimpleNamespace(factor=8),
            controlnets=UNetBackbone.controlnets,
            frozen_prefixes=lambda component: (),
        )
        model.inject()
    assert sum(p.numel() for p in model.controlnet.parameters()) == 361_279_120
    assert not any(p.requires_grad for p in unet.parameters())


def test_embedding_downsamples_a_control_map_by_the_factor_of_the_vae() -> None:
    assert embedding_widths(8) == (16, 32, 96, 256)
    assert embedding_widths(4) == (16, 32, 96)
    assert embedding_widths(16) == (16, 32, 96, 256, 256)


@pytest.mark.parametrize("unet", MODES)
def test_untrained_controlnet_changes_nothing_and_every_residual_has_an_effect(tiny: Path, unet: str) -> None:
    model = configured(tiny, denoiser=unet)
    base = predict(model)
    assert torch.equal(predict(model, maps()), base)
    zero_convolutions = [*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block]
    assert len(zero_convolutions) == 5  # conv_in, two blocks, a downsampler, the mid block
    for convolution in zero_convolutions:
        assert not convolution.weight.any()
        convolution.weight.data.fill_(0.05)
        assert (predict(model, maps()) - base).abs().max() > 1e-5
        convolution.weight.data.zero_()
    assert torch.equal(predict(model, maps()), base)


def test_only_the_control_map_has_an_effect(tiny: Path) -> None:
    model = with_noise(configured(tiny))
    assert (predict(model, maps()) - predict(model, maps().flip(-1))).abs().max() > 1e-4
    assert torch.equal(predict(model), predict(configured(tiny)))


def test_initial_values_depend_only_on_seed_and_name(tiny: Path) -> None:
    first = configured(tiny)
    torch.manual_seed(99)
    second, other_seed = configured(tiny, denoiser="all"), configured(tiny, seed=1)
    for name, p in first.controlnet.named_parameters():
        assert torch.equal(p, second.controlnet.get_parameter(name))
        is_random = "controlnet_cond_embedding" in name and "conv_out" not in name
        assert torch.equal(p, other_seed.controlnet.get_parameter(name)) != is_random, name
    copied = first.controlnet.down_blocks.state_dict()
    assert all(torch.equal(v, copied[k]) for k, v in first.backbone.denoiser.down_blocks.state_dict().items())


@pytest.mark.parametrize("unet", MODES)
def test_all_trainable_tensors_change_and_frozen_ones_do_not(tiny: Path, drawings: Path, unet: str) -> None:
    model = configured(tiny, denoiser=unet, optimizer=adamw(1e-3))
    names = {name for name, _ in model.trainable()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spy = Spy()
    fit(model, folder_data(drawings, control=Canny()), 4, [spy], gradient_clip_val=1.0)
    for name in names:
        assert any(gradients[name].any() for gradients in spy.gradients[:3]), name
        assert spy.gradients[2][name].any(), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names
    unet_parts = {
        name.removeprefix("backbone.denoiser.").split(".")[0] for name in names if name.startswith("backbone.denoiser.")
    }
    assert (
        unet_parts
        == {
            "frozen": set(),
            "decoder": {"up_blocks", "conv_norm_out", "conv_out"},
            "all": {name.split(".")[0] for name, _ in model.backbone.denoiser.named_parameters()},
        }[unet]
    )
    assert not any(name.startswith(("backbone.vae", "backbone.text_encoder")) for name in names)


@pytest.mark.parametrize("unet", MODES)
def test_trains_and_validates_with_frozen_weights_in_half_precision(tiny: Path, drawings: Path, unet: str) -> None:
    model = configured(tiny, denoiser=unet, optimizer=adamw(1e-3))
    spy = Spy()
    data = folder_data(drawings, control=Canny(), hold_out=5)
    trainer_arguments: dict[str, Any] = {
        "precision": "bf16-mixed",
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    fit(model, data, 2, [spy], **trainer_arguments)
    assert {p.dtype for _, p in model.trainable()} == {torch.float32}
    frozen_dtypes = {p.dtype for p in model.backbone.denoiser.parameters() if not p.requires_grad}
    assert frozen_dtypes == (set() if unet == "all" else {torch.bfloat16})
    assert all(0 < loss < 10 for loss in (*spy.losses, *spy.validation))


def test_unet_has_a_separate_learning_rate(tiny: Path, drawings: Path) -> None:
    model = configured(tiny, denoiser="decoder", denoiser_lr=1e-6, optimizer=adamw(1e-3))
    trainer = fit(model, folder_data(drawings, control=Canny()), 1)
    groups = trainer.optimizers[0].param_groups
    assert {group["name"]: group["lr"] for group in groups} == {"controlnet": 1e-3, "denoiser": 1e-6}
    with pytest.raises(UserError, match=r"^method\.denoiser_lr: the denoiser is frozen"):
        ControlNet(denoiser_lr=1e-6)


def test_data_without_control_maps_is_refused(tiny: Path, images: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.control: method=controlnet needs a control map"):
        fit(configured(tiny), folder_data(images), 1)


# --- artifacts in plain diffusers

SETTINGS = Sampling(steps=3, guidance=4.0)


def float_images(backbone: Backbone, requests: list[Request], patch: pytest.MonkeyPatch) -> np.ndarray:
    """Generated images, float [B, H, W, 3] in [0, 1], before the conversion to bytes."""
    decoded: list[Tensor] = []
    decode = Backbone.decode

    def recording_decode(self: Backbone, latents: Tensor) -> Tensor:
        decoded.append(decode(self, latents))
        return decoded[-1]

    with patch.context() as inner:
        inner.setattr(Backbone, "decode", recording_decode)
        list(generate(backbone, requests, SETTINGS))
    return torch.cat(decoded).permute(0, 2, 3, 1).numpy()


def diffusers_images(tiny: Path, net: Any, images: Any, strength: Any, **parts: Any) -> np.ndarray:
    pipe = StableDiffusionControlNetPipeline.from_pretrained(tiny, controlnet=net, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red fox", "two blue foxes"]
    return pipe(
        prompts,
        image=images,
        controlnet_conditioning_scale=strength,
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
        height=32,
        width=32,
    ).images


def requests(*maps: np.ndarray) -> list[Request]:
    conditions = dict(zip(("control", "control2"), maps, strict=False))
    return [Request("a red fox", 3, conditions), Request("two blue foxes", 4, conditions)]


def loaded_nets(backbone: Backbone, source: Pretrained, folders: list[Path], strengths: list[float]) -> list[Any]:
    names = ("control", "control2")
    return [
        controlnets.load_applicable_controlnet(backbone, source, str(folder), strength, name)
        for folder, strength, name in zip(folders, strengths, names, strict=False)
    ]


def artifact(tiny: Path, folder: Path, seed: int = 2, **settings: Any) -> Path:
    with_noise(configured(tiny, **settings), seed).artifact(folder, "net")
    return folder / "net"


@pytest.mark.parametrize("unet", MODES)
def test_diffusers_generates_the_same_images(
    tiny: Path, tmp_path: Path, unet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact(tiny, tmp_path, denoiser=unet)
    control_map = drawing(2, 32, 32)
    components = {}
    if unet != "frozen":
        components["unet"] = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    net = ControlNetModel.from_pretrained(folder, local_files_only=True)
    expected = diffusers_images(tiny, net, [Image.fromarray(control_map)] * 2, 0.8, **components)
    source = Pretrained(str(tiny))
    backbone = source.load()
    backbone.prepare_for_device(torch.device("cpu"))
    unet_weights = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    base = float_images(backbone, requests(), monkeypatch)
    nets = loaded_nets(backbone, source, [folder], [0.8])
    with artifacts_applied(backbone, nets):
        images = float_images(backbone, requests(control_map), monkeypatch)
    assert np.abs(images - expected).max() <= 1e-4
    assert np.abs(images - base).max() > 1e-2
    with artifacts_applied(backbone, nets, 0.0):
        assert np.array_equal(float_images(backbone, requests(control_map), monkeypatch), base)
    assert all(torch.equal(value, unet_weights[name]) for name, value in backbone.denoiser.state_dict().items())
    assert np.array_equal(float_images(backbone, requests(control_map), monkeypatch), base)
    with RunModels(source, tmp_path, "net", torch.device("cpu")).trained() as loaded:
        # RunModels.trained() applies the ControlNet with strength 1.
        assert np.abs(float_images(loaded, requests(control_map), monkeypatch) - images).max() > 1e-4
    assert json.loads((folder / "sdtune.json").read_text(encoding="utf-8")) == {"backbone": source.hash(), "unet": unet}
    assert (folder / "unet").exists() == (unet != "frozen")


def test_residuals_of_several_controlnets_add_up_as_in_diffusers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [artifact(tiny, tmp_path / str(seed), seed) for seed in (2, 3)]
    control_maps = [drawing(0, 32, 32), drawing(4, 32, 32)]
    multi = MultiControlNetModel([ControlNetModel.from_pretrained(f, local_files_only=True) for f in folders])
    expected = diffusers_images(tiny, multi, [[Image.fromarray(m) for m in control_maps]] * 2, [0.7, 0.4])
    source = Pretrained(str(tiny))
    backbone = source.load()
    with artifacts_applied(backbone, loaded_nets(backbone, source, folders, [0.7, 0.4])):
        images = float_images(backbone, requests(*control_maps), monkeypatch)
    assert np.abs(images - expected).max() <= 1e-4
    with artifacts_applied(backbone, loaded_nets(backbone, source, folders, [0.7, 0.0])):
        assert np.abs(images - float_images(backbone, requests(*control_maps), monkeypatch)).max() > 1e-3


def test_two_controlnets_with_trained_unets_are_refused(tiny: Path, tmp_path: Path) -> None:
    folders = [artifact(tiny, tmp_path / str(seed), seed, denoiser="decoder") for seed in (2, 3)]
    source = Pretrained(str(tiny))
    backbone = source.load()
    with (
        pytest.raises(UserError, match=r"^control: both .* contain weights of the denoiser"),
        artifacts_applied(backbone, loaded_nets(backbone, source, folders, [1, 1])),
    ):
        pass
    with artifacts_applied(backbone, loaded_nets(backbone, source, folders, [1, 0])):
        pass


def test_artifact_has_frozen_unet_weights_in_original_precision(tiny: Path, tmp_path: Path) -> None:
    model = with_noise(configured(tiny, denoiser="decoder"))
    model.backbone.denoiser.conv_in.to(torch.bfloat16)
    model.artifact(tmp_path, "net")
    written = UNet2DConditionModel.from_pretrained(tmp_path / "net" / "unet", local_files_only=True)
    base = UNet2DConditionModel.from_pretrained(tiny / "unet", local_files_only=True)
    assert torch.equal(written.conv_in.weight, base.conv_in.weight)
    assert torch.equal(written.conv_out.weight, model.backbone.denoiser.conv_out.weight)
    assert not torch.equal(written.conv_out.weight, base.conv_out.weight)


# --- refusals


def test_incompatible_controlnets_are_refused(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, source = artifact(tiny, tmp_path), Pretrained(str(tiny))
    controlnets.check_controlnet(str(folder), source)
    with pytest.raises(UserError, match=r"^control\.path: /nowhere is neither a folder with config\.json"):
        controlnets.check_controlnet("/nowhere", source)
    with pytest.raises(UserError, match=r"^control\.path: .* is a UNet2DConditionModel, not the ControlNetModel"):
        controlnets.check_controlnet(str(tiny / "unet"), source)
    other = Pretrained(str(build_pipeline(tmp_path / "other", seed=1)))
    controlnets.check_controlnet(str(folder), other)
    assert "trained on another backbone" in caplog.text
    facts = json.loads((folder / "sdtune.json").read_text(encoding="utf-8"))
    for preprocess, remedy in (("scribble", "set preprocess: scribble"), (None, "set image to a control map")):
        (folder / "sdtune.json").write_text(json.dumps({**facts, "preprocess": preprocess}), encoding="utf-8")
        with pytest.raises(UserError, match=rf"^control\.preprocess: canny, but .* other control maps; {remedy}"):
            controlnets.check_controlnet(str(folder), source, "canny")
        controlnets.check_controlnet(str(folder), source, preprocess)
    (folder / "sdtune.json").unlink()
    controlnets.check_controlnet(str(folder), other)  # ControlNets of other programs have no backbone hash
    with pytest.raises(
        UserError, match=r"^control\.path: .* has block_out_channels \[16, 32\], the backbone's denoiser has \[64"
    ):
        controlnets.check_controlnet(str(folder), Pretrained())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["conditioning_embedding_out_channels"] = [16, 32, 96, 256]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"^control\.path: .* downscales its control map by 8, the backbone's VAE by 4"):
        controlnets.check_controlnet(str(folder), source)
