"""What the report shows: the answer, columns, a page for one run, a folder of images above 15 MB, thinned curves."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from run_folders import PROMPTS, data_of, write_run, write_sweep
from sdtune.errors import UserError
from sdtune.reporting import collect, page, write_report
from sdtune.reporting.charts import thinned
from sdtune.reporting.facts import artifact, common_overrides, memorisation_warning
from sdtune.reporting.ranking import short_names


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("a") / "sweep")


def text_of(file: Path) -> str:
    """Visible text of a page, with single spaces."""
    content = re.sub(r"<(script|style).*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", content)).split())


def test_page_begins_with_the_answer(sweep: Path) -> None:
    text = text_of(write_report(collect(sweep), sweep, "it"))
    answer = text.partition("Ranking")[0]
    for part in (
        "12 done.",
        "Best setting by subject_gain",
        "rank 8, lr 0.001: 0.91 ± 0.01",
        "No other of the 4 settings with several seeds is within its noise.",
        f"sdtune sample 'a photo of sks bird' run={sweep}/11 strengths=0.5,0.75,1",
        f"{sweep}/11/artifact/bird.safetensors",
        "time of all steps 48 s",
        "size of the artifact 8.00 MiB",
        "method LoRA",
        "data images (5 images)",
        "common settings method=lora",
        "Training images",
    ):
        assert part in answer, part


def test_settings_within_the_noise_and_the_fastest_of_them_are_named(tmp_path: Path) -> None:
    for rank, gain in ((4, 0.80), (8, 0.81)):
        for seed in range(3):
            metrics = {"subject_gain": gain + 0.05 * seed, "steps": 10, "median_step_seconds": rank}
            write_run(tmp_path / f"{rank}-{seed}", {"method.rank": rank, "seed": seed}, metrics)
    text = text_of(write_report(collect(tmp_path), tmp_path, "it"))
    assert "Within its noise, 1 of the other 1: rank 4. The one that trains fastest is rank 4." in text


def test_ranking_has_the_base_model_short_names_and_explained_columns(sweep: Path) -> None:
    content = write_report(collect(sweep), sweep, "it").read_text(encoding="utf-8")
    ranking = content[content.index('id="ranking"') : content.index('id="samples"')]
    assert re.search(r'title="method\.rank">rank<', ranking)
    assert "CLIP similarity of generated images and training images" in ranking
    base = re.search(r'<tr class="base">.*?</tr>', ranking, re.DOTALL)
    assert base is not None
    assert "0.5" in re.sub(r"<[^>]+>", " ", base[0])
    boxes = re.findall(r'<input type="checkbox" class="column" value="\d+" data-name="\w+"( checked)?> (\w+)', ranking)
    assert {name for _, name in boxes} >= {"clip_image", "median_step_seconds", "artifact_bytes"}
    assert {name for checked, name in boxes if not checked} >= {"artifact_bytes"}


def test_short_names_are_unique() -> None:
    keys = ["method.rank", "optimizer.lr", "a.lr"]
    assert short_names(keys) == {"method.rank": "rank", "optimizer.lr": "optimizer.lr", "a.lr": "a.lr"}


def test_single_run_has_a_page_of_its_own(sweep: Path) -> None:
    run = sweep / "3"
    text = text_of(write_report(collect(run), run, "it"))
    for part in (
        "Samples over steps",
        "step 30",
        "image 2 of a sks bird",
        "5 training images.",
        "clip_image",
        "Repeat the run: sdtune train method=lora method.rank=4",
        "trainer.max_steps 60",
        f"run={run}",
    ):
        assert part in text, part
    assert "Ranking" not in text
    assert "Blind comparison" not in text


def test_samples_of_all_steps_and_seeds_are_in_the_page(sweep: Path) -> None:
    data = data_of(write_report(collect(sweep), sweep, "it"))
    assert [block["prompt"] for block in data["samples"]] == list(PROMPTS)
    for block in data["samples"]:
        assert [[step for step, _ in entry["steps"]] for cell in block["cells"] for entry in cell] == 12 * [[0, 30, 60]]
    # The images of the base model are equal, so there is one for each prompt.
    base = {entry["steps"][0][1] for block in data["samples"] for cell in block["cells"] for entry in cell}
    assert len(base) == 2
    assert base <= set(data["images"])


def test_large_page_becomes_a_folder(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = collect(sweep)
    single = write_report(runs, sweep, "it")
    assert single == sweep / "report.html"
    monkeypatch.setattr(page, "MOST_BYTES", 4_000_000)
    file = write_report(runs, sweep, "it")
    assert file == sweep / "report" / "index.html"
    assert "report/index.html" in single.read_text(encoding="utf-8"), "an open page finds the new one"
    urls = data_of(file)["images"].values()
    assert urls
    assert all((file.parent / url).stat().st_size > 20 for url in urls)
    assert len(list((file.parent / "images").iterdir())) == len(urls)
    (sweep / "report" / "mine.txt").touch()
    monkeypatch.undo()
    assert write_report(runs, sweep, "it") == single
    assert [file.name for file in (sweep / "report").iterdir()] == ["mine.txt"], "other files are kept"


def test_run_called_report_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", {"seed": 0}, {"validation_loss": 0.1})
    run = write_run(tmp_path / "report", {"seed": 1}, {"validation_loss": 0.2})
    write_report(collect(tmp_path), tmp_path, "it")
    assert (run / "metrics.json").exists()
    monkeypatch.setattr(page, "MOST_BYTES", 4_000_000)
    with pytest.raises(UserError, match="rename the run's folder"):
        write_report(collect(tmp_path), tmp_path, "it")
    assert (run / "metrics.json").exists()


def test_damaged_run_is_left_out_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", {}, {"validation_loss": 0.1})
    broken = write_run(tmp_path / "b", {}, {"validation_loss": 0.1})
    (broken / ".hydra" / "config.yaml").write_text("{", encoding="utf-8")
    assert [run.folder.name for run in collect(tmp_path)] == ["a"]
    assert f"the report leaves {broken} out" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        collect(broken)


def test_run_that_has_just_started_has_no_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {}, None)
    (run / "metrics.csv").write_text("", encoding="utf-8")
    assert collect(run)[0].curves == {}
    assert write_report(collect(run), run, "it").is_file()


def test_secrets_of_the_environment_and_other_files_are_not_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "hidden-value")
    run = write_run(tmp_path / "a", {"data.path": "${oc.env:MY_SECRET}"}, {"validation_loss": 0.1})
    other = tmp_path / "private.png"
    Image.new("RGB", (8, 8)).save(other)
    listed = {"images": 1, "shown": [{}, {"file": "../../private.png", "caption": "@images@"}]}
    (run / "training_images" / "images.json").write_text(json.dumps(listed), encoding="utf-8")
    content = write_report(collect(run), run, "it").read_text(encoding="utf-8")
    assert "hidden-value" not in content
    assert "oc.env:MY_SECRET" in content
    assert collect(run)[0].training.shown[0][0] == run / "training_images" / "private.png"
    assert collect(run)[0].training.counts["validation_images"] == 0


def test_settings_with_one_seed_are_not_called_worse(tmp_path: Path) -> None:
    for number, (rank, seed) in enumerate(((4, 0), (4, 1), (8, 0))):
        metrics = {"subject_gain": 0.9 - 0.01 * number, "memorisation": 0.5}
        write_run(tmp_path / str(number), {"method.rank": rank, "seed": seed}, metrics)
    text = text_of(write_report(collect(tmp_path), tmp_path, "it"))
    assert "The noise of 1 other settings is unknown (one seed)." in text


def test_base_model_is_left_out_where_models_differ(tmp_path: Path) -> None:
    for number, model in enumerate(("pocket", "/sd15")):
        metrics = {"clip_image": 0.5 + number / 10, "base_clip_image": 0.3 + number / 10}
        write_run(tmp_path / str(number), {"backbone.path": model}, metrics)
    file = write_report(collect(tmp_path), tmp_path, "it")
    assert "base model, without training" not in text_of(file)
    assert [block["base"] for block in data_of(file)["samples"]] == [None, None]


def test_mixed_folder_lists_what_differs(tmp_path: Path) -> None:
    metrics = {"validation_loss": 0.1}
    write_run(tmp_path / "a", {"method._target_": "sdtune.methods.Full", "optimizer.lr": 1e-5}, metrics)
    write_run(tmp_path / "b", {"backbone.path": "/models/sd15", "data.path": "/cats"}, {"validation_loss": 0.2})
    write_run(tmp_path / "c", {"trainer.max_steps": 10}, None)
    text = text_of(write_report(collect(tmp_path), tmp_path, "it"))
    assert "2 done, 1 unfinished." in text
    assert "LoRA (2 runs), Full (1 run)" in text
    assert "pocket (2 runs), /models/sd15 (1 run)" in text
    assert "The runs differ in model and data, so their metrics may not be comparable." in text


@pytest.mark.parametrize(("value", "warned"), [(0.96, True), (0.9, False), (None, False)])
def test_high_memorisation_is_warned_about(value: float | None, warned: bool) -> None:
    metrics = {} if value is None else {"memorisation": value}
    assert ("Memorisation is high" in memorisation_warning(metrics)) is warned


def test_artifact_is_the_file_for_other_programs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, {"validation_loss": 0.1})
    for name in ("bird-best", "bird-step00000010", "pytorch_lora_weights", "learned_embeds"):
        (run / "artifact" / f"{name}.safetensors").touch()
    assert artifact(collect(run)[0]) == run / "artifact" / "bird.safetensors"
    for file in (run / "artifact").glob("*"):
        file.unlink()
    (run / "artifact" / "bird").mkdir()
    (run / "artifact" / "bird-best").mkdir()
    assert artifact(collect(run)[0]) == run / "artifact" / "bird"


def test_common_overrides_leave_out_what_differs(sweep: Path) -> None:
    assert common_overrides(collect(sweep)) == ["method=lora"]


def test_curves_are_thinned_to_means() -> None:
    steps, values = thinned(range(1, 11), [float(i) for i in range(10)], 4)
    assert steps == [3, 6, 9, 10]
    assert values == [1.0, 4.0, 7.0, 9.0]
    assert thinned([1, 2], [float("nan"), 2.0], 10) == ([1, 2], [None, 2.0])


@pytest.mark.slow
def test_report_of_500_runs_takes_at_most_20_seconds(tmp_path: Path) -> None:
    for number in range(500):
        overrides = {"method.rank": 2 ** (number % 5), "optimizer.lr": 1e-5 * (1 + number // 15), "seed": number % 3}
        metrics = {"subject_gain": number / 500, "clip_image": 0.5, "memorisation": 0.6, "steps": 300}
        write_run(tmp_path / f"{number:03d}", overrides, metrics, steps=300, side=64)
    start = time.perf_counter()
    file = write_report(collect(tmp_path), tmp_path, "it")
    assert time.perf_counter() - start < 20
    assert file.stat().st_size < 15_000_000
