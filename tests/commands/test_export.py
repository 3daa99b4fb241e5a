"""``sdtune export``: each kind of artifact in each format, loaded by the programs that read the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from families import EACH, FAMILIES, Family, build_family
from lora_files import lora, read_diffusers
from running import export, train
from sdtune.backbone import Pretrained
from sdtune.errors import UserError
from sdtune.exporting import Export, find_artifact
from sdtune.formats import LoRAWeights, diffusers_lora, factors
from sdtune.formats.files import read_metadata
from sdtune.methods import ControlNet, Full, LoRA
from sdtune.sampling.loop import Request, Sampling, generate

IMAGE = (Request("a cat", 1),), Sampling(steps=2)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: build_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=EACH)
def base(request: pytest.FixtureRequest, build: dict[Family, Path]) -> Path:
    return build[request.param]


def generated(source: Pretrained) -> np.ndarray:
    return next(generate(source.load(), *IMAGE))


def close(image: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(image.astype(int) - other).max() <= 1)


def written(export: Export, path: Path, base: Path, folder: Path) -> Path:
    """Export the artifact ``path`` to ``folder``; return the first file or folder that is written."""
    artifact = find_artifact(path, "artifact")
    export.check(artifact)
    [first, *_] = export.write(artifact, Pretrained(str(base)), folder)
    return first


# --- full models


def test_single_file_has_the_original_keys_and_values(base: Path, tmp_path: Path) -> None:
    from original_files import original_tensors

    file = written(Export("single_file", dtype="fp32"), base, base, tmp_path)
    exported, original = load_file(file), original_tensors(base)
    extra = {"betas", "alphas_cumprod"}
    # Pipeline folders of SD 2.x and SDXL do not contain these tensors, so the export fills them in.
    filled_in = ("text_projection", "logit_scale", ".resblocks.3.")
    assert set(original) - extra <= set(exported) <= set(original) | {k for k in exported if k.endswith("position_ids")}
    sd2 = any(key.startswith("cond_stage_model.model.") for key in exported)
    for key in set(original) - extra:
        if not ((sd2 and any(part in key for part in filled_in)) or key.endswith("logit_scale")):
            assert torch.equal(exported[key], original[key]), key
    loaded = Pretrained(str(file), config=str(base)).load().state_dict()
    base_weights = Pretrained(str(base)).load().state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in base_weights.items())


def test_diffusers_loads_the_single_file(base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    file = written(Export("single_file", dtype="fp32"), base, base, tmp_path)
    kind: Any = StableDiffusionXLPipeline if (base / "text_encoder_2").is_dir() else StableDiffusionPipeline
    more = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    from_file = kind.from_single_file(str(file), config=str(base), local_files_only=True, **more)
    from_folder = kind.from_pretrained(base, local_files_only=True, **more)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(from_folder, part):
            loaded, expected = getattr(from_file, part).state_dict(), getattr(from_folder, part).state_dict()
            assert all(torch.equal(value, loaded[key]) for key, value in expected.items()), part


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_pipeline_folder_has_the_requested_dtype(base: Path, tmp_path: Path, dtype: Any) -> None:
    folder = written(Export("pipeline", dtype=dtype), base, base, tmp_path)
    dtypes = {value.dtype for file in folder.rglob("*.safetensors") for value in load_file(file).values()}
    assert dtypes == {{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}
    source = Pretrained(str(folder))
    source.check()
    if dtype != "bf16":
        assert close(generated(source), generated(Pretrained(str(base))))


def test_v_prediction_is_marked_in_files_whose_shapes_do_not_imply_it(
    build: dict[Family, Path], tmp_path: Path
) -> None:
    for family, path in build.items():
        source = Pretrained(str(path), prediction_type="v_prediction", zero_terminal_snr=True)
        [file] = Export("single_file").write(find_artifact(path, "artifact"), source, tmp_path / family)
        assert {"v_pred", "ztsnr"} <= set(load_file(file)) or family == "sd2"
        assert not (family == "sd2" and "v_pred" in load_file(file))
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.prediction_type"] == "v"


# --- LoRA


@pytest.mark.parametrize("format_name", ["pipeline", "single_file"])
def test_lora_is_merged_with_its_strength(base: Path, tmp_path: Path, format_name: Any) -> None:
    from sdtune.loaders.artifact import artifacts_applied
    from sdtune.loaders.lora import AdapterFile, load_adapters

    file = lora(base, tmp_path)
    exported = written(Export(format_name, dtype="fp32", strength=0.5), file, base, tmp_path / "out")
    config = {"config": str(base)} if format_name == "single_file" else {}
    source = Pretrained(str(base))
    backbone = source.load()
    with artifacts_applied(backbone, load_adapters(backbone, [AdapterFile(str(file), 0.5)], source)):
        expected = next(generate(backbone, *IMAGE))
    assert close(generated(Pretrained(str(exported), **config)), expected)
    assert not close(expected, generated(source))


def test_lora_extracted_from_a_merged_model_equals_the_merged_lora(base: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path)
    merged = written(Export("pipeline", dtype="fp32"), file, base, tmp_path / "merged")
    extracted = written(Export("kohya", dtype="fp32", rank=4), merged, base, tmp_path / "extracted")
    first, second = (
        written(Export("pipeline", dtype="fp32"), f, base, tmp_path / f.parent.name / "m") for f in (file, extracted)
    )
    expected, weights = Pretrained(str(first)).load().state_dict(), Pretrained(str(second)).load().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-4)


def test_reduced_lora_is_the_best_approximation_of_its_rank() -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 12, generator=rng), torch.randn(10, 8, generator=rng)
    kernel = torch.randn(8, 6, 3, 3, generator=rng), torch.randn(9, 8, 1, 1, generator=rng)
    weights = LoRAWeights({"unet.a": (down, up), "unet.b": kernel}, {"unet.a": 4.0, "unet.b": 8.0})
    reduced, shares = factors.reduce(weights, 3, None)
    for module, (a, b) in weights.pairs.items():
        full = (b.flatten(1) @ a.flatten(1)) * weights.alphas[module] / 8
        values = torch.linalg.svdvals(full)
        small_a, small_b = reduced.pairs[module]
        approximation = small_b.flatten(1) @ small_a.flatten(1)
        # Eckart-Young theorem: the error is the norm of the removed singular values.
        torch.testing.assert_close((full - approximation).norm(), values[3:].norm(), rtol=1e-4, atol=1e-4)
        assert shares[module] == pytest.approx(float(values[:3].square().sum() / values.square().sum()), abs=1e-5)
        assert small_a.shape == (3, *a.shape[1:])
    by_energy, _ = factors.reduce(weights, None, 0.9)
    for module in weights.pairs:
        values = (
            torch.linalg.svdvals(weights.pairs[module][1].flatten(1) @ weights.pairs[module][0].flatten(1))
            .square()
            .cumsum(0)
        )
        expected_rank = int((values / values[-1] < 0.9).sum()) + 1
        assert by_energy.rank(module) == expected_rank < 8


def test_kohya_format_has_the_names_and_dtypes_of_kohya(base: Path, tmp_path: Path) -> None:
    file = written(Export("kohya"), lora(base, tmp_path), base, tmp_path / "out")
    tensors = load_file(file)
    assert {v.dtype for k, v in tensors.items() if not k.endswith(".alpha")} == {torch.float16}
    sdxl = (base / "text_encoder_2").is_dir()
    prefixes = {key.split("_")[1] for key in tensors}
    assert prefixes == ({"unet", "te1", "te2"} if sdxl else {"unet", "te"})
    assert any("input_blocks" in key for key in tensors) is sdxl
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"].startswith("sdxl" if sdxl else "sd_v")
    folded = load_file(
        written(Export("kohya", alpha="folded", dtype="fp32"), lora(base, tmp_path), base, tmp_path / "f")
    )
    assert all(float(v) == 4 for k, v in folded.items() if k.endswith(".alpha"))


# --- ControlNet


def test_diffusers_loads_a_controlnet_from_a_single_file(build: dict[Family, Path], tmp_path: Path) -> None:
    base = build["sd1"]
    model = ControlNet(backbone=Pretrained(str(base)))
    model.configure_model()
    for parameter in model.controlnet.parameters():
        parameter.data += 0.01
    model.artifact(tmp_path / "artifact", "net")
    file = written(Export("single_file", dtype="fp32"), tmp_path / "artifact", base, tmp_path / "out")
    assert all(key.startswith("control_model.") for key in load_file(file))
    loaded = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "artifact/net"), local_files_only=True)
    trained = model.controlnet.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.state_dict().items())
    half_precision = written(Export("diffusers"), tmp_path / "artifact", base, tmp_path / "half")
    assert {v.dtype for v in load_file(half_precision / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }


# --- embeddings of new tokens


def test_embeddings_of_two_text_encoders_have_the_same_file_layout_in_both_formats(
    build: dict[Family, Path], tmp_path: Path
) -> None:
    from sdtune.backbone.new_tokens import NewToken
    from sdtune.methods import TextualInversion

    model = TextualInversion(backbone=Pretrained(str(build["sdxl"])), new_tokens=[NewToken("<cat>", "cat", 2)])
    model.configure_model()
    model.artifact(tmp_path / "artifact", "cat")
    for format_name in ("diffusers", "kohya"):
        tensors = load_file(written(Export(format_name), tmp_path / "artifact", build["sdxl"], tmp_path / format_name))
        assert {k: tuple(v.shape) for k, v in tensors.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
        assert {v.dtype for v in tensors.values()} == {torch.float16}


# --- the command


def test_run_is_exported_with_its_model_card(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = [f"backbone.path={tiny}", "backbone=sd15", "data=folder", f"data.path={images}", "data.prompt=a fox"]
    code = train(
        *common, "trainer.max_steps=2", "evaluation=none", "callbacks.samples.sampling.steps=1", "hardware=cpu",
        "name=fox", "data.trigger=sks", f"hydra.run.dir={run}",
        'exports=[{format: single_file}, {format: kohya, rank: 2}]',
    )  # fmt: skip
    assert code == 0
    assert (run / "export/single_file/fox-merged.safetensors").is_file()
    assert {
        v.shape[0] for k, v in load_file(run / "export/kohya/fox.safetensors").items() if k.endswith("lora_down.weight")
    } == {2}
    card = (run / "artifact/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "`sks`" in card
    assert Pretrained(str(tiny)).hash()[:16] in card
    assert str(tmp_path) not in card
    assert (run / "artifact/samples.png").is_file()
    out = tmp_path / "out"
    config = run / ".hydra" / "config.yaml"
    saved = config.read_text(encoding="utf-8")
    config.write_text(saved.replace(str(tiny), "/moved"), encoding="utf-8")
    assert export(f"run={run}", "format=pipeline", f"hydra.run.dir={out}") == 2
    assert "backbone.path: /moved does not exist" in capsys.readouterr().err
    assert export(f"run={run}", "format=pipeline", f"backbone.path={tiny}", f"hydra.run.dir={out}") == 0
    config.write_text(saved, encoding="utf-8")
    assert Pretrained(str(out / "fox-merged")).facts.side == 32
    assert "A full Stable Diffusion model in a pipeline folder, fp16: a LoRA merged into its base model" in (
        exported_card := (out / "README.md").read_text(encoding="utf-8")
    )
    assert "# fox-merged\n" in exported_card
    assert "- lora\n" in card
    assert "- lora\n" not in exported_card
    assert "| LoRA | rank 8, alpha 8.0 |" in card
    assert "| use | diffusers: `pipe.load_lora_weights(FOLDER)`" in card
    assert "| use | diffusers: `DiffusionPipeline.from_pretrained('fox-merged')` |" in exported_card
    assert card[card.index("## Settings") :] == exported_card[exported_card.index("## Settings") :]
    assert "The LoRA in kohya format, fp16, reduced to rank 2." in (run / "export/kohya/README.md").read_text(
        encoding="utf-8"
    )
    assert export(f"run={run}", "format=pipeline", f"hydra.run.dir={out}") == 2
    assert f"hydra.run.dir: {out} already contains an export" in capsys.readouterr().err
    assert export(f"run={run}", "format=single_file", "strength=0.5", f"hydra.run.dir={tmp_path}/half") == 0
    metadata = read_metadata(tmp_path / "half/fox-merged-0.5.safetensors")
    assert (metadata["sdtune_lora"], metadata["sdtune_strength"]) == ("fox", "0.5")
    assert metadata["sdtune_base_hash"] == Pretrained(str(tiny)).hash()
    assert export(f"run={run}", "format=diffusers", f"hydra.run.dir={tmp_path}/diffusers") == 0
    header = read_metadata(tmp_path / "diffusers/pytorch_lora_weights.safetensors")
    assert not [key for key in header if key.startswith(("ss_", "sshs_"))]


INVALID = {
    "neither run nor artifact": (["format=kohya"], "run: exactly one of run and artifact is required"),
    "missing run": (["run=/no/such", "format=kohya"], "run: /no/such is not a run folder"),
    "format of another kind": (
        ["artifact={words}", "format=pipeline"],
        "format: an artifact of kind embeddings has no format pipeline; set format=diffusers or",
    ),
    "unknown format": (["artifact={words}", "format=kohla"], "format"),
    "rank of an embedding": (
        ["artifact={words}", "format=kohya", "rank=4"],
        "rank: applies only to a LoRA; remove rank",
    ),
    "no rank": (["artifact={tiny}", "format=kohya"], "rank: required to extract a LoRA from a model; set rank=32"),
    "unknown dtype": (["artifact={words}", "format=kohya", "dtype=int8"], "dtype"),
    "no token": (["artifact={words}", "format=kohya", "push_to=me/it"], "push_to: no login of the Hugging Face Hub"),
    "invalid repository": (
        ["artifact={words}", "format=kohya", "push_to=it"],
        "push_to: it is not a repository of the Hugging Face Hub",
    ),
    "empty folder": (["artifact={empty}", "format=kohya"], "no LoRA, embedding, ControlNet or model in"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_export_is_refused_before_a_folder_is_created(
    case: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtune.formats import embeddings

    monkeypatch.delenv("HF_TOKEN", raising=False)
    embeddings.write(tmp_path / "words", {"<a>": [torch.zeros(1, 32)]}, "", {})
    (tmp_path / "empty").mkdir()
    paths = {"words": tmp_path / "words", "tiny": tiny, "empty": tmp_path / "empty"}
    overrides, message = INVALID[case]
    out = tmp_path / "out"
    backbone = [f"backbone.path={tiny}", "backbone=sd15"]
    assert export(*backbone, *(override.format(**paths) for override in overrides), f"hydra.run.dir={out}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_lora_of_each_family_survives_a_round_trip_through_kohya_format(base: Path, tmp_path: Path) -> None:
    """diffusers format to kohya format and back: the same tensors."""
    file = lora(base, tmp_path)
    kohya = written(Export("kohya", dtype="fp32"), file, base, tmp_path / "k")
    converted = written(Export("diffusers", dtype="fp32"), kohya, base, tmp_path / "d")
    expected, tensors = load_file(file), load_file(converted)
    assert expected.keys() == tensors.keys()
    for key, value in expected.items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-5, atol=1e-6)
    assert LoRA.artifact_kind == "lora"


def test_frozen_layers_of_a_trained_text_encoder_are_exported_exactly(
    build: dict[Family, Path], tmp_path: Path
) -> None:
    """With bf16-mixed these layers are in half precision in memory."""
    source = Pretrained(str(build["sdxl"]))
    model = Full(backbone=source, parts=["text_encoder"])
    model.configure_model()
    model.backbone.cast_frozen("bf16-mixed")
    model.write_artifact(tmp_path, "it")
    exported, expected = Pretrained(str(tmp_path / "it")).load().state_dict(), source.load().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in exported.items())
    assert {v.dtype for f in (tmp_path / "it").glob("text_*/*.safetensors") for v in load_file(f).values()} == {
        torch.float32
    }


def test_lora_of_a_model_rounded_to_half_precision_is_refused(build: dict[Family, Path], tmp_path: Path) -> None:
    base = build["sd1"]
    changed = Pretrained(str(base)).load()
    for parameter in changed.parameters():
        parameter.data *= 1.0001
    from sdtune.exporting.models import write_pipeline

    write_pipeline(changed, Pretrained(str(base)), tmp_path / "full", torch.float32)
    write_pipeline(changed, Pretrained(str(base)), tmp_path / "half", torch.float16)
    with pytest.raises(UserError, match=r"^artifact: nothing to extract: .* has the weights of "):
        written(Export("kohya", rank=2), tmp_path / "half", tmp_path / "full", tmp_path / "out")


def test_settings_of_one_format_are_refused_for_other_formats(base: Path, tmp_path: Path) -> None:
    artifact = find_artifact(lora(base, tmp_path), "artifact")
    for export_settings, message in (
        (Export("kohya", strength=0.5), "strength: applies only to a LoRA that is merged"),
        (Export("pipeline", alpha="folded"), "alpha: folded applies only to a LoRA in kohya format"),
        (Export("pipeline", rank=2), "rank: applies only to a LoRA"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            export_settings.check(artifact)


def test_settings_of_a_pickled_single_file_apply_to_the_export(build: dict[Family, Path], tmp_path: Path) -> None:
    """A pickle must be allowed, and its configs and prediction type must be set."""
    from original_files import original_tensors

    base = build["sd2"]
    torch.save(original_tensors(base), tmp_path / "it.ckpt")
    command = [f"artifact={tmp_path / 'it.ckpt'}", "backbone=sd21", f"backbone.path={base}", f"backbone.config={base}"]
    command += ["backbone.prediction_type=epsilon", "format=pipeline", f"hydra.run.dir={tmp_path / 'out'}"]
    assert export(*command) == 2
    assert export(*command, "backbone.allow_pickle=true") == 0
    assert Pretrained(str(tmp_path / "out/it")).facts.prediction_type == "epsilon"


def test_tokenizer_files_for_older_programs_are_exported(base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "copy")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "copy/tokenizer" / name).unlink()
    folder = written(Export("pipeline"), tmp_path / "copy", tmp_path / "copy", tmp_path / "out")
    assert json.loads((folder / "tokenizer/vocab.json").read_text(encoding="utf-8")) == json.loads(
        (base / "tokenizer/vocab.json").read_text(encoding="utf-8")
    )
    assert (folder / "tokenizer/merges.txt").read_text(encoding="utf-8").startswith("#version")


def test_export_keeps_the_backbone_hash_of_a_lora(build: dict[Family, Path], tmp_path: Path) -> None:
    from sdtune.formats.files import read_metadata

    weights = read_diffusers(lora(build["sd1"], tmp_path))
    file = tmp_path / "other" / diffusers_lora.FILE_NAME
    diffusers_lora.write(file, weights, {"sdtune_backbone_hash": "f" * 64})
    exported = written(Export("kohya"), file, build["sd1"], tmp_path / "out")
    assert read_metadata(exported)["sdtune_backbone_hash"] == "f" * 64


def test_single_file_of_a_controlnet_can_be_exported(build: dict[Family, Path], tmp_path: Path) -> None:
    """With the original tensor names and with those of diffusers, which are common for SDXL."""
    model = ControlNet(backbone=Pretrained(str(build["sdxl"])))
    model.configure_model()
    model.artifact(tmp_path / "artifact", "net")
    trained = load_file(tmp_path / "artifact/net/diffusion_pytorch_model.safetensors")
    single = written(Export("single_file", dtype="fp32"), tmp_path / "artifact", build["sdxl"], tmp_path / "one")
    from safetensors.torch import save_file

    save_file(trained, tmp_path / "diffusers.safetensors")
    for number, file in enumerate((single, tmp_path / "diffusers.safetensors")):
        folder = written(Export("diffusers", dtype="fp32"), file, build["sdxl"], tmp_path / str(number))
        exported = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert exported.keys() == trained.keys()
        assert all(torch.equal(value, exported[key]) for key, value in trained.items())
        assert ControlNetModel.from_pretrained(folder, local_files_only=True)


def test_failed_export_does_not_fail_the_run(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from running import arguments

    def fail(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(Export, "write", fail)
    run = tmp_path / "run"
    command = arguments(tiny, images, run, "trainer.max_steps=1", "exports=[{format: single_file}]")
    assert train(*command) == 0
    assert (run / "metrics.json").is_file()
    assert "exports: single_file: no room" in (run / "train.log").read_text(encoding="utf-8")
    duplicate = "exports=[{format: kohya}, {format: kohya, rank: 2}]"
    assert train(*arguments(tiny, images, tmp_path / "twice", duplicate)) == 2
