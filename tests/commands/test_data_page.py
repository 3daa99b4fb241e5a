"""``data.html`` of ``sdtune prepare``: what it shows of the images, and counts over all of them."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_data import noise
from running import arguments, prepare, train
from sdtune.commands import data_page
from sdtune.commands.data_page import near_duplicates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        noise(tmp_path / "data" / f"{number}.png", 64, 48 + 16 * (number % 2), number, f"dog, <b>tag {number}</b>")
    (tmp_path / "data" / "0.txt").write_text("dog, " + "long " * 90 + "end", encoding="utf-8")
    (tmp_path / "data" / "1.txt").write_text("", encoding="utf-8")
    noise(tmp_path / "data" / "small.png", 33, 33, seed=7, caption="small dog")
    (tmp_path / "data" / "broken.png").write_bytes(b"text")
    return tmp_path / "data"


def page(tiny: Path, folder: Path, target: Path, *more: str) -> str:
    assert prepare(*arguments(tiny, folder, target, "data.damaged=skip", *more)) == 0
    return (target / "data.html").read_text(encoding="utf-8")


def test_page_shows_images_captions_and_counts(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(tiny, folder, tmp_path / "seen", "data.resolution=64", "data.captions.prefix=my")
    assert str(tmp_path / "seen" / "data.html") in "".join(capsys.readouterr())
    assert text.count("<figure") == 6
    assert len(list((tmp_path / "seen" / "thumbnails").glob("*.webp"))) == 6
    for file in re.findall(r'<img src="([^"]+)"', text):
        assert Image.open(tmp_path / "seen" / file).size[0] > 16
    assert html.escape("my dog, <b>tag 3</b>") in text
    assert "<b>tag" not in text, "captions are escaped"
    assert re.search(r"not read: .*end", text)
    assert text.count("caption is cut</span>") == 1
    assert text.count("smaller than the resolution</span>") >= 1
    assert "broken.png" in text
    assert "<dt>training images</dt><dd>6</dd>" in text
    assert "<dt>prompts that are cut</dt><dd>1</dd>" in text
    assert 'data-tag="my dog"' in text


def test_captions_that_are_drawn_have_an_example(tiny: Path, folder: Path, tmp_path: Path) -> None:
    drawn = ("data.captions.kind=tags", "data.captions.shuffle=true", "data.captions.suffix=', x, y, z'")
    text = page(tiny, folder, tmp_path / "seen", *drawn)
    assert text.count("drawn: ") >= 10


def test_thumbnails_are_limited_and_counts_are_not(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_page, "MOST_IMAGES", 3)
    text = page(tiny, folder, tmp_path / "seen")
    assert text.count("<figure") == 3
    assert "<dt>training images</dt><dd>6</dd>" in text
    assert "<dt>different prompts, without what is drawn</dt><dd>6</dd>" in text


def test_sources_of_a_mix_are_shown(tiny: Path, folder: Path, images: Path, tmp_path: Path) -> None:
    mix = [a for a in arguments(tiny, folder, tmp_path / "seen") if not a.startswith("data")]
    sources = [f"data.sources.a.path={folder}", "data.sources.a.damaged=skip", f"data.sources.b.path={images}"]
    assert prepare(*mix, "data=mix", *sources) == 0
    text = (tmp_path / "seen" / "data.html").read_text(encoding="utf-8")
    assert {*re.findall(r'data-source="(\w+)"', text)} == {"a", "b"}
    assert "source a: 1 of 7 images are damaged" in text


def test_near_duplicates_are_grouped() -> None:
    def picture(seed: int) -> Image.Image:
        corners = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return Image.fromarray(corners).resize((128, 128), Image.Resampling.BICUBIC)

    first, second, third = picture(0), picture(1), picture(2)
    brighter = first.point(lambda value: min(255, value + 6))
    groups, note = near_duplicates([first, second, brighter, third, second.resize((90, 90))])
    assert groups == [1, 2, 1, 0, 2]
    assert note == "4 images in 2 groups, among the 5 that are shown"


def test_near_duplicates_need_imagehash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert near_duplicates([Image.new("RGB", (8, 8))]) == ([0], "not looked for: install ImageHash (extra: duplicates)")


def test_skipped_images_are_listed_in_the_run_folder(tiny: Path, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, folder, run, "trainer.max_steps=1", "data.damaged=skip")) == 0
    lines = (run / "skipped.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,problem"
    assert lines[1].startswith(f"{folder / 'broken.png'},")
    assert len(lines) == 2
