"""``sdtune export`` as it is, with model card, previews and thumbnail; upload to a server on this machine."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hub_server import Hub
from running import export, train
from sdtune.formats import embeddings
from sdtune.formats.files import read_metadata


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of two captions with "sks fox", with previews, snapshots and a held-out image."""
    folder = tmp_path_factory.mktemp("run")
    images = folder / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a photo of sks fox, tag{number}, red", encoding="utf-8")
    code = train(
        *(f"backbone.path={tiny}", "backbone=sd15", "data=folder", f"data.path={images}", "data.hold_out=3"),
        *("trainer.max_steps=2", "trainer.val_check_interval=1", "evaluation=none", "hardware=cpu", "name=fox"),
        *("callbacks.samples.sampling.steps=1", "save_every=1", "optimizer.lr=2e-4", "backbone.clip_skip=1"),
        f"hydra.run.dir={folder / 'run'}",
    )
    assert code == 0
    return folder / "run"


def test_header_of_a_lora_has_the_fields_that_programs_show(run: Path) -> None:
    header = read_metadata(run / "artifact" / "fox.safetensors")
    assert header["modelspec.trigger_phrase"] == "sks fox"
    [(folder, tags)] = json.loads(header["ss_tag_frequency"]).items()
    assert folder == "images"
    assert tags["a photo of sks fox"] == tags["red"] == 2, "one of three images is held out"
    assert sum(tags.values()) == 6
    assert header["ss_num_train_images"] == "2"
    assert (header["ss_learning_rate"], header["ss_unet_lr"], header["ss_text_encoder_lr"]) == (
        "0.0002",
        "0.0002",
        "None",
    )
    assert header["ss_clip_skip"] == "2", "kohya counts from 1"


def test_card_names_the_trigger_of_the_captions(run: Path) -> None:
    card = ModelCard((run / "artifact" / "README.md").read_text(encoding="utf-8"))
    assert "| trigger words | `sks fox` |" in card.text
    assert card.data.instance_prompt == "sks fox"


def test_artifact_is_exported_as_it_is_without_snapshots(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(f"run={run}", f"hydra.run.dir={out}") == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and not file.match(".hydra/*")}
    assert names - {"export.log", ".lock"} == {
        "fox.safetensors",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "samples.png",
        "samples/000.png",
        "samples/001.png",
    }
    assert (out / "fox.safetensors").read_bytes() == (run / "artifact" / "fox.safetensors").read_bytes()
    card = ModelCard((out / "README.md").read_text(encoding="utf-8"))
    shown = card.data.to_dict()["widget"]
    assert shown[0]["output"] == {"url": "samples/000.png"}
    assert "sks fox" in shown[0]["text"]


def test_single_artifact_file_is_exported_as_it_is(run: Path, tiny: Path, tmp_path: Path) -> None:
    file, out = run / "artifact" / "fox.safetensors", tmp_path / "out"
    assert export(f"artifact={file}", f"backbone.path={tiny}", "backbone=sd15", f"hydra.run.dir={out}") == 0
    assert (out / "fox.safetensors").read_bytes() == file.read_bytes()


def test_thumbnail_is_in_the_header(run: Path, tmp_path: Path) -> None:
    for name, target in (("kohya", "fox"), ("single_file", "fox-merged")):
        out = tmp_path / name
        assert export(f"run={run}", f"format={name}", "thumbnail=true", f"hydra.run.dir={out}") == 0
        value = read_metadata(out / f"{target}.safetensors")["modelspec.thumbnail"]
        assert value.startswith("data:image/jpeg;base64,")
        with Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))) as image:
            assert image.size == (32, 32)
    assert export(f"run={run}", "format=kohya", f"hydra.run.dir={tmp_path / 'plain'}") == 0
    header = read_metadata(tmp_path / "plain" / "fox.safetensors")
    assert "modelspec.thumbnail" not in header
    assert header["ss_num_train_images"] == "2", "fields of the training are kept"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strength=0.5"], "strength: applies only to an export in another format; set format=kohya"),
        (["thumbnail=true"], "thumbnail: applies only to an export in another format"),
        (["format=diffusers", "thumbnail=true"], "thumbnail: applies only to a LoRA or a model in a single file"),
        (["dry_run=true"], "dry_run: applies only to an upload; set push_to=USER/NAME"),
        (["push_to=me/it", "push_private=maybe"], 'push_private: got "maybe"; expected true or false'),
        (["push_to=me/it"], "push_to: no login of the Hugging Face Hub; set HF_TOKEN"),
    ],
)
def test_wrong_settings_are_refused(
    overrides: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdtune.commands.export.get_token", lambda: None)
    assert export(f"run={run}", *overrides, f"hydra.run.dir={tmp_path / 'out'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def run_export(hub: Hub, home: Path, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "sdtune", "export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("login", ["environment", "stored"])
def test_artifact_card_and_previews_are_uploaded(login: str, run: Path, tmp_path: Path) -> None:
    home, hub, out = tmp_path / "home", Hub(), tmp_path / "out"
    home.mkdir()
    if login == "stored":
        (home / "token").write_text("hf_secret", encoding="utf-8")
    token = "hf_secret" if login == "environment" else None
    with hub.running():
        done = run_export(hub, home, f"run={run}", "push_to=me/it", f"hydra.run.dir={out}", token=token)
    assert done.returncode == 0, done.stderr
    assert hub.tokens == {"Bearer hf_secret"}
    [created] = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "it", "private")
    assert {"fox.safetensors", "pytorch_lora_weights.safetensors", "README.md", "samples/000.png"} <= set(hub.files)
    assert not [name for name in hub.files if name.startswith(".") or name.endswith(".log")]
    assert hub.files["fox.safetensors"] == (run / "artifact" / "fox.safetensors").read_bytes()
    assert str(tmp_path).encode() not in b"".join(hub.files.values())
    texts = [file.read_text(encoding="utf-8") for file in out.rglob("*") if file.suffix in (".log", ".yaml")]
    assert not any("hf_secret" in text for text in texts)
    assert "pushed (new repositories are private)" in done.stdout


def test_dry_run_prints_what_would_be_sent(run: Path, tmp_path: Path) -> None:
    hub = Hub()
    with hub.running():
        done = run_export(
            hub,
            tmp_path,
            *(f"run={run}", "format=kohya", "push_to=me/it", "push_private=false", "dry_run=true"),
            f"hydra.run.dir={tmp_path / 'out'}",
        )
    assert done.returncode == 0, done.stderr
    assert "dry run: to me/it (public if it is new), 5 files:" in done.stdout
    assert "  fox.safetensors" in done.stdout
    assert "  README.md" in done.stdout
    assert ".hydra" not in done.stdout.partition("dry run")[2]
    assert done.stdout.rstrip().endswith("nothing was sent")
    assert hub.files == {}
    assert hub.tokens == set()


@pytest.mark.slow
def test_wrong_token_is_one_line_and_keeps_the_files(tiny: Path, tmp_path: Path) -> None:
    hub, out = Hub(), tmp_path / "out"
    embeddings.write(tmp_path / "words", {"<a>": [torch.zeros(1, 32)]}, "", {})
    with hub.running():
        done = run_export(
            hub,
            tmp_path,
            *(f"artifact={tmp_path / 'words'}", f"backbone.path={tiny}", "backbone=sd15", "format=kohya"),
            *("push_to=me/it", f"hydra.run.dir={out}"),
            token="hf_wrong",
        )
    assert done.returncode == 2
    assert done.stderr.startswith("sdtune: push_to: me/it: ")
    assert f"upload the exported files in {out} yourself" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
