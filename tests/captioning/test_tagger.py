"""WD14 taggers: preprocessing, thresholds, categories, and the form of the tags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caption_models import TAGS, build_tagger
from sdtune.captioning import models
from sdtune.captioning.models import check_model_name
from sdtune.captioning.tagger import Tag, Tagger, TagSettings, chosen_tags, read_tags, tagger_pixels
from sdtune.errors import UserError

CPU = torch.device("cpu")
TAG_LIST = [Tag(name, category) for name, category in TAGS]


def chosen(*probabilities: float, **settings: object) -> list[str]:
    return chosen_tags(np.array(probabilities, np.float32), TAG_LIST, TagSettings(**settings))  # type: ignore[arg-type]


def test_pixels_are_bgr_from_0_to_255_on_a_white_square() -> None:
    pixels = tagger_pixels(Image.new("RGB", (40, 20), (10, 20, 30)), 40)
    assert pixels.dtype == np.float32
    assert pixels.shape == (40, 40, 3)
    assert pixels.flags.c_contiguous
    assert (pixels[10:30] == (30, 20, 10)).all()
    assert (pixels[:10] == 255).all()
    assert (pixels[30:] == 255).all()


def test_odd_padding_is_larger_at_the_right_and_at_the_bottom() -> None:
    pixels = tagger_pixels(Image.new("RGB", (3, 4)), 4)
    assert (pixels[:, :3] == 0).all()
    assert (pixels[:, 3] == 255).all()


def test_image_is_resized_to_the_side_of_the_model() -> None:
    assert tagger_pixels(Image.new("RGB", (100, 50)), 8).shape == (8, 8, 3)


def test_model_receives_channels_and_values_in_its_order(tmp_path: Path) -> None:
    """A blue square has means of (255, 0, 0) in BGR; white padding raises the means of the others to a half."""
    tagger = Tagger(build_tagger(tmp_path / "tagger"), TagSettings(general_threshold=0.7, use_rating_tags=True), CPU)
    square, wide = Image.new("RGB", (16, 16), (0, 0, 255)), Image.new("RGB", (16, 8), (0, 0, 255))
    assert tagger([square]) == ["general, green_hair"]
    probabilities = tagger._probabilities(np.stack([tagger_pixels(image, 8) for image in (square, wide)]))
    assert np.allclose(probabilities[0], [1, 0, 0, 1, 0, 0], atol=1e-6)
    assert np.allclose(probabilities[1], [1, 0.5, 0.5, 1, 0.5, 0.5], atol=0.02)


@pytest.mark.parametrize("batch", [1, 2])
def test_fixed_batch_size_of_the_model_is_kept(batch: int, tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    tagger = Tagger(build_tagger(tmp_path / "tagger", batch=batch), TagSettings(character_threshold=0.5), CPU)
    assert tagger(images) == ["blue_sky, red_fox_(hero)", "^_^", "green_hair"]


def test_thresholds_belong_to_categories() -> None:
    assert chosen(1, 1, 0.4, 0.3, 0.36, 0.84) == ["blue_sky", "^_^"]
    assert chosen(0, 0, 0, 0, 0, 0.86) == ["red_fox_(hero)"]
    assert chosen(0, 0, 0.4, 0.5, 0.6, 0.5, general_threshold=0.5, character_threshold=0.25) == [
        "green_hair",
        "^_^",
        "red_fox_(hero)",
    ]


def test_rating_is_the_first_tag_if_asked_for() -> None:
    assert chosen(0.2, 0.1, 0.9, 0, 0, 0, use_rating_tags=True) == ["general", "blue_sky"]
    assert chosen(0.2, 0.3, 0.9, 0, 0, 0, use_rating_tags=True) == ["explicit", "blue_sky"]


def test_underscores_become_spaces_except_in_short_tags() -> None:
    assert chosen(0, 0, 1, 0, 1, 1, remove_underscore=True) == ["blue sky", "^_^", "red fox (hero)"]


@pytest.mark.parametrize("name", ["blue_sky", "blue sky"])
@pytest.mark.parametrize("remove_underscore", [True, False])
def test_undesired_tags_are_left_out(name: str, remove_underscore: bool) -> None:
    tags = chosen(0, 0, 1, 1, 1, 0, undesired_tags=(name, "^_^"), remove_underscore=remove_underscore)
    assert tags == ["green hair" if remove_underscore else "green_hair"]


def test_characters_precede_general_tags_if_asked_for() -> None:
    assert chosen(0, 0, 1, 1, 0, 1) == ["blue_sky", "green_hair", "red_fox_(hero)"]
    assert chosen(0, 0, 1, 1, 0, 1, character_tags_first=True) == ["red_fox_(hero)", "blue_sky", "green_hair"]


def test_missing_onnxruntime_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_tagger(tmp_path / "tagger")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^model: the tagger .* needs onnxruntime; install it: pip install 'sdtune\[ta"
    ):
        check_model_name(str(folder), "caption")


def test_number_of_tags_must_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model: .*model\.onnx has 6 outputs, but selected_tags\.csv has 5 tags"):
        Tagger(build_tagger(tmp_path / "tagger", TAGS[:5]), TagSettings(), CPU)


def test_damaged_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = build_tagger(tmp_path / "tagger")
    (folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^model: .*model\.onnx cannot be loaded \([^\n]*\); download it again$"):
        Tagger(folder, TagSettings(), CPU)


def test_missing_model_file_is_refused(tmp_path: Path) -> None:
    folder = build_tagger(tmp_path / "tagger")
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"contains no weights \(model\.onnx is missing\)"):
        check_model_name(str(folder), "caption")


@pytest.mark.parametrize("text", ["id,label\n1,x\n", "name,category\nx,general\n", "name,category\nx\n"])
def test_other_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "selected_tags.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"selected_tags\.csv cannot be read .*expected a table with the columns name"):
        read_tags(tmp_path / "selected_tags.csv")
