"""Time, memory and reads of trainings on tables of up to a million images: ``python -m experiments.scale.measure``.

Makes a parquet file with small images for each size, indexes it, and starts trainings of pocket on it, without caches;
writes ``results.json`` and the table of ``README.md`` in this folder. ``--before CHECKOUT`` also measures that older
checkout (with its ``.venv``) on the same images as files in a folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from experiments.marked_page import rewrite
from sdtune.data.order import Order
from sdtune.files import write_json
from sdtune.progress import track
from sdtune.runs.metrics import cut_metrics

HERE = Path(__file__).parent
SIZES = (1_000, 10_000, 100_000, 1_000_000)
BEFORE_SIZES = (1_000, 10_000, 50_000)
"""Images in a folder for the older checkout, which reads all of them at every start."""

DISTINCT = 1_000
STEPS = 3
_ROWS_AT_ONCE = 10_000
_MIB, _POLL = 2**20, 0.05


@dataclass(frozen=True)
class Start:
    """A training from its command to its third step.

    Args:
        seconds: from the start of the process to the first row of ``metrics.csv``.
        uss_mib: largest unique set size in MiB of a process: the memory that it shares with no other.
        read_mib: MiB that the processes have read by system calls, without memory-mapped pages.
    """

    seconds: float
    uss_mib: float
    read_mib: float


def image_bytes(number: int) -> bytes:
    """Image ``number``: a WebP of 96 x 96 pixels with a gradient, about 200 bytes."""
    rng = np.random.default_rng(number)
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    corners.resize((96, 96), Image.Resampling.BILINEAR).save(buffer, format="WEBP", quality=60)
    return buffer.getvalue()


def caption(number: int) -> str:
    """Caption ``number``, different for every image."""
    tags = ("outdoors", "blue sky", "solo", "standing", "night", "red dress", "smile", "city", "tree", "water")
    rng = np.random.default_rng(number)
    chosen = ", ".join(tags[int(i)] for i in rng.permutation(len(tags))[:5])
    return f"{chosen}, image {number}"


def write_parquet(file: Path, count: int) -> None:
    """A parquet file with ``count`` rows; the images repeat after :data:`DISTINCT` rows, the captions do not."""
    images = [image_bytes(number) for number in range(min(count, DISTINCT))]
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        firsts = range(0, count, _ROWS_AT_ONCE)
        for first in track("Writing images", firsts, len(firsts)):
            numbers = range(first, min(first + _ROWS_AT_ONCE, count))
            columns = [[images[n % len(images)] for n in numbers], [caption(n) for n in numbers]]
            writer.write_table(pa.table(columns, schema=schema))


def write_folder(folder: Path, count: int) -> None:
    """The same images and captions as files."""
    folder.mkdir(parents=True)
    images = [image_bytes(number) for number in range(min(count, DISTINCT))]
    for number in track("Writing images", range(count), count):
        (folder / f"{number:07d}.webp").write_bytes(images[number % len(images)])
        (folder / f"{number:07d}.txt").write_text(caption(number), encoding="utf-8")


def training(data: Sequence[str], run: Path, *more: str) -> list[str]:
    """Overrides of a short training of pocket without caches."""
    return [
        *("train", "method=lora", *data, "data.cache_latents=false", "data.cache_text=false", "hardware=cpu"),
        *("hardware.threads=1", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "evaluation=none"),
        *("callbacks.samples=null", f"hydra.run.dir={run}", *more),
    ]


def measure_start(command: Sequence[str], run: Path, first_step: int = 1) -> Start:
    """Start a training and watch it until it ends."""
    if first_step == 1:
        shutil.rmtree(run, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds, uss, read = 0.0, 0.0, {}
    while process.poll() is None:
        if not seconds and _has_step(run / "metrics.csv", first_step):
            seconds = time.perf_counter() - begin
        for each in _family(process):
            try:
                uss = max(uss, each.memory_full_info().uss / _MIB)
                read[each.pid] = each.io_counters().read_chars / _MIB
            except psutil.Error:
                continue
        time.sleep(_POLL)
    assert process.stdout is not None
    output = process.stdout.read().decode()
    assert process.returncode == 0, output
    return Start(round(seconds, 2), round(uss, 1), round(sum(read.values()), 1))


def _family(process: psutil.Popen) -> Iterator[psutil.Process]:
    yield process
    try:
        yield from process.children(recursive=True)
    except psutil.Error:
        return


def _has_step(file: Path, step: int) -> bool:
    return file.is_file() and f"\n{step}," in file.read_text(encoding="utf-8")


def measure_table(work: Path, count: int) -> dict[str, object]:
    """Index a table of ``count`` rows, and start, resume and share trainings on it."""
    parquet, table = work / f"{count}.parquet", work / f"{count}.arrow"
    sdtune = [sys.executable, "-m", "sdtune"]
    shutil.rmtree(work / f"{count}.arrow.shards", ignore_errors=True)
    table.unlink(missing_ok=True)
    if not parquet.is_file():
        write_parquet(parquet, count)
    begin = time.perf_counter()
    subprocess.run([*sdtune, "index", str(parquet), f"out={table}"], check=True, stdout=subprocess.PIPE)
    indexing = time.perf_counter() - begin
    data = ["data=table", f"data.path={table}"]
    results: dict[str, object] = {"rows": count, "index_seconds": round(indexing, 1)}
    # The first start counts the captions; the second is what a user waits for each time.
    for name in ("first_start", "start"):
        run = work / f"{name}-{count}"
        results[name] = asdict(measure_start([*sdtune, *training(data, run)], run))
    run = work / f"start-{count}"
    resumed = [*sdtune, "train", f"resume={run}", f"trainer.max_steps={2 * STEPS}"]
    results["resume"] = asdict(measure_start(resumed, run, STEPS + 1))
    run = work / f"two-{count}"
    two = training(data, run, "hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")
    results["two_processes"] = asdict(measure_start([*sdtune, *two], run))
    results["order_batch_ms"] = order_milliseconds(count)
    results["table_mib"] = round(table.stat().st_size / _MIB, 1)
    results["files"] = 1 + len(list((work / f"{count}.arrow.shards").glob("*")))
    return results


def order_milliseconds(count: int) -> float:
    """Mean time of ``Order.batch`` in milliseconds, over the steps of an epoch, at most 2,000."""
    order = Order([np.arange(count)], 4, 0)
    order.batch(0)
    steps = min(2_000, order.steps_per_epoch)
    begin = time.perf_counter()
    for step in range(steps):
        order.batch(step)
    return round((time.perf_counter() - begin) / steps * 1000, 4)


def cut_seconds(work: Path) -> float:
    """Time to cut the last thousand of a million rows of ``metrics.csv``."""
    file = work / "metrics.csv"
    line = "{},0.046830497682094574,0.052252937108278275,0.0003333333333333333,\n"
    rows = "".join(map(line.format, range(1, 1_000_001)))
    file.write_text(f"step,loss,grad_norm,lr/denoiser,validation_loss\n{rows}", encoding="utf-8")
    begin = time.perf_counter()
    cut_metrics(file, 999_000)
    return round(time.perf_counter() - begin, 3)


def measure_before(checkout: Path, work: Path, count: int) -> dict[str, object]:
    """Two starts of an older checkout on a folder of ``count`` images."""
    folder = work / f"folder-{count}"
    if not folder.is_dir():
        write_folder(folder, count)
    sdtune = [str(checkout / ".venv" / "bin" / "sdtune")]
    results: dict[str, object] = {"rows": count, "files": 2 * count}
    for program, name in ((sdtune, "before"), ([sys.executable, "-m", "sdtune"], "after")):
        for start in ("first_start", "start"):
            run = work / f"{name}-{start}-{count}"
            command = [*program, *training(["data=folder", f"data.path={folder}"], run)]
            results[f"{name}_{start}"] = asdict(measure_start(command, run))
    return results


def lines_of_page(results: dict[str, object]) -> list[str]:
    """The tables of the page."""
    lines = [
        "| rows | index, s | first start, s | start, s | resume, s | private memory, MiB | of two processes, MiB |"
        " read, MiB | `Order.batch`, ms | table, MiB |",
        "|" + "---:|" * 10,
    ]
    for row in results["tables"]:  # type: ignore[attr-defined]
        start, two = row["start"], row["two_processes"]
        cells = (
            *(f"{row['rows']:,}", row["index_seconds"], row["first_start"]["seconds"], start["seconds"]),
            *(row["resume"]["seconds"], f"{start['uss_mib']:,.0f}", f"{two['uss_mib']:,.0f}"),
            *(f"{start['read_mib']:,.0f}", row["order_batch_ms"], row["table_mib"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"`metrics.csv` of a million rows was cut in {results['cut_seconds']} s.", ""]
    if results.get("folders"):
        lines += [
            "The same images as files in a folder (`data=folder`), before and after this change:",
            "",
            "| images | before: start, s | after: first start, s | after: start, s | before, MiB | after, MiB |",
            "|" + "---:|" * 6,
        ]
        for row in results["folders"]:  # type: ignore[attr-defined]
            lines.append(
                f"| {row['rows']:,} | {row['before_start']['seconds']} | {row['after_first_start']['seconds']}"
                f" | {row['after_start']['seconds']} | {row['before_start']['uss_mib']:,.0f}"
                f" | {row['after_start']['uss_mib']:,.0f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("outputs/scale"), help="folder of the images and runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--before", type=Path, help="older checkout, to compare with")
    parser.add_argument("--before-sizes", type=int, nargs="+", default=BEFORE_SIZES)
    args = parser.parse_args()
    work: Path = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["SDTUNE_CACHE"] = str(work / "cache")
    results: dict[str, object] = {"cut_seconds": cut_seconds(work), "tables": [], "folders": []}
    for count in args.sizes:
        results["tables"].append(measure_table(work, count))  # type: ignore[attr-defined]
        print(json.dumps(results["tables"][-1]), flush=True)  # type: ignore[index]
    for count in args.before_sizes if args.before else ():
        results["folders"].append(measure_before(args.before.absolute(), work, count))  # type: ignore[attr-defined]
        print(json.dumps(results["folders"][-1]), flush=True)  # type: ignore[index]
    write_json(HERE / "results.json", results)
    rewrite(HERE / "README.md", lines_of_page(results))


if __name__ == "__main__":
    main()
