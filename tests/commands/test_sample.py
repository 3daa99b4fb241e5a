"""``sdtune sample``: images with their settings as metadata, grids, strengths, prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from running import sample
from sample_commands import command, images


def test_images_contain_their_settings_and_form_a_grid(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = command(tiny, run, "prompt=[a fox,'two foxes, asleep']", "seeds=[3,4]", "sampling.negative_prompt=grey")
    assert sample(*argv, f"adapters=[{{path:{adapter},strength:0.5}}]") == 0
    assert capsys.readouterr().out.splitlines() == [f"grid: {run}/grid.png", f"4 images: {run}"]
    files = images(run)
    assert [p.name for p in files] == ["000_seed3.png", "001_seed4.png", "002_seed3.png", "003_seed4.png"]
    image = Image.open(files[2])
    assert image.size == (32, 32)
    assert json.loads(image.info["sdtune"]) == {
        "prompt": "two foxes, asleep",
        "seed": 3,
        "steps": 2,
        "guidance": 3.0,
        "negative_prompt": "grey",
        "sampler": None,
        "adapters": [{"path": adapter.name, "strength": 0.5}],
    }
    lines = image.info["parameters"].splitlines()
    assert lines[0] == "two foxes, asleep"
    assert lines[1] == "Negative prompt: grey"
    assert lines[2].startswith("Steps: 2, Sampler: ")
    assert "Seed: 3" in lines[2]
    assert len({np.asarray(Image.open(p)).tobytes() for p in files}) == 4
    assert Image.open(run / "grid.png").size == (120 + 2 * 166 + 6, 62 + 2 * 166 + 6)


def test_several_strengths_form_one_grid_that_begins_with_the_base(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    assert sample(*command(tiny, base, "prompt=a fox", "seeds=[1]")) == 0
    adapters = [f"adapters=[{{path:{adapter},strength:0.8}}]", "strengths=[0,0.5,1]"]
    assert sample(*command(tiny, run, "prompt=a fox", "seeds=[1,2]", *adapters)) == 0
    names = [f"{n:03d}_seed{n + 1}_strength{s}.png" for n in (0, 1) for s in ("0", "0.5", "1")]
    assert [p.name for p in images(run)] == sorted(names)
    strengths = [json.loads(Image.open(run / name).info["sdtune"])["adapters"][0]["strength"] for name in names[:3]]
    assert strengths == pytest.approx([0, 0.4, 0.8])
    by_strength = [np.asarray(Image.open(run / name)) for name in names[:3]]
    [base_image] = images(base)
    # The batch sizes differ: two here, one for the base.
    assert np.abs(by_strength[0].astype(int) - np.asarray(Image.open(base_image))).max() <= 1
    assert not np.array_equal(by_strength[0], by_strength[1])
    assert not np.array_equal(by_strength[1], by_strength[2])
    assert Image.open(run / "grid.png").size == (120 + 2 * 166 + 6, 62 + 3 * 166 + 6)


def test_prompt_file_accepts_the_options_of_kohya(tiny: Path, tmp_path: Path) -> None:
    """Lines with equal and with different settings alternate; each image must match its line."""
    lines = [
        "# a comment",
        "a fox --d 7",
        "a red fox --d 8",
        "",
        "two foxes --n grey, blurred --w 48 --h 24 --d 9 --s 3 --l 5.5",
        "three foxes --w 48 --h 24 --s 3 --l 5.5 --n grey, blurred --d 10",
        "a fox --d 7",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    run = tmp_path / "run"
    assert sample(*command(tiny, run, f"prompts_file={tmp_path / 'prompts.txt'}")) == 0
    files = images(run)
    assert [p.name.split("_")[1] for p in files] == [f"seed{s}.png" for s in (7, 8, 9, 10, 7)]
    opened = [Image.open(p) for p in files]
    assert [image.size for image in opened] == [(32, 32), (32, 32), (48, 24), (48, 24), (32, 32)]
    facts = [json.loads(image.info["sdtune"]) for image in opened]
    assert [f["prompt"] for f in facts] == ["a fox", "a red fox", "two foxes", "three foxes", "a fox"]
    assert [(f["steps"], f["guidance"], f["negative_prompt"]) for f in facts[1:3]] == [
        (2, 3.0, ""),
        (3, 5.5, "grey, blurred"),
    ]
    first, last = (np.asarray(opened[i]).astype(int) for i in (0, 4))
    assert np.abs(first - last).max() <= 1
    assert np.abs(first - np.asarray(opened[1])).max() > 1
    assert not (run / "grid.png").exists()  # the images have two sizes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "prompt: missing value"),
        (["prompt=a fox", "sampling.width=30"], "sampling.width: 30 is not a multiple of 4"),
        (["prompt=a fox", "sampling.steps=1001"], "sampling.steps: max 1000 with this backbone, got 1001"),
        (["prompt=a fox", "sampling.sampler=pndm", "sampling.steps=3"], "sampling.steps: pndm needs at least 4 steps"),
        (["prompt=a fox", "seeds=[18446744073709551616]"], "seeds.0: got 18446744073709551616; expected int >= 0"),
        (["prompt=a fox", "seeds=[-1]"], "seeds.0: got -1; expected int >= 0"),
        (
            ["prompt=a fox", "adapters=[{path:/nowhere/a.safetensors}]"],
            "adapters[0].path: /nowhere/a.safetensors does not",
        ),
        (["prompt=a fox", "adapters=[{file:a}]"], "adapters[0]: unknown key file; use {path: FILE, strength: 0.8}"),
    ],
)
def test_invalid_settings_leave_no_folder(
    more: list[str], expected: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert sample(*command(tiny, run, *more)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sdtune: ")
    assert expected in line
    assert not run.exists()
