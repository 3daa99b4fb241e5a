"""Quantized weights: equal to the same model with dequantized weights, in training and when generating images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from families import build_family
from lora_files import lora
from method_cases import METHODS, Case
from running import Spy, arguments, fit, plan, train
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import Quantization
from sdtune.backbone.layers import layers
from sdtune.backbone.quantization import Quantized, check_quantization, quantize
from sdtune.errors import UserError
from sdtune.loaders.artifact import artifacts_applied
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.methods import base
from sdtune.sampling.load import load_to_generate

FORMATS = get_args(Quantization)
every_format = pytest.mark.parametrize("quantization", FORMATS)


def quantized(source: Pretrained, quantization: Quantization) -> Backbone:
    backbone = source.load()
    quantize(backbone, quantization)
    return backbone


def dequantize(backbone: Backbone) -> Backbone:
    """Copy of ``backbone`` with the dequantized weights in plain layers."""
    dense = copy.deepcopy(backbone)
    for _, _, layer in list(layers(dense)):
        if isinstance(layer, Quantized):
            weight = layer.weight
            for name in ("packed", "scales", "weight"):
                layer._parameters.pop(name, None)
            layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return dense


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def prediction(backbone: Backbone, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    text = backbone.encode_text(["a word", "another"]).cast(dtype)
    noisy = torch.randn(2, 4, 8, 8, generator=rng, dtype=torch.float32).to(dtype)
    return backbone.predict(noisy, torch.tensor([10, 900]), text)


# --- layers


@every_format
def test_weights_are_stored_in_few_bytes_and_close_to_the_original(tiny: Path, quantization: Quantization) -> None:
    source = Pretrained(str(tiny))
    originals = {name: layer.weight for _, name, layer in layers(source.load())}
    largest, bits = {"fp8": (0.03, 8), "int8": (0.01, 8), "nf4": (0.11, 4)}[quantization]
    found = {name: layer for _, name, layer in layers(quantized(source, quantization)) if isinstance(layer, Quantized)}
    kinds = {type(layer).__name__ for layer in found.values()}
    assert kinds == ({"QuantizedLinear", "QuantizedConv2d"} if quantization == "fp8" else {"QuantizedLinear"})
    assert "conv_in" not in found
    assert "conv_out" not in found
    assert "time_embedding.linear_1" not in found
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in found
    for name, layer in found.items():
        error = layer.weight - originals[name]
        assert error.norm() < largest * originals[name].norm()
        assert layer.weight.shape == originals[name].shape
        assert layer.packed.numel() == layer.weight.numel() * bits // 8
        assert not layer.weight.requires_grad


def test_scaled_fp8_represents_small_weights_better_than_a_plain_cast() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 320) * 0.01  # typical of an attention layer of SD 1.5
    layer = nn.Linear(320, 64, bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    from sdtune.backbone.quantization import _quantize_layer

    _quantize_layer(layer, "fp8")
    plain = weight.to(torch.float8_e4m3fn).float()
    assert (layer.weight - weight).norm() < 0.5 * (plain - weight).norm()
    assert torch.equal(layer.weight.bfloat16(), layer.dequantized(torch.bfloat16))  # exact in bfloat16


@every_format
def test_cast_of_the_model_does_not_change_quantized_weights(tiny: Path, quantization: Quantization) -> None:
    backbone = quantized(Pretrained(str(tiny)), quantization)
    quantized_layers = {name: layer for _, name, layer in layers(backbone) if isinstance(layer, Quantized)}
    before = {name: layer.dequantized(torch.float32) for name, layer in quantized_layers.items()}
    backbone.to(torch.bfloat16)
    backbone.cast_frozen("bf16-mixed")
    after = {name: layer.dequantized(torch.float32) for name, layer in quantized_layers.items()}
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_format
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_prediction_equals_that_of_the_dequantized_model(
    quantization: Quantization, family: Any, tmp_path: Path
) -> None:
    backbone = quantized(Pretrained(str(build_family(tmp_path / "model", family))), quantization)
    with torch.no_grad():
        assert relative(prediction(backbone), prediction(dequantize(backbone))) < 1e-5


@every_format
def test_quantized_weights_do_not_depend_on_the_dtype_of_the_model(tiny: Path, quantization: Quantization) -> None:
    one = quantized(Pretrained(str(tiny)), quantization)
    backbone = Pretrained(str(tiny)).load(denoiser_dtype=torch.bfloat16)
    backbone.cast_frozen("bf16-mixed")
    quantize(backbone, quantization)
    for (_, name, layer), (_, _, other) in zip(layers(one), layers(backbone), strict=True):
        if isinstance(layer, Quantized):
            assert torch.equal(layer.packed, other.packed), name
            assert (layer.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)


def test_merged_weight_moves_and_is_cast_with_its_layer(tiny: Path) -> None:
    """Text encoders are moved to the device after a LoRA is merged, and back."""
    backbone = quantized(Pretrained(str(tiny)), "fp8")
    layer = next(part for _, _, part in layers(backbone) if isinstance(part, Quantized))
    layer.dense = layer.weight
    backbone.to(torch.bfloat16)
    assert layer.weight.dtype == layer.dtype == layer.dense.dtype == torch.bfloat16
    backbone.to("meta")
    assert layer.weight.is_meta
    layer.dense = None
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16


@every_format
def test_half_precision_uses_the_weights_in_half_precision(tiny: Path, quantization: Quantization) -> None:
    backbone = load_to_generate(Pretrained(str(tiny), quantize=quantization), torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        out = prediction(backbone, torch.bfloat16)
        assert out.dtype == torch.bfloat16
        assert relative(out.float(), prediction(dequantize(backbone), torch.bfloat16).float()) < 0.05


# --- training


CASES = [Case(name) for name in METHODS if name in ("lora", "textual_inversion", "controlnet")]
CASES.append(Case("lora", {"targets": ["cross_attention", "feed_forward", "convolutions", "text_encoder"]}))


QUICK = {("lora", "fp8"), ("textual_inversion", "int8"), ("controlnet", "nf4")}


@pytest.mark.parametrize(
    ("case", "quantization"),
    [
        pytest.param(case, name, id=f"{case}-{name}", marks=() if (str(case), name) in QUICK else pytest.mark.slow)
        for case in CASES
        for name in FORMATS
    ],
)
def test_training_equals_that_of_the_dequantized_model(
    case: Case, quantization: Quantization, tiny: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(checkpointing: bool = False) -> dict[str, Tensor]:
        spy = Spy()
        # small steps, which do not make the gradients of the last one depend on rounding errors
        model = case.model(tiny, lr=1e-4, gradient_checkpointing=checkpointing)
        model.source.quantize = quantization
        fit(model, case.data(tiny, images), 3, [spy], precision="32-true")
        return spy.gradients[-1]

    one, checkpointed = gradients(), gradients(checkpointing=True)

    def dense_quantize(backbone: Backbone, quantization: Quantization) -> None:
        quantize(backbone, quantization)
        dense = {(component, name): layer for component, name, layer in layers(dequantize(backbone))}
        for component, name, layer in list(layers(backbone)):
            if isinstance(layer, Quantized):
                parent, _, child = name.rpartition(".")
                setattr(getattr(backbone, component).get_submodule(parent), child, dense[component, name])

    monkeypatch.setattr(base, "quantize", dense_quantize)
    other = gradients()
    assert one.keys() == other.keys()
    assert any(gradient.any() for gradient in one.values())
    scale = max(float(gradient.abs().max()) for gradient in other.values())
    for name in one:
        assert (one[name] - other[name]).abs().max() < 1e-5 * scale, name
        assert (checkpointed[name] - other[name]).abs().max() < 1e-5 * scale, name


@every_format
def test_graph_keeps_no_dequantized_weight(tiny: Path, quantization: Quantization) -> None:
    """Autograd saves only activations, so that memory does not grow with the weights."""
    backbone = quantized(Pretrained(str(tiny)), quantization)
    sizes: list[int] = []
    shapes = {tuple(layer.weight.shape) for _, _, layer in layers(backbone) if isinstance(layer, Quantized)}
    rows = {shape[::-1] for shape in shapes if len(shape) == 2} | shapes

    def record(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape) in rows and tensor.is_floating_point())
        return tensor

    layer = next(part for _, _, part in layers(backbone) if isinstance(part, Quantized))
    x = torch.randn(3, layer.weight.shape[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x if isinstance(layer, nn.Linear) else x[:, :, None, None]).sum().backward()
    assert not any(sizes)
    assert x.grad is not None


# --- adapters


@every_format
def test_merged_lora_makes_layers_dense_and_is_removed_exactly(
    tiny: Path, tmp_path: Path, quantization: Quantization
) -> None:
    backbone = quantized(Pretrained(str(tiny)), quantization)
    reference, file = dequantize(backbone), AdapterFile(str(lora(tiny, tmp_path / "lora")))
    with torch.no_grad():
        before = prediction(backbone)
        for strength in (1.0, 0.5):
            outputs = []
            for model in (backbone, reference):
                with artifacts_applied(model, load_adapters(model, [file], Pretrained(str(tiny))), strength):
                    outputs.append(prediction(model))
            assert relative(*outputs) < 1e-5
            assert relative(outputs[0], before) > 1e-3
        assert torch.equal(prediction(backbone), before)


# --- checks and plan


def test_methods_that_train_the_model_refuse_it() -> None:
    for component in ("denoiser", "text_encoder"):
        with pytest.raises(UserError, match=r"backbone.quantize: got fp8, but this method trains the model's weights"):
            check_quantization("fp8", (component,))
    check_quantization(None, ("denoiser",))


def test_controlnet_that_trains_the_unet_refuses_it(tiny: Path, images: Path) -> None:
    case = Case("controlnet", {"denoiser": "decoder"})
    model, data = case.model(tiny), case.data(tiny, images)
    model.source.quantize = "fp8"
    with pytest.raises(UserError, match=r"backbone.quantize"):
        model.check_data(data)


def test_nf4_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="nf4 needs bitsandbytes"):
        check_quantization("nf4", ())
    check_quantization("int8", ())


def test_dreambooth_is_refused_before_weights_are_loaded(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [o for o in arguments(tiny, images, tmp_path / "run") if not o.startswith("method")]
    assert train(*overrides, "method=dreambooth", "data.class_prompt=a dog", "backbone.quantize=nf4") == 2
    assert not (tmp_path / "run").exists()
    assert "backbone.quantize: got nf4, but this method trains the model's weights" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_counts_quantized_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """859.5 M parameters at 2 bytes; with fp8 nearly all at 1; int8 and nf4 leave the convolutions at 2."""
    mib = {}
    for value in ("null", *FORMATS):
        assert plan("backbone=sd15", "hardware=gpu", f"backbone.quantize={value}") == 0
        row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("denoiser"))
        assert row[1:3] == ["859,520,964", "1,594,368"]
        mib[value] = float(row[4]) * (1024 if row[5] == "GiB" else 1)
    assert mib["null"] == pytest.approx(1644, abs=10)
    assert mib["fp8"] == pytest.approx(836, abs=20)
    assert mib["fp8"] < mib["nf4"] < mib["int8"] < mib["null"]
