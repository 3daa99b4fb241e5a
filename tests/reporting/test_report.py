"""HTML report: ranking, charts, samples, failed runs, escaping of hostile captions."""

from __future__ import annotations

import html
import json
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from running import arguments, train
from sdtune.reporting import Run, charts, collect, write_report
from sdtune.reporting.charts import pareto_front
from sdtune.reporting.images import ImageStore, Source
from sdtune.reporting.ranking import (
    MetricStatistics,
    Setting,
    chosen,
    group_by_setting,
    ranked,
    ranking_lines,
    rankings,
    varied,
)
from sdtune.reporting.tables import ranking_table, standalone_overrides

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def sweep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sweep of 2 ranks x 2 seeds, and in its folder a sweep that diverges; a caption attempts script injection."""
    from drawings import save_drawings

    folder = tmp_path_factory.mktemp("sweep")
    images = save_drawings(folder / "images", 4)
    for file in images.glob("*.png"):
        file.with_suffix(".txt").write_text(f"a thing {HOSTILE}", encoding="utf-8")
    overrides = [
        a for a in arguments(tiny, images, folder) if not a.startswith(("hydra.run", "method.rank", "callbacks"))
    ]
    overrides += [
        "trainer.max_steps=3",
        "data.hold_out=4",
        "trainer.val_check_interval=1",
    ]
    overrides += ["callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[7]"]
    grid = ["method.rank=1,2", "optimizer.lr=1e-2", "seed=0,1"]
    assert train("-m", *overrides, f"hydra.sweep.dir={folder}/it", *grid) == 0
    diverging = ["method.rank=2", "optimizer.lr=1e30", "seed=0,1"]
    assert train("-m", *overrides, f"hydra.sweep.dir={folder}/it/diverging", *diverging) == 1
    return folder / "it"


def test_runs_that_differ_only_in_seed_are_one_setting(sweep: Path) -> None:
    runs = collect(sweep)
    assert [str(run.folder.relative_to(sweep)) for run in runs] == ["0", "1", "2", "3", "diverging/0", "diverging/1"]
    assert [run.state for run in runs] == ["done"] * 4 + ["failed"] * 2
    assert "not finite" in str(runs[4].error)
    assert varied(runs) == ["method.rank", "optimizer.lr"]
    settings = group_by_setting(runs)
    assert [len(setting.runs) for setting in settings] == [2, 2, 2]
    assert chosen(runs) == "validation_loss"
    order = ranked(settings, "validation_loss")
    assert len(order) == 2, "failed runs are not ranked"
    means = [statistics.mean for _, statistics, _ in order]
    assert means == sorted(means)
    for setting, statistics, _ in order:
        values = [
            json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))["validation_loss"]
            for run in setting.runs
        ]
        assert statistics.mean == pytest.approx(sum(values) / 2)
        assert statistics.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def make_run(folder: str, overrides: tuple[str, ...], config: dict[str, Any], metrics: dict[str, float]) -> Run:
    return Run(Path(folder), overrides, None, "done", None, config, metrics, {}, {}, (), {})


def test_recipes_are_labeled_by_name_and_each_task_is_ranked_by_its_metric() -> None:
    runs = [
        make_run(
            f"{name}-{seed}",
            (f"experiment={name}", f"seed={seed}", f"hydra.run.dir={name}-{seed}"),
            {"seed": seed, "method.lr": lr, "data.prompts": [name]},
            {metric: value + seed},
        )
        for name, lr, metric, value in (
            ("weak", 1, "subject_gain", 10.0),
            ("edges", 2, "control_agreement", 30.0),
            ("strong", 2, "subject_gain", 20.0),
        )
        for seed in (0, 1)
    ]
    settings = group_by_setting(runs)
    assert [setting.label for setting in settings] == ["weak", "edges", "strong"]
    assert [(metric, [s.label for s, *_ in places]) for metric, places in rankings(settings)] == [
        ("subject_gain", ["strong", "weak"]),
        ("control_agreement", ["edges"]),
    ]


def test_runs_with_equal_command_lines_are_labeled_by_their_config() -> None:
    runs = [make_run(str(lr), ("hydra.run.dir=x",), {"optimizer.lr": lr}, {"validation_loss": lr}) for lr in (0.1, 0.2)]
    assert [setting.label for setting in group_by_setting(runs)] == ["optimizer.lr 0.1", "optimizer.lr 0.2"]


def test_grid_sweep_has_a_heat_map_and_random_search_a_scatter_plot() -> None:
    rates = (1e-4, 3e-4, 2e-3, 7e-3)

    def runs(pairs: list[tuple[float, int]]) -> list[Run]:
        return [
            make_run(str(i), (f"optimizer.lr={lr}", f"method.rank={rank}"), {"optimizer.lr": lr, "method.rank": rank},
                   {"subject_gain": float(i)})
            for i, (lr, rank) in enumerate(pairs)
        ]  # fmt: skip

    grid = group_by_setting(runs([(lr, rank) for lr in rates for rank in (4, 8)]))
    search = group_by_setting(runs([(rates[0], 4), (rates[1], 8), (rates[2], 16), (rates[3], 32)]))
    assert charts.heat_map(grid, ["subject_gain"], "subject_gain") is not None
    assert charts.heat_map(search, ["subject_gain"], "subject_gain") is None
    chart = charts.scatter_plot(search, "subject_gain")
    assert chart is not None
    figure = chart.figure
    [points] = figure.data
    assert (list(points.x), list(points.y)) == (list(rates), [4, 8, 16, 32])
    assert list(points.marker.color) == [0, 1, 2, 3]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.type) == ("optimizer.lr", "category")


class Scripts(HTMLParser):
    """Collects script elements, the data of the page, visible text and keys of images; nothing may be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.text = self.data = ""
        self._in = self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag in ("script", "style")
        self._in_data = dict(attrs).get("id") == "data"
        if tag == "script":
            self.scripts.append(dict(attrs))
        assert not {"src", "href"} & {name for name, value in attrs if value and not value.startswith("#")}
        if "data-image" in dict(attrs):
            self.keys.append(str(dict(attrs)["data-image"]))

    def handle_endtag(self, tag: str) -> None:
        self._in = False if tag in ("script", "style") else self._in

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in else data
        self.data += data if self._in_data else ""


def test_page_is_self_contained_and_runs_only_its_own_scripts(sweep: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "sdtune", "report", str(sweep)], capture_output=True, text=True, check=True
    )
    file = sweep / "report.html"
    head, *_, best, report = process.stdout.splitlines()
    assert head == "ranking by validation_loss:"
    assert best.startswith("best of 2 settings by validation_loss: ")
    assert report == f"report: {file}"
    page = Scripts()
    page.feed(file.read_text(encoding="utf-8"))
    nonces = {script.get("nonce") for script in page.scripts}
    assert len(nonces) == 1
    assert None not in nonces
    assert len(page.scripts) == 3, "the data, Plotly, and the script of the page"
    data = json.loads(page.data)
    assert all(url.startswith("data:image/webp;base64,") for url in data["images"].values())
    # For each held-out prompt, samples of the base model and of the complete runs; equal images are embedded once.
    assert set(page.keys) <= set(data["images"])
    assert {len(cell) for block in data["samples"] for cell in block["cells"]} == {2}
    assert HOSTILE in page.text, "the caption is shown as text"
    for text in ("Ranking", "2 seeds", "Failed runs", "not finite"):
        assert text in page.text, text
    assert "sdtune train method=lora" in page.text
    assert "method.rank=2" in page.text
    assert "optimizer.lr=1e+30" in page.text


def test_single_run_and_nested_folders_of_runs_are_collected(sweep: Path, tmp_path: Path) -> None:
    assert [run.state for run in collect(sweep / "0")] == ["done"]
    assert write_report(collect(sweep / "0"), tmp_path, "one").stat().st_size > 1_000_000
    shutil.copytree(sweep / "0", tmp_path / "a" / "seed-0")
    shutil.copytree(sweep / "2", tmp_path / "b" / "seed-0")
    runs = collect(tmp_path)
    assert [str(run.folder.relative_to(tmp_path)) for run in runs] == ["a/seed-0", "b/seed-0"]
    assert varied(runs) == ["method.rank"]


def test_killed_run_is_unfinished(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "0", tmp_path / "0")
    for name in ("metrics.json", "job.json"):
        (tmp_path / "0" / name).unlink()
    [run] = collect(tmp_path)
    assert run.state == "unfinished"
    assert write_report([run], tmp_path, "killed").is_file()


def test_incomplete_files_are_skipped(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "0", tmp_path / "0")
    with (tmp_path / "0" / "metrics.csv").open("a") as handle:
        handle.write("4,1.2e-")
    broken = next((tmp_path / "0" / "samples" / "step00000003").glob("*.png"))
    broken.write_bytes(broken.read_bytes()[:-100])
    [run], [intact_run] = collect(tmp_path), collect(sweep / "0")
    assert run.curves == intact_run.curves
    store = ImageStore()
    write_report([run], tmp_path, "one", store)
    assert [image.file for image in run.images if store.key(Source(image.file)) is None] == [broken]
    broken.write_bytes(broken.read_bytes()[:50])
    assert len(collect(tmp_path)[0].images) == len(intact_run.images) - 1


def test_command_of_a_trial_runs_without_its_study() -> None:
    assert standalone_overrides(["sweep=optuna", "trial=3", "method.rank=2"]) == [
        "sweep=optuna",
        "method.rank=2",
        "callbacks.pruning=null",
    ]
    assert standalone_overrides(["method.rank=2"]) == ["method.rank=2"]


@pytest.mark.parametrize(
    ("exists", "message"), [(False, "is not a folder"), (True, "no training run in")], ids=["missing", "empty"]
)
def test_folder_without_runs_is_refused(exists: bool, message: str, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "x").mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "sdtune", "report", str(tmp_path / "x")], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.startswith("sdtune: ")
    assert message in process.stderr
    assert process.stderr.count("\n") == 1


def test_pareto_front_contains_the_points_that_no_other_beats() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 5.0), (2.0, 0.0)]
    assert pareto_front(points, lower=False) == [(1.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    assert pareto_front(points, lower=True) == [(1.0, 1.0), (2.0, 0.0)]


@pytest.mark.slow
def test_extended_run_is_reported_with_its_last_config(tiny: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndata: {batch_size: 2}\n", encoding="utf-8"
    )
    run = tmp_path / "run"
    overrides = arguments(tiny, images, run, "trainer.max_steps=1", "experiment=mine")
    assert train("-cd", str(tmp_path / "conf"), *overrides) == 0
    assert train(f"resume={run}", "trainer.max_steps=2") == 0
    [extended_run] = collect(run)
    assert extended_run.config["trainer.max_steps"] == 2
    assert extended_run.config["optimizer.lr"] == extended_run.config["default_lr"] == 1e-4, (
        "interpolations are resolved"
    )
    page = html.unescape(write_report([extended_run], run, "it").read_text(encoding="utf-8"))
    command = f"sdtune train -cd {tmp_path / 'conf'} "
    shown = page[page.index(command) :].partition("</code>")[0]
    assert "resume=" not in shown
    repeated = shlex.split(shown)[2:]
    repeated = [a for a in repeated if not a.startswith("hydra.run.dir=")]
    assert train(*repeated, f"hydra.run.dir={tmp_path}/again") == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text(encoding="utf-8"))["steps"] == 2


@pytest.mark.parametrize(
    ("own", "other", "p"),  # p-values of scipy.stats.ttest_ind_from_stats(equal_var=False)
    [
        (MetricStatistics(0.9, 0.02, 3), MetricStatistics(0.8, 0.05, 3), 0.05869660899723983),
        (MetricStatistics(0.5, 0.1, 4), MetricStatistics(0.6, 0.01, 2), 0.13855504046350312),
        (MetricStatistics(1.0, 0.0, 3), MetricStatistics(0.9, 0.03, 3), 0.02871413764273583),
    ],
)
def test_settings_are_near_at_the_p_value_of_welchs_test(
    own: MetricStatistics, other: MetricStatistics, p: float
) -> None:
    for threshold, near in ((p * 1.001, False), (p * 0.999, True)):
        # ``comparisons`` divides the level of 5%.
        assert own.near(other, comparisons=0.05 / threshold) is other.near(own, 0.05 / threshold) is near  # type: ignore[arg-type]


def test_ranking_states_seeds_and_noise() -> None:
    def run(number: int, seed: int, lr: float, **metrics: float) -> Run:
        return make_run(str(number), (f"lr={lr}",), {"seed": seed, "lr": lr}, metrics)

    one_seed = group_by_setting([run(0, 0, 1.0, subject_gain=0.9), run(1, 1, 1.0), run(2, 0, 2.0, subject_gain=0.5)])
    first, second = ranking_table("subject_gain", ranked(one_seed, "subject_gain"))["rows"]
    assert first["noise"] == "1 of 2 seeds"
    assert second["noise"] == "noise unknown (one seed)"
    runs = [run(i, i % 3, 1.0 + i // 3, subject_gain=0.5 + 0.01 * i) for i in range(6)]
    first, second = ranking_table("subject_gain", ranked(group_by_setting(runs), "subject_gain"))["rows"]
    assert (first["noise"], second["noise"]) == ("3 seeds", "3 seeds")
    runs = [run(i, i % 3, 1.0 + i // 3, subject_gain=0.5 + 0.1 * (i % 3) + 0.01 * (i // 3)) for i in range(6)]
    assert ranking_table("subject_gain", ranked(group_by_setting(runs), "subject_gain"))["rows"][1]["noise"] == (
        "3 seeds, within the noise"
    )


def test_ranking_names_the_first_ten_settings_and_the_noise() -> None:
    runs = [
        make_run(
            f"{3 * rank + seed}", (f"lr={rank}",), {"seed": seed, "lr": rank}, {"subject_gain": gain + seed / 1000}
        )
        for rank, gain in enumerate(0.9 - 0.05 * number for number in range(12))
        for seed in range(3)
    ]
    head, *lines = ranking_lines(runs)
    assert head == "ranking by subject_gain:"
    assert lines[0].startswith("   1  0.901 ± 0.001")
    assert "noise" not in lines[1]
    assert lines[10] == "      and 2 more"
    assert lines[11:] == ["best of 12 settings by subject_gain: lr 0 (0.901 ± 0.001): 2"]
    assert ranking_lines(runs[:3]) == []


def test_winner_names_setting_metric_and_noise() -> None:
    def run(number: int, seed: int, lr: float, **metrics: float) -> Run:
        return make_run(str(number), (f"lr={lr}",), {"seed": seed, "lr": lr}, metrics)

    assert ranking_lines([run(0, 0, 1.0, subject_gain=0.9)]) == []
    assert ranking_lines([run(0, 0, 1.0, steps=9), run(1, 0, 2.0, steps=9)]) == []
    assert ranking_lines([run(0, 0, 1.0, validation_loss=0.2), run(1, 0, 2.0, validation_loss=0.1)])[-1:] == [
        "best of 2 settings by validation_loss: lr 2 (0.1); its noise is unknown (one seed): 1"
    ]
    runs = [run(i, i % 3, 1.0 + i // 3, subject_gain=0.5 + 0.1 * (i % 3) - 0.01 * (i // 3)) for i in range(9)]
    assert ranking_lines(runs)[-1:] == [
        "best of 3 settings by subject_gain: lr 1 (0.6 ± 0.1); within its noise: 2 of the other 2: 2"
    ]


def test_share_has_binomial_noise_even_if_seeds_agree() -> None:
    """A difference of one image in fourteen is within the noise, even if both seeds agree."""

    def setting(share: float, images: int) -> Setting:
        config = {"evaluation.images": images}
        runs = [
            make_run(f"{share}-{s}", (), {**config, "seed": s}, {"subject_gain": share, "clip_image": share})
            for s in (0, 1)
        ]
        return Setting({}, tuple(runs))

    close = ranked([setting(0.0, 14), setting(1 / 14, 14)], "subject_gain")
    assert [within for _, _, within in close] == [False, True]
    apart = ranked([setting(0.0, 1000), setting(1.0, 1000)], "subject_gain")
    assert [within for _, _, within in apart] == [False, False]
    # Other metrics have no minimum noise; equal means are always within the noise.
    assert [within for _, _, within in ranked([setting(0.0, 14), setting(1 / 14, 14)], "clip_image")] == [False, False]
    assert [within for _, _, within in ranked([setting(0.5, 14), setting(0.5, 14)], "clip_image")] == [False, True]


def test_report_notes_that_costs_of_shared_backbone_runs_are_joint(tmp_path: Path) -> None:
    runs = [
        make_run(
            f"{i}", (f"seed={i}", "method.rank=4"), {"seed": i, "method.rank": 4}, {"validation_loss": 0.1, **more}
        )
        for i, more in enumerate(({"shared_with": 8.0}, {"shared_with": 8.0}, {}))
    ]
    note = "2 of 3 runs trained 8 at the same time on one backbone (shared_with)"
    assert note in write_report(runs, tmp_path, "a sweep").read_text(encoding="utf-8")
    assert note not in write_report(runs[2:], tmp_path, "a sweep").read_text(encoding="utf-8")
