"""LoRA: target layers, initial values, scale, and trained tensors."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.families import SD1
from sdtune.errors import UserError
from sdtune.methods import LoRA

EVERYTHING = ("cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder")


def configured(tiny: Path, **settings: Any) -> LoRA:
    model = LoRA(backbone=Pretrained(str(tiny)), **settings)
    model.configure_model()
    return model


def layers_with_pairs(model: LoRA) -> set[str]:
    """Names of the layers with LoRA pairs, starting with the component."""
    return {re.sub(r"\.lora_[AB]\.default\.weight$", "", n).removeprefix("backbone.") for n, _ in model.trainable()}


def predict(model: LoRA) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    text = model.backbone.encode_text(["a fox", "two foxes"])
    return model.backbone.predict(torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([3, 800]), text)


def add_noise_to_b(model: LoRA, scale: float = 0.1) -> None:
    rng = torch.Generator().manual_seed(2)
    for name, p in model.trainable():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=rng) * scale)


def test_parameter_count_per_rank_on_sd15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.requires_grad_(False)
    model = LoRA(rank=1)
    model.__dict__["backbone"] = SimpleNamespace(
        denoiser=unet, encoders={}, facts=SimpleNamespace(family=SD1), frozen_prefixes=lambda component: ()
    )
    model.inject()
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 199_296


ATTENTION = r"denoiser\.(down|mid|up)_block.*\.attn{}\.(to_q|to_k|to_v|to_out\.0)"


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"targets": ["cross_attention"]}, ATTENTION.format(2)),
        ({"targets": ["self_attention"]}, ATTENTION.format(1)),
        ({}, ATTENTION.format("[12]")),
        ({"targets": ["feed_forward"]}, r"denoiser\..*\.ff\.net\.(0\.proj|2)"),
        (
            {"targets": ["convolutions"]},
            r"denoiser\.(down|mid|up)_block.*\.(conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv|proj_in|proj_out)",
        ),
        ({"targets": ["text_encoder"]}, r"text_encoder\..*\.self_attn\.(q|k|v|out)_proj"),
        (
            {"targets": ["text_encoder", "feed_forward"]},
            r"text_encoder\..*(\.self_attn\.(q|k|v|out)_proj|\.fc[12])|denoiser\..*\.ff\.net\.(0\.proj|2)",
        ),
        ({"projections": ["q", "out"]}, r"denoiser\..*\.attn[12]\.(to_q|to_out\.0)"),
        ({"targets": ["text_encoder"], "projections": ["k"]}, r"text_encoder\..*\.k_proj"),
    ],
)
def test_targets_and_projections_select_layers(tiny: Path, settings: dict[str, Any], pattern: str) -> None:
    model = configured(tiny, rank=1, **settings)
    modules = {
        name.replace(".base_layer", "").removeprefix("backbone.")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "lora" not in name
    }
    expected = {name for name in modules if re.fullmatch(pattern, name)}
    assert expected
    assert layers_with_pairs(model) == expected


@pytest.mark.parametrize("setting", ["targets", "projections"])
def test_empty_lists_of_layers_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=rf"^method\.{setting}: the list is empty; set at least one of "):
        LoRA(**{setting: []})


def test_alpha_defaults_to_the_rank_and_scales_the_update(tiny: Path) -> None:
    model = configured(tiny, rank=3)
    assert set(model.weights().alphas.values()) == {3.0}
    base = predict(model)
    add_noise_to_b(model, 0.2)
    double_alpha = configured(tiny, rank=3, alpha=6, alpha_policy="constant")
    add_noise_to_b(double_alpha, 0.1)
    torch.testing.assert_close(predict(double_alpha), predict(model), rtol=0, atol=1e-5)
    assert (predict(double_alpha) - base).abs().max() > 1e-3
    assert set(double_alpha.weights().alphas.values()) == {6.0}


def test_initial_a_is_kaiming_uniform_and_initial_b_is_zero(tiny: Path) -> None:
    model = configured(tiny, rank=8, targets=EVERYTHING)
    for name, p in model.trainable():
        if "lora_B" in name:
            assert not p.any()
            continue
        bound = p[0].numel() ** -0.5
        assert p.abs().max() <= bound
        assert p.abs().max() > 0.8 * bound
        assert p.detach().mean().abs() < 0.3 * bound
    base = Pretrained(str(tiny)).load()
    model.backbone.eval()
    rng = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    expected = base.predict(noisy, torch.tensor([3, 800]), base.encode_text(["a fox", "two foxes"]))
    assert torch.equal(predict(model), expected)


def test_initial_a_depends_only_on_seed_and_name(tiny: Path) -> None:
    few = dict(configured(tiny, rank=4, targets=["cross_attention"], projections=["v"]).trainable())
    torch.manual_seed(99)
    many = dict(configured(tiny, rank=4, targets=EVERYTHING).trainable())
    other_seed = dict(configured(tiny, rank=4, targets=["cross_attention"], projections=["v"], seed=1).trainable())
    for name in few:
        assert torch.equal(few[name], many[name])
        assert torch.equal(few[name], other_seed[name]) == ("lora_B" in name)
    values = [tuple(p.flatten()[:4].tolist()) for n, p in many.items() if "lora_A" in n]
    assert len(set(values)) == len(values)


def test_all_trainable_tensors_change_and_frozen_ones_do_not(tiny: Path, images: Path) -> None:
    model = configured(tiny, rank=2, targets=EVERYTHING, optimizer=adamw(1e-3))
    trainable_names = {name for name, _ in model.trainable()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spy = Spy()
    fit(model, folder_data(images), 3, [spy], gradient_clip_val=1.0)
    for name in trainable_names:
        assert spy.gradients[1][name].any(), name
    assert any(name.startswith("backbone.text_encoder") for name in trainable_names)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable_names


def test_dropout_applies_only_to_the_lora_branch(tiny: Path) -> None:
    model = configured(tiny, rank=2, dropout=0.5, targets=("cross_attention", "text_encoder"))
    plain = configured(tiny, rank=2, targets=("cross_attention", "text_encoder"))
    model.train()
    torch.manual_seed(0)
    # B is zero, so the outputs are equal only if the input of the frozen layer has no dropout.
    assert torch.equal(predict(model), predict(plain))
    add_noise_to_b(model)
    add_noise_to_b(plain)
    assert not torch.equal(predict(model), predict(model))
    model.eval()
    plain.eval()
    assert torch.equal(predict(model), predict(plain))


@pytest.mark.parametrize(
    ("policy", "alpha", "scale"), [("rank", None, 1.0), ("constant", 4.0, 0.5), ("rslora", 4.0, 4 / 8**0.5)]
)
def test_alpha_policies_set_the_scale_of_the_update(
    tiny: Path, tmp_path: Path, policy: str, alpha: float | None, scale: float
) -> None:
    """The update is scale * B A in training and in both file formats."""
    model = configured(tiny, rank=8, alpha=alpha, alpha_policy=policy)
    add_noise_to_b(model)
    module = model.backbone.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    down, up = (getattr(module, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
    torch.testing.assert_close(module.get_delta_weight("default"), scale * up @ down)
    weights = model.weights()
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for written in (weights, weights.uniform(), weights.folded()):
        down, up = written.pairs[path]
        torch.testing.assert_close(written.alphas[path] / 8 * up @ down, module.get_delta_weight("default"))


def test_blocks_set_rank_and_alpha_of_modules(tiny: Path) -> None:
    blocks = {"denoiser.mid_block": {"rank": 6}, "denoiser": {"rank": 3, "alpha": 9}, "text_encoder": {"rank": 2}}
    model = configured(
        tiny, rank=4, alpha=5, alpha_policy="constant", blocks=blocks, targets=["cross_attention", "text_encoder"]
    )
    weights = model.weights()
    for path in weights.pairs:
        expected = (6, 5.0) if "mid_block" in path else (3, 9.0) if path.startswith("unet") else (2, 5.0)
        assert (weights.rank(path), weights.alphas[path]) == expected
    add_noise_to_b(model)
    module = model.backbone.denoiser.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    assert module.scaling["default"] == 5 / 6
    with pytest.raises(UserError, match="^method.blocks: no module below denoiser.mid gets a LoRA pair"):
        configured(tiny, blocks={"denoiser.mid": {"rank": 2}})


def test_text_encoder_has_a_separate_learning_rate(tiny: Path, images: Path) -> None:
    model = LoRA(
        backbone=Pretrained(str(tiny)), targets=["cross_attention", "text_encoder"], text_encoder_lr=1e-5,
        optimizer=adamw(1e-3),
    )  # fmt: skip
    fit(model, folder_data(images), 1)
    groups = model.trainer.optimizers[0].param_groups
    assert {g["name"]: g["initial_lr"] for g in groups} == {"denoiser": 1e-3, "text_encoder": 1e-5}


def test_alpha_and_alpha_policy_must_be_consistent(tiny: Path) -> None:
    with pytest.raises(UserError, match="add method.alpha_policy=constant"):
        LoRA(alpha=4.0)
    with pytest.raises(UserError, match="^method.alpha: missing, but method.alpha_policy=rslora needs it"):
        LoRA(alpha_policy="rslora")
