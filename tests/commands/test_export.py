"""``sdtune export``: every kind of artifact in every form, read again by the programs that it is for."""

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


def drawn(source: Pretrained) -> np.ndarray:
    return next(generate(source.load(), *IMAGE))


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one.astype(int) - other).max() <= 1)


def written(export: Export, path: Path, base: Path, folder: Path) -> Path:
    artifact = find_artifact(path, "artifact")
    export.check(artifact)
    [place, *_] = export.write(artifact, Pretrained(str(base)), folder)
    return place


# --- whole models


def test_a_single_file_has_the_authors_keys_and_no_difference(base: Path, tmp_path: Path) -> None:
    from original_files import original_tensors

    file = written(Export("single_file", dtype="fp32"), base, base, tmp_path)
    ours, theirs = load_file(file), original_tensors(base)
    extra = {"betas", "alphas_cumprod"}
    made_up = ("text_projection", "logit_scale", ".resblocks.3.")  # what no pipeline folder has of SD 2.x and SDXL
    assert set(theirs) - extra <= set(ours) <= set(theirs) | {k for k in ours if k.endswith("position_ids")}
    sd2 = any(key.startswith("cond_stage_model.model.") for key in ours)
    for key in set(theirs) - extra:
        if not ((sd2 and any(m in key for m in made_up)) or key.endswith("logit_scale")):
            assert torch.equal(ours[key], theirs[key]), key
    back = Pretrained(str(file), config=str(base)).load().state_dict()
    before = Pretrained(str(base)).load().state_dict()
    assert all(torch.equal(value, back[key]) for key, value in before.items())


def test_plain_diffusers_reads_the_single_file(base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    file = written(Export("single_file", dtype="fp32"), base, base, tmp_path)
    kind: Any = StableDiffusionXLPipeline if (base / "text_encoder_2").is_dir() else StableDiffusionPipeline
    more = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    theirs = kind.from_single_file(str(file), config=str(base), local_files_only=True, **more)
    plain = kind.from_pretrained(base, local_files_only=True, **more)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(plain, part):
            one, other = getattr(theirs, part).state_dict(), getattr(plain, part).state_dict()
            assert all(torch.equal(value, one[key]) for key, value in other.items()), part


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_pipeline_folder_is_of_the_type_that_was_asked_for(base: Path, tmp_path: Path, dtype: Any) -> None:
    folder = written(Export("pipeline", dtype=dtype), base, base, tmp_path)
    kinds = {value.dtype for file in folder.rglob("*.safetensors") for value in load_file(file).values()}
    assert kinds == {{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}
    source = Pretrained(str(folder))
    source.check()
    if dtype != "bf16":
        assert close(drawn(source), drawn(Pretrained(str(base))))


def test_a_velocity_model_is_marked_where_its_shapes_do_not_say_so(build: dict[Family, Path], tmp_path: Path) -> None:
    for family, path in build.items():
        source = Pretrained(str(path), prediction_type="v_prediction", zero_terminal_snr=True)
        [file] = Export("single_file").write(find_artifact(path, "artifact"), source, tmp_path / family)
        assert {"v_pred", "ztsnr"} <= set(load_file(file)) or family == "sd2"
        assert not (family == "sd2" and "v_pred" in load_file(file))
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.prediction_type"] == "v"


# --- LoRA


@pytest.mark.parametrize("form", ["pipeline", "single_file"])
def test_a_lora_is_merged_at_its_strength(base: Path, tmp_path: Path, form: Any) -> None:
    from sdtune.loaders import lora as adapters

    file = lora(base, tmp_path)
    place = written(Export(form, dtype="fp32", strength=0.5), file, base, tmp_path / "out")
    config = {"config": str(base)} if form == "single_file" else {}
    source = Pretrained(str(base))
    backbone = source.load()
    loaded = adapters.load_adapters(backbone, [adapters.AdapterFile(str(file))])
    with adapters.adapters_applied(backbone, loaded, [0.5]):
        wanted = next(generate(backbone, *IMAGE))
    assert close(drawn(Pretrained(str(place), **config)), wanted)
    assert not close(wanted, drawn(source))


def test_a_difference_gives_back_the_lora_that_made_it(base: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path)
    merged = written(Export("pipeline", dtype="fp32"), file, base, tmp_path / "merged")
    again = written(Export("kohya", dtype="fp32", rank=4), merged, base, tmp_path / "again")
    first, second = (
        written(Export("pipeline", dtype="fp32"), f, base, tmp_path / f.parent.name / "m") for f in (file, again)
    )
    one, other = Pretrained(str(first)).load().state_dict(), Pretrained(str(second)).load().state_dict()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4)


def test_ranks_are_reduced_to_the_nearest() -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 12, generator=rng), torch.randn(10, 8, generator=rng)
    kernel = torch.randn(8, 6, 3, 3, generator=rng), torch.randn(9, 8, 1, 1, generator=rng)
    weights = LoRAWeights({"unet.a": (down, up), "unet.b": kernel}, {"unet.a": 4.0, "unet.b": 8.0})
    less, shares = factors.reduce(weights, 3, None)
    for module, (a, b) in weights.pairs.items():
        whole = (b.flatten(1) @ a.flatten(1)) * weights.alphas[module] / 8
        values = torch.linalg.svdvals(whole)
        small_a, small_b = less.pairs[module]
        found = small_b.flatten(1) @ small_a.flatten(1)
        # Eckart & Young: what is lost is what was cut.
        torch.testing.assert_close((whole - found).norm(), values[3:].norm(), rtol=1e-4, atol=1e-4)
        assert shares[module] == pytest.approx(float(values[:3].square().sum() / values.square().sum()), abs=1e-5)
        assert small_a.shape == (3, *a.shape[1:])
    kept, _ = factors.reduce(weights, None, 0.9)
    for module in weights.pairs:
        values = (
            torch.linalg.svdvals(weights.pairs[module][1].flatten(1) @ weights.pairs[module][0].flatten(1))
            .square()
            .cumsum(0)
        )
        wanted = int((values / values[-1] < 0.9).sum()) + 1
        assert kept.rank(module) == wanted < 8


def test_kohyas_form_has_kohyas_names_and_types(base: Path, tmp_path: Path) -> None:
    file = written(Export("kohya"), lora(base, tmp_path), base, tmp_path / "out")
    tensors = load_file(file)
    assert {v.dtype for k, v in tensors.items() if not k.endswith(".alpha")} == {torch.float16}
    sdxl = (base / "text_encoder_2").is_dir()
    starts = {key.split("_")[1] for key in tensors}
    assert starts == ({"unet", "te1", "te2"} if sdxl else {"unet", "te"})
    assert any("input_blocks" in key for key in tensors) is sdxl
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["ss_base_model_version"].startswith("sdxl" if sdxl else "sd_v")
    folded = load_file(
        written(Export("kohya", alpha="folded", dtype="fp32"), lora(base, tmp_path), base, tmp_path / "f")
    )
    assert all(float(v) == 4 for k, v in folded.items() if k.endswith(".alpha"))


# --- ControlNet


def test_a_controlnet_as_one_file_is_read_by_diffusers(build: dict[Family, Path], tmp_path: Path) -> None:
    base = build["sd1"]
    model = ControlNet(backbone=Pretrained(str(base)))
    model.configure_model()
    for parameter in model.controlnet.parameters():
        parameter.data += 0.01
    model.artifact(tmp_path / "artifact", "net")
    file = written(Export("single_file", dtype="fp32"), tmp_path / "artifact", base, tmp_path / "out")
    assert all(key.startswith("control_model.") for key in load_file(file))
    theirs = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "artifact/net"), local_files_only=True)
    ours = model.controlnet.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    half = written(Export("diffusers"), tmp_path / "artifact", base, tmp_path / "half")
    assert {v.dtype for v in load_file(half / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}


# --- words


def test_words_of_two_encoders_are_one_form(build: dict[Family, Path], tmp_path: Path) -> None:
    from sdtune.backbone.new_tokens import NewToken
    from sdtune.methods import TextualInversion

    model = TextualInversion(backbone=Pretrained(str(build["sdxl"])), new_tokens=[NewToken("<cat>", "cat", 2)])
    model.configure_model()
    model.artifact(tmp_path / "artifact", "cat")
    for form in ("diffusers", "kohya"):
        tensors = load_file(written(Export(form), tmp_path / "artifact", build["sdxl"], tmp_path / form))
        assert {k: tuple(v.shape) for k, v in tensors.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
        assert {v.dtype for v in tensors.values()} == {torch.float16}


# --- the command


def test_a_run_is_exported_and_its_card_goes_along(
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
    card = (run / "artifact/README.md").read_text()
    assert card.startswith("---\n")
    assert "`sks`" in card
    assert Pretrained(str(tiny)).hash()[:16] in card
    assert str(tmp_path) not in card
    assert (run / "artifact/samples.png").is_file()
    out = tmp_path / "out"
    assert export(f"run={run}", "format=pipeline", f"hydra.run.dir={out}") == 0
    assert Pretrained(str(out / "fox-merged")).facts.side == 32
    assert "A whole Stable Diffusion, a pipeline folder in fp16: a LoRA merged into its base at 1." in (
        said := (out / "README.md").read_text()
    )
    assert "# fox-merged\n" in said
    assert "- lora\n" in card
    assert "- lora\n" not in said
    assert card[card.index("## Settings") :] == said[said.index("## Settings") :]
    assert "The LoRA in kohya's form, fp16, reduced to rank 2." in (run / "export/kohya/README.md").read_text()
    assert export(f"run={run}", "format=pipeline", f"hydra.run.dir={out}") == 2
    assert f"hydra.run.dir: {out} holds an export already" in capsys.readouterr().err
    assert export(f"run={run}", "format=single_file", "strength=0.5", f"hydra.run.dir={tmp_path}/half") == 0
    about = read_metadata(tmp_path / "half/fox-merged-0.5.safetensors")
    assert (about["sdtune_lora"], about["sdtune_strength"]) == ("fox", "0.5")
    assert about["sdtune_base_hash"] == Pretrained(str(tiny)).hash()
    assert export(f"run={run}", "format=diffusers", f"hydra.run.dir={tmp_path}/diffusers") == 0
    header = read_metadata(tmp_path / "diffusers/pytorch_lora_weights.safetensors")
    assert not [key for key in header if key.startswith(("ss_", "sshs_"))]


WRONG = {
    "neither": (["format=kohya"], "run: give the folder of a run"),
    "no run": (["run=/no/such", "format=kohya"], "run: /no/such holds no run"),
    "a form": (
        ["artifact={words}", "format=pipeline"],
        "format: a words has no form pipeline; give format=diffusers or",
    ),
    "a word": (["artifact={words}", "format=kohla"], "format"),
    "a rank": (["artifact={words}", "format=kohya", "rank=4"], "rank: only a LoRA has one"),
    "no rank": (["artifact={tiny}", "format=kohya"], "rank: a LoRA is to be extracted from a model; give rank=32"),
    "a type": (["artifact={words}", "format=kohya", "dtype=int8"], "dtype"),
    "a token": (["artifact={words}", "format=kohya", "push_to=me/it"], "push_to: HF_TOKEN is not set"),
    "a name": (["artifact={words}", "format=kohya", "push_to=it"], "push_to: it is no repository of the hub"),
    "nothing": (["artifact={empty}", "format=kohya"], "holds no LoRA, embedding, ControlNet or model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported_is_refused_at_once(
    case: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtune.formats import embeddings

    monkeypatch.delenv("HF_TOKEN", raising=False)
    embeddings.write(tmp_path / "words", {"<a>": [torch.zeros(1, 32)]}, "", {})
    (tmp_path / "empty").mkdir()
    places = {"words": tmp_path / "words", "tiny": tiny, "empty": tmp_path / "empty"}
    words, message = WRONG[case]
    out = tmp_path / "out"
    own = [f"backbone.path={tiny}", "backbone=sd15"]
    assert export(*own, *(word.format(**places) for word in words), f"hydra.run.dir={out}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_it_is_pushed_with_the_environments_token(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdtune.formats import embeddings

    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str) -> None:
            calls.append(token)

        def create_repo(self, name: str, **settings: Any) -> None:
            calls.append((name, settings))

        def upload_folder(self, **settings: Any) -> str:
            calls.append(settings)
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    embeddings.write(tmp_path / "words", {"<a>": [torch.zeros(1, 32)]}, "", {})
    own = [f"backbone.path={tiny}", "backbone=sd15", f"artifact={tmp_path / 'words'}", "format=kohya"]
    assert export(*own, "push_to=me/it", f"hydra.run.dir={tmp_path / 'out'}") == 0
    assert calls[:2] == ["hf_secret", ("me/it", {"exist_ok": True, "private": True})]
    assert calls[2]["repo_id"] == "me/it"
    assert ".hydra/*" in calls[2]["ignore_patterns"]
    said = [file.read_text() for file in (tmp_path / "out").rglob("*") if file.suffix in (".log", ".yaml")]
    assert not any("hf_secret" in text for text in said)
    assert json.dumps("done").strip('"') in capsys.readouterr().out


def test_a_lora_of_every_family_goes_round(base: Path, tmp_path: Path) -> None:
    """diffusers' form to kohya's and back: the same images."""
    file = lora(base, tmp_path)
    kohya = written(Export("kohya", dtype="fp32"), file, base, tmp_path / "k")
    back = written(Export("diffusers", dtype="fp32"), kohya, base, tmp_path / "d")
    one, other = load_file(file), load_file(back)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)
    assert LoRA.artifact_kind == "lora"


def test_frozen_layers_of_a_trained_text_encoder_are_exact(build: dict[Family, Path], tmp_path: Path) -> None:
    """Under bf16-mixed they are in half precision in memory."""
    source = Pretrained(str(build["sdxl"]))
    model = Full(backbone=source, parts=["text_encoder"])
    model.configure_model()
    model.backbone.cast_frozen("bf16-mixed")
    model.write_artifact(tmp_path, "it")
    one, other = Pretrained(str(tmp_path / "it")).load().state_dict(), source.load().state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert {v.dtype for f in (tmp_path / "it").glob("text_*/*.safetensors") for v in load_file(f).values()} == {
        torch.float32
    }


def test_a_rounded_copy_is_no_difference(build: dict[Family, Path], tmp_path: Path) -> None:
    base = build["sd1"]
    moved = Pretrained(str(base)).load()
    for parameter in moved.parameters():
        parameter.data *= 1.0001
    from sdtune.exporting.models import write_pipeline

    write_pipeline(moved, Pretrained(str(base)), tmp_path / "full", torch.float32)
    write_pipeline(moved, Pretrained(str(base)), tmp_path / "half", torch.float16)
    with pytest.raises(UserError, match=r"^artifact: .* has the weights of .*; nothing is to be extracted"):
        written(Export("kohya", rank=2), tmp_path / "half", tmp_path / "full", tmp_path / "out")


def test_what_only_one_form_has_is_refused_elsewhere(base: Path, tmp_path: Path) -> None:
    artifact = find_artifact(lora(base, tmp_path), "artifact")
    for asked, words in (
        (Export("kohya", strength=0.5), "strength: only a LoRA that is merged"),
        (Export("pipeline", alpha="folded"), "alpha: only kohya's form"),
        (Export("pipeline", rank=2), "rank: only a LoRA has one"),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            asked.check(artifact)


def test_a_single_files_settings_hold_for_the_export(build: dict[Family, Path], tmp_path: Path) -> None:
    """Of a pickle that must be allowed, with configs and a prediction type that must be named."""
    from original_files import original_tensors

    base = build["sd2"]
    torch.save(original_tensors(base), tmp_path / "it.ckpt")
    own = [f"artifact={tmp_path / 'it.ckpt'}", "backbone=sd21", f"backbone.path={base}", f"backbone.config={base}"]
    own += ["backbone.prediction_type=epsilon", "format=pipeline", f"hydra.run.dir={tmp_path / 'out'}"]
    assert export(*own) == 2
    assert export(*own, "backbone.allow_pickle=true") == 0
    assert Pretrained(str(tmp_path / "out/it")).facts.prediction_type == "epsilon"


def test_a_tokenizer_is_spelled_out_for_older_clients(base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "copy")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "copy/tokenizer" / name).unlink()
    folder = written(Export("pipeline"), tmp_path / "copy", tmp_path / "copy", tmp_path / "out")
    assert json.loads((folder / "tokenizer/vocab.json").read_text()) == json.loads(
        (base / "tokenizer/vocab.json").read_text()
    )
    assert (folder / "tokenizer/merges.txt").read_text().startswith("#version")


def test_a_lora_keeps_the_name_of_what_it_was_trained_on(build: dict[Family, Path], tmp_path: Path) -> None:
    from sdtune.formats.files import read_metadata

    weights = read_diffusers(lora(build["sd1"], tmp_path))
    file = tmp_path / "other" / diffusers_lora.FILE_NAME
    diffusers_lora.write(file, weights, {"sdtune_backbone_hash": "f" * 64})
    made = written(Export("kohya"), file, build["sd1"], tmp_path / "out")
    assert read_metadata(made)["sdtune_backbone_hash"] == "f" * 64


def test_a_controlnets_single_file_is_an_artifact_too(build: dict[Family, Path], tmp_path: Path) -> None:
    """In the authors' names, and in diffusers', as SDXL's are often kept."""
    model = ControlNet(backbone=Pretrained(str(build["sdxl"])))
    model.configure_model()
    model.artifact(tmp_path / "artifact", "net")
    whole = load_file(tmp_path / "artifact/net/diffusion_pytorch_model.safetensors")
    single = written(Export("single_file", dtype="fp32"), tmp_path / "artifact", build["sdxl"], tmp_path / "one")
    from safetensors.torch import save_file

    save_file(whole, tmp_path / "theirs.safetensors")
    for number, file in enumerate((single, tmp_path / "theirs.safetensors")):
        folder = written(Export("diffusers", dtype="fp32"), file, build["sdxl"], tmp_path / str(number))
        back = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert back.keys() == whole.keys()
        assert all(torch.equal(value, back[key]) for key, value in whole.items())
        assert ControlNetModel.from_pretrained(folder, local_files_only=True)


def test_an_export_that_fails_does_not_undo_the_run(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from running import arguments

    def fail(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(Export, "write", fail)
    run = tmp_path / "run"
    own = arguments(tiny, images, run, "trainer.max_steps=1", "exports=[{format: single_file}]")
    assert train(*own) == 0
    assert (run / "metrics.json").is_file()
    assert "exports: single_file: no room" in (run / "train.log").read_text()
    two = "exports=[{format: kohya}, {format: kohya, rank: 2}]"
    assert train(*arguments(tiny, images, tmp_path / "twice", two)) == 2
