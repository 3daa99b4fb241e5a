"""Files with NaN or infinite values are refused wherever they are read; otherwise all images would be black."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdtune
from running import adamw, export
from sdtune.backbone import Pretrained
from sdtune.backbone.new_token_vectors import initialize_tokens
from sdtune.backbone.new_tokens import NewToken
from sdtune.errors import UserError
from sdtune.formats import diffusers_lora
from sdtune.formats.files import check_finite, is_finite
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling


def damage(file: Path, value: float = float("nan")) -> str:
    """Set one value of the last tensor of ``file``; returns the tensor's name."""
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.fixture
def lora(tiny: Path, tmp_path: Path) -> Path:
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)))
    model.configure_model()
    diffusers_lora.write(tmp_path / "mine.safetensors", model.weights(), {})
    return tmp_path / "mine.safetensors"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline folder that a test may change."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("component", "value"), [("unet", float("nan")), ("vae", float("inf")), ("text_encoder", float("-inf"))]
)
def test_backbone_is_refused(copy: Path, component: str, value: float) -> None:
    [file] = (copy / component).glob("*.safetensors")
    name = damage(file, value)
    message = rf"^backbone\.path: .*{component}: NaN or infinite values in {name} \(float32\)"
    with pytest.raises(UserError, match=message):
        Pretrained(str(copy)).load()


def test_weights_that_overflow_in_half_precision_are_refused(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    name = damage(file, 1e6)
    Pretrained(str(copy)).load()
    with pytest.raises(UserError, match=rf"unet: NaN or infinite values in {name} \(float16\)"):
        Pretrained(str(copy)).load(denoiser_dtype=torch.float16)


def test_lora_is_refused_in_sampling_and_as_start_of_a_training(tiny: Path, lora: Path) -> None:
    name, source = damage(lora), Pretrained(str(tiny))
    message = rf"mine\.safetensors: NaN or infinite values in {name}"
    with pytest.raises(UserError, match=message):
        sdtune.sample("a fox", [{"path": str(lora)}], backbone=source, seeds=[0], sampling=Sampling(steps=1))
    model = LoRA(weights=str(lora), rank=2, backbone=source, optimizer=adamw(1e-3))
    with pytest.raises(UserError, match=message):
        model.configure_model()


def test_lora_is_refused_in_an_export(
    tiny: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = damage(lora)
    arguments = [f"artifact={lora}", "backbone=sd15", f"backbone.path={tiny}", "format=kohya"]
    assert export(*arguments, f"hydra.run.dir={tmp_path}/export") == 2
    assert f"NaN or infinite values in {name}" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_embedding_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.safetensors"
    save_file({"emb_params": torch.full((1, 32), float("inf"))}, file)
    with pytest.raises(UserError, match=r"cat\.safetensors: NaN or infinite values in emb_params"):
        initialize_tokens(Pretrained(str(tiny)).load(), [NewToken("<cat>", weights=str(file))])


def test_eight_bit_floating_point_is_checked() -> None:
    values = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    check_finite({"a": values[:1], "b": torch.tensor([1, 2])}, "file")
    with pytest.raises(UserError, match=r"^file: NaN or infinite values in a \(float8_e4m3fn\)"):
        check_finite({"a": values}, "file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_of_many_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.linspace(-60_000, 60_000, 4_099).to(dtype)
    assert is_finite(values)
    assert is_finite(values.reshape(1, -1, 1).expand(2, -1, 2))
    assert is_finite(values[:0])
    for place in (0, 1_000, 4_098):
        damaged = values.clone()
        damaged[place] = value
        assert not is_finite(damaged)


def test_parameters_are_checked_without_a_warning() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_finite(torch.nn.Parameter(torch.ones(3)))
    finally:
        torch.set_warn_always(False)
