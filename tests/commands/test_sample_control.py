"""``sdtune sample control=...`` and ``sdtune.sample(control=...)``: sampling with ControlNets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdtune
from drawings import drawing
from running import sample
from sample_commands import command, images
from sdtune.backbone import Pretrained
from sdtune.data.control.edges import Canny
from sdtune.loaders.controlnet import ControlImage
from sdtune.methods import ControlNet
from sdtune.sampling.loop import Sampling


@pytest.fixture(scope="module")
def net(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet whose effect on the image is visible."""
    model = ControlNet(backbone=Pretrained(str(tiny)))
    model.configure_model()
    rng = torch.Generator().manual_seed(1)
    for _, p in model.trainable():
        p.data += torch.randn(p.shape, generator=rng) * 0.1
    folder = tmp_path_factory.mktemp("net")
    model.artifact(folder, "net")
    return folder / "net"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(drawing(1, 60, 40)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def read(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(p)).astype(int) for p in images(folder)]


def test_controlnet_changes_the_image_and_strength_zero_does_not(
    tiny: Path, net: Path, image: Path, tmp_path: Path
) -> None:
    entry = f"{{path:{net},image:{image},strength:0.8,preprocess:canny}}"
    common = ["prompt=a fox", "seeds=[3]"]
    assert sample(*command(tiny, tmp_path / "base", *common)) == 0
    assert sample(*command(tiny, tmp_path / "run", *common, f"control=[{entry}]", "strengths=[0,1]")) == 0
    [base], (at_zero, at_full) = read(tmp_path / "base"), read(tmp_path / "run")
    assert np.array_equal(at_zero, base)
    assert np.abs(at_full - base).max() > 5
    facts = [json.loads(Image.open(p).info["sdtune"])["control"] for p in images(tmp_path / "run")]
    expected = {"path": "net", "image": "image.png", "preprocess": "canny"}
    assert facts == [[{**expected, "strength": 0.0}], [{**expected, "strength": 0.8}]]
    assert "control" not in json.loads(Image.open(images(tmp_path / "base")[0]).info["sdtune"])


def test_several_controlnets_work_with_adapters_and_with_image_sizes_per_prompt(
    tiny: Path,
    net: Path,
    image: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    first, second = f"{{path:{net},image:{image}}}", f"{{path:{net},image:{image},preprocess:scribble,strength:0.5}}"
    lora = f"adapters=[{{path:{adapter}}}]"
    (tmp_path / "prompts.txt").write_text("a fox --d 3\na fox --d 3 --w 48 --h 24\n", encoding="utf-8")
    results = []
    for i, more in enumerate(
        ([lora], [f"control=[{first}]"], [f"control=[{first},{second}]"], [f"control=[{first},{second}]", lora])
    ):
        assert sample(*command(tiny, tmp_path / str(i), f"prompts_file={tmp_path / 'prompts.txt'}", *more)) == 0
        results.append(read(tmp_path / str(i)))
        assert [p.shape for p in results[-1]] == [(32, 32, 3), (24, 48, 3)]
    for i, result in enumerate(results):
        assert all(np.abs(a - b).max() > 1 for other in results[:i] for a, b in zip(result, other, strict=True))


def test_python_api_accepts_an_image_or_its_file(tiny: Path, net: Path, image: Path) -> None:
    settings = {"backbone": Pretrained(str(tiny)), "sampling": Sampling(steps=2, guidance=3.0), "seeds": (3,)}
    opened = Image.open(image)
    [by_file] = sdtune.sample("a fox", control=net, control_image=image, **settings)
    [by_image] = sdtune.sample("a fox", control=str(net), control_image=opened, **settings)
    [by_entry] = sdtune.sample("a fox", control=[{"path": str(net), "image": str(image), "strength": 1.0}], **settings)
    [at_zero] = sdtune.sample("a fox", control=[{"path": str(net), "image": opened, "strength": 0.0}], **settings)
    [base] = sdtune.sample("a fox", **settings)
    assert np.array_equal(by_file, by_image)
    assert np.array_equal(by_file, by_entry)
    assert np.array_equal(at_zero, base)
    assert not np.array_equal(by_file, base)


def test_map_is_scaled_and_cropped_to_the_requested_size(net: Path, image: Path) -> None:
    resized = ControlImage(str(net), str(image)).map((32, 32))
    assert resized.shape == (32, 32, 3)
    unchanged = ControlImage(str(net), str(image)).map((60, 40))
    assert np.array_equal(unchanged, drawing(1, 60, 40))
    edges = ControlImage(str(net), str(image), preprocess="canny").map((60, 40))
    assert np.array_equal(edges, Canny().extract(drawing(1, 60, 40)))


def invalid_controls(net: Path, image: Path) -> dict[str, tuple[list[str], str]]:
    return {
        "no image": ([f"control=[{{path:{net}}}]"], "control[0]: image is missing; use {path: NET, image: FILE"),
        "unknown key": ([f"control=[{{path:{net},picture:x}}]"], "control[0]: unknown key picture"),
        "missing image": (
            [f"control=[{{path:{net},image:/nowhere.png}}]"],
            "control.image: /nowhere.png does not exist",
        ),
        "not an image": ([f"control=[{{path:{net},image:{net}/config.json}}]"], "control.image: "),
        "missing net": ([f"control=[{{path:/nowhere,image:{image}}}]"], "control.path: /nowhere is neither a folder"),
        "strength": ([f"control=[{{path:{net},image:{image},strength:much}}]"], "control[0].strength: "),
        "preprocess": (
            [f"control=[{{path:{net},image:{image},preprocess:hed}}]"],
            'control[0].preprocess: got "hed"; expected canny or scribble or null',
        ),
        "not a list": (["control=canny"], 'control: got "canny"; expected list of mapping'),
    }


CASES = list(invalid_controls(Path("a"), Path("b")))


@pytest.mark.parametrize("case", CASES)
def test_invalid_controls_print_one_line_and_leave_no_folder(
    case: str, tiny: Path, net: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    more, expected = invalid_controls(net, image)[case]
    run = tmp_path / "run"
    assert sample(*command(tiny, run, "prompt=a fox", *more)) == 2
    [line] = [line for line in capsys.readouterr().err.strip().splitlines() if "it/s" not in line]
    assert line.startswith("sdtune: ")
    assert expected in line
    assert not run.exists()
