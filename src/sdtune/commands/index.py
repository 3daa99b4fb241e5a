"""``sdtune index``: write a table of samples from folders, parquet, CSV or JSONL files, datasets folders and tars."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdtune.data.folder import ImageFolder, list_image_folder
from sdtune.data.indexing import file_state, make_table, table_lock
from sdtune.data.sources import TABLE_SUFFIX
from sdtune.data.table import MappedTable, TableFacts, TableRow
from sdtune.data.tabular import Columns, Shards, datasets_rows, parquet_rows, tar_rows, text_rows
from sdtune.errors import UserError
from sdtune.quoting import shell_override

log = logging.getLogger("sdtune")

_HELP = """usage: sdtune index SOURCE... out=FILE.arrow
           [image_column=NAME] [caption_column=NAME] [control=DIR] [rehash=true]

Writes a table of samples, which data=table data.path=FILE.arrow trains on. A SOURCE is a folder of images, a folder
that the datasets library has saved, a parquet, CSV or JSONL file, an uncompressed tar in WebDataset's form, or a
pattern in quotes such as 'shards/*.tar'. Images are read once, with all cores. Run again, the command reads only what
is new or has changed in size or modification time; after an interruption it continues. Damaged images are listed.

  out             file of the table
  image_column    column of the images, where it has another name than image, jpg, png, file_name or path
  caption_column  column of the captions, where it has another name than captions, caption, text or prompt
  control         folder of control maps that are named like the images of the folders
  rehash          true: read all images again
"""

_TEXT_SUFFIXES = (".csv", ".jsonl")
_SHOWN_DAMAGED = 1000


@dataclass(frozen=True)
class IndexRequest:
    """What to index.

    Args:
        sources: folders and files, in the order of the rows.
        out: file of the table.
        columns: names of columns.
        control: folder of control maps for the images of folders.
        rehash: read all images again.
    """

    sources: tuple[Path, ...]
    out: Path
    columns: Columns = field(default_factory=Columns)
    control: str | None = None
    rehash: bool = False


def main(arguments: Sequence[str]) -> None:
    """Write the table that ``arguments`` ask for, and list damaged images."""
    if list(arguments) in (["-h"], ["--help"], []):
        print(_HELP, end="")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    request = parse(arguments)
    table = index(request)
    damaged = table.has("image", "problem").nonzero()[0].tolist()
    for number in damaged[:_SHOWN_DAMAGED]:
        image = table.row(number).image
        print(f"damaged: {image.place} {image.problem}")
    if len(damaged) > _SHOWN_DAMAGED:
        print(f"damaged: {len(damaged) - _SHOWN_DAMAGED} more")
    if damaged:
        print(f"{len(damaged):,} damaged images; training stops at them, or leaves them out with data.damaged=skip")
    of_them = f", {len(damaged):,} of them damaged" if damaged else ""
    print(f"{len(table):,} images{of_them}: {request.out}")
    data = f"data=table {shell_override('data.path', request.out)}"
    print(f"train on them with: sdtune train experiment=sd15_lora backbone.path=MODEL {data}")


def parse(arguments: Sequence[str]) -> IndexRequest:
    """The request of a command line: sources, and settings as ``KEY=VALUE``.

    Raises:
        UserError: a source is missing or of an unknown kind, or a setting is unknown.
    """
    settings: dict[str, str] = {}
    sources: list[Path] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("out", "image_column", "caption_column", "control", "rehash"):
            settings[key] = value
        elif equals and re.fullmatch(r"[a-z_]+", key) and not Path(argument).exists():
            raise UserError(f"unknown setting {key}", key="index", remedy="sdtune index --help lists the settings")
        else:
            sources += _matches(argument)
    if not sources:
        raise UserError(
            "no source", key="index", remedy="name a folder or file, as in: sdtune index DIR out=FILE.arrow"
        )
    if not settings.get("out"):
        raise UserError("missing value", key="out", remedy="set a file for the table, such as out=images.arrow")
    out = Path(settings["out"]).expanduser().absolute()
    if out.suffix != TABLE_SUFFIX or out.is_dir():
        raise UserError(f"{out} is no name for a table", key="out", remedy=f"end the name in {TABLE_SUFFIX}")
    if settings.get("rehash", "false") not in ("true", "false"):
        raise UserError(f"got {settings['rehash']!r}", key="rehash", remedy="set true or false")
    columns = Columns(settings.get("image_column"), settings.get("caption_column"))
    return IndexRequest(tuple(sources), out, columns, settings.get("control"), settings.get("rehash") == "true")


def _matches(argument: str) -> list[Path]:
    path = Path(argument).expanduser().absolute()
    if path.exists():
        return [path]
    if any(letter in path.name for letter in "*?["):
        if found := sorted(path.parent.glob(path.name)):
            return found
        raise UserError(f"no file matches {argument}", key="index", remedy="correct the pattern")
    raise UserError(f"{argument} does not exist", key="index", remedy="name a folder or file")


def index(request: IndexRequest) -> MappedTable:
    """Write the table of ``request``."""
    shards = Shards(request.out.with_name(f"{request.out.name}.shards"))
    folders = {
        source: _listed(source, request)
        for source in request.sources
        if source.is_dir() and not _is_saved_by_datasets(source)
    }

    def rows(source: Path) -> Iterator[TableRow]:
        if source in folders:
            return (replace(row, source=source.name) for row in folders[source].rows)
        return _rows(source, request, shards)

    # Rows are listed twice, because a million rows in memory take a gigabyte; images are read once.
    count = sum(len(folders[s].rows) if s in folders else sum(1 for _ in rows(s)) for s in request.sources)
    if not count:
        raise UserError("the sources have no images", key="index", remedy="name other sources")
    notices = tuple(notice for folder in folders.values() for notice in folder.facts.notices)
    facts = TableFacts(sources=_identity(request), notices=notices)
    every = itertools.chain.from_iterable(map(rows, request.sources))
    with table_lock(request.out):
        return make_table(request.out, every, count, facts, rehash=request.rehash)


def _listed(source: Path, request: IndexRequest) -> ImageFolder:
    try:
        return list_image_folder(source, "index", maps=request.control)
    except UserError as error:
        if error.key != "data.control.path":
            raise
        raise UserError(error.message, key="control", remedy=error.remedy) from error


def _rows(source: Path, request: IndexRequest, shards: Shards) -> Iterator[TableRow]:
    if _is_saved_by_datasets(source):
        return datasets_rows(source, request.columns)
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(source, request.columns, shards)
    if suffix in _TEXT_SUFFIXES:
        return text_rows(source, request.columns)
    if suffix == ".tar":
        return tar_rows(source)
    raise UserError(
        f"{source} is of an unknown kind",
        key="index",
        remedy="use a folder, .parquet, .csv, .jsonl or .tar, or a folder of the datasets library",
    )


def _is_saved_by_datasets(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _identity(request: IndexRequest) -> str:
    return json.dumps([[str(source), file_state(source)] for source in request.sources])
