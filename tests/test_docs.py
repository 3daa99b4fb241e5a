"""The documentation agrees with the code: commands compose, links lead somewhere, examples run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from sdtune.backbone import Pretrained
from sdtune.cli.as_typed import for_hydra
from sdtune.cli.kohya_options import (
    EXPORT,
    EXPORT_REMARKS,
    SAMPLING,
    SAMPLING_REMARKS,
    TRAINING,
    TRAINING_REMARKS,
    UNAVAILABLE,
)
from sdtune.cli.kohya_sd3 import SD3, SD3_REMARKS
from sdtune.cli.main import COMMANDS
from sdtune.cli.main_setting import with_main_setting
from sdtune.commands.cache import parse
from sdtune.config import hardware
from sdtune.config.compose import compose, search_path, without_hydra
from sdtune.config.model import check_model
from sdtune.config.schema import check_node
from sdtune.config.trainer import check_trainer
from sdtune.data import Folder
from sdtune.methods import DreamBooth

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("**/README.md")])
NOTHING = "CHANGELOG.md"  # names what is gone


@dataclass(frozen=True)
class Example:
    """A command of a page: ``sdtune NAME ARGUMENTS``."""

    page: str
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: sdtune {self.name} {' '.join(self.arguments)}"


GROUPS = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").glob("**/") if path != ROOT / "conf"} - {
    "callbacks",
    "paths",
} | {"experiment"}
EVERY_SETTING = re.findall(
    r"^\| `([\w.]+)` \|", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), re.MULTILINE
)
OUTSIDE_OF_THE_PAGE = (
    *("paths.outputs", "hydra.run.dir", "hydra.sweep.dir", "hydra.verbose", "hydra.launcher.n_jobs"),
    *("data.sources.weight", "data.sources.loss_weight"),
)
OF_PLUGINS = ("submitit_local", "joblib")
"""Choices of hydra/launcher that the plugins of other packages add."""


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def examples_in(text: str, page: str) -> Iterator[Example]:
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"\$\(.*?\)", "DIR", line), posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|<>"):
                if "sdtune" in words[:-1] and words[words.index("sdtune") + 1] in COMMANDS:
                    name, *arguments = words[words.index("sdtune") + 1 :]
                    yield Example(page, name, tuple(arguments))
                words = []
            else:
                words.append(word)


def inline_code(page: Path) -> list[str]:
    """The code in the text and the tables of a page."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


def all_examples() -> list[Example]:
    """The commands in code blocks and in the text, without those that stand for several, such as ``sd15_...``."""
    pages = [page for page in PAGES if page.name != NOTHING]
    return [
        example
        for page in pages
        for block, is_inline in [
            *((b, False) for b in code_blocks(page, "bash")),
            *((c, True) for c in inline_code(page)),
        ]
        for example in examples_in(block, str(page.relative_to(ROOT)))
        if not is_inline or example.arguments
        if not any(word.endswith("...") or word == "experiment=NAME" for word in example.arguments)
    ]


@dataclass(frozen=True)
class Named:
    """A setting (``data.path``) or a choice (``optimizer=adamw8bit``) that the text of a page names."""

    page: str
    key: str
    value: str


def settings_and_choices(text: str, page: str) -> Iterator[Named]:
    """Every ``KEY=VALUE``, and the words that look like a dotted key of a config group."""
    for word in text.split():
        match = re.match(r"['\"(\[]*[+~]{0,2}([a-z]\w*(?:[./][a-z]\w*)*)(=(.*?))?['\")\],:;]*$", word)
        if match is None:
            continue
        key, value = match[1], match[3] or ""
        is_dotted = "." in key and key.split(".")[0] in GROUPS | {"callbacks"} and Path(key).suffix not in FILE_SUFFIXES
        if is_dotted or (match[2] and key not in NO_SETTINGS):
            yield Named(page, key, value)


FILE_SUFFIXES = (".py", ".json", ".yaml", ".html", ".fit")
"""Ends of the names of files and methods, which look like those of settings."""

NO_SETTINGS = (
    *("use_distributed_sampler", "mixed_precision", "optimizer_type", "sd_locked", "install", "eval", "key"),
    *("out", "image_column", "caption_column"),
)
"""Arguments of Lightning's Trainer, of kohya's scripts, of the shell and of sdtune index."""


def exists(named: Named) -> bool:
    if named.key in GROUPS:
        if not named.value:
            return True
        choices = re.split(r"[,|]", named.value)
        files = [ROOT / "conf" / named.key / f"{choice}.yaml" for choice in choices]
        return all(
            file.is_file() or choice.isupper() or "..." in choice or choice in OF_PLUGINS
            for choice, file in zip(choices, files, strict=True)
        )
    known = {*EVERY_SETTING, *OUTSIDE_OF_THE_PAGE}
    # A page on one group may shorten its keys: task=pose for data.control.task=pose.
    is_end = "." not in named.key and any(key.endswith(f".{named.key}") for key in known)
    return is_end or any(f"{key}.".startswith(f"{named.key}.") for key in known)


def write_yaml_blocks(page: Path, folder: Path) -> None:
    """Write each YAML block that begins with a comment with its path, such as ``# conf/method/mine.yaml``."""
    for block in code_blocks(page, "yaml"):
        if match := re.match(r"(?:# @package.*\n)?# (conf/\S+)\n", block):
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block, encoding="utf-8")


def first_values(overrides: list[str]) -> list[str]:
    """The overrides of the first job of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [f"{o.get_key_element()}={first_value(o)}" if o.is_sweep_override() else str(o.input_line) for o in parsed]


def first_value(override: Override) -> str:
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())


def check_config(config: dict[str, Any], name: str) -> None:
    """The checks of ``sdtune NAME`` that look at the config alone, and neither at files nor at the machine."""
    if name in ("train", "prepare"):
        check_model(config, tuple(config["trust"]))
        check_node(config["data"], "data", (), ("seed",))
        check_node(config["evaluation"], "evaluation")
        for key, node in config["callbacks"].items():
            check_node(node, f"callbacks.{key}", (), ("folder", "record", "run", "trial"))
        hardware.micro_batch(
            config["hardware"], config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]
        )
        config["hardware"] |= {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
        check_trainer(config, ())
    if "sampling" in config:
        check_node(config["sampling"], "sampling")


EXAMPLES = all_examples()
NAMED = [
    named
    for page in PAGES
    if page.name != NOTHING
    for text in inline_code(page)
    for named in settings_and_choices(text, str(page.relative_to(ROOT)))
]


def test_pages_have_examples_of_every_command() -> None:
    assert {example.name for example in EXAMPLES} == set(COMMANDS)
    assert len(EXAMPLES) > 60


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_command_of_a_page_composes(example: Example, tmp_path: Path) -> None:
    arguments = list(example.arguments)
    if example.name == "report":
        assert len([text for text in arguments if text not in ("--follow", "--serve")]) == 1
        return
    if example.name == "index":
        assert any(word.startswith("out=") for word in arguments)
        assert {word.partition("=")[0] for word in arguments if "=" in word} <= {"out", "control", "rehash"}
        return
    if example.name == "import-kohya":
        assert all(word.endswith(".toml") for word in arguments)
        return
    if example.name == "completion":
        assert arguments in (["bash"], ["--help"])
        return
    if example.name in ("doctor", "cache"):
        assert example.name == "cache" or not arguments
        parse(arguments)
        return
    config_dir = None
    if "-cd" in arguments:
        write_yaml_blocks(ROOT / example.page, tmp_path)
        position = arguments.index("-cd")
        config_dir = str(tmp_path / arguments[position + 1])
        del arguments[position : position + 2]
    flags = [word for word in arguments if word in ("-m", "--help")]
    overrides = [word for word in arguments if word not in (*flags, "--cfg", "job", "-p", "GROUP")]
    overrides = with_main_setting(example.name, for_hydra(example.name, [*flags, *overrides])[len(flags) :])
    is_resumed = any(word.startswith("resume=") for word in overrides)
    if is_resumed and any(word.startswith("hydra.launcher.") for word in overrides):
        overrides.append("hydra/launcher=shared_backbone")  # a setting of the resumed sweep
    config = compose(example.name, search_path(config_dir), first_values(overrides) if "-m" in flags else overrides)
    if not is_resumed and "trust=[my_package]" not in overrides:
        container: Any = OmegaConf.to_container(without_hydra(config), resolve=True)
        check_config(container, example.name)


def test_pages_name_settings() -> None:
    assert len(NAMED) > 400
    wrong = ["data.pth=DIR", "(data.pth)", "optimizer=adamw8bits", "metod=lora", "metod.rank=4", "hydra.swep.dir=x",
             "experiment=sd15_lroa", "nmae=otter", "sampling.foo=3"]  # fmt: skip
    for word in wrong:
        assert [exists(named) for named in settings_and_choices(word, "page")] == [False], word
    for word in ("hardware.precision", "method=lora|full", "experiment=sd15_lora", "name=otter", "hydra.run.dir=DIR"):
        assert [exists(named) for named in settings_and_choices(word, "page")] == [True], word
    assert list(settings_and_choices("evaluation.json", "page")) == []


def test_named_settings_and_choices_exist() -> None:
    assert [named for named in NAMED if not exists(named)] == []


def make_targets(code: str) -> set[str]:
    """The targets in the make commands of ``code``; variables such as JOBS=2 and options are left out."""
    targets: set[str] = set()
    for command in re.split(r"[\n;&|#]+", code):
        words = command.split()
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words and words[0] == "make":
            targets |= {
                w for w in words[1:] if "=" not in w and not w.startswith("-") and "/" not in w and '"' not in w
            }
    return targets


def test_misspelled_target_is_found() -> None:
    for command in (
        "make reslts",
        "make JOBS=2 reslts",
        "make -C ../base reslts",
        "PEER=x make reslts",
        "a && make reslts",
    ):
        assert make_targets(command) == {"reslts"}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != NOTHING], ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {
        target for code in [*code_blocks(page, "bash"), *inline_code(page)] for target in make_targets(code)
    } <= targets


def test_misspelled_command_of_a_page_is_found() -> None:
    [example] = examples_in("FOO=1 sdtune train method.rnk=4 \\\n  'data.prompt=\"a, b\"' && ls  # text", "page")
    assert example == Example("page", "train", ("method.rnk=4", 'data.prompt="a, b"'))
    with pytest.raises(Exception, match="rnk"):
        compose("train", search_path(None), list(example.arguments))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    tokens = [
        child
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for child in token.children or ()
    ]
    return [str(t.attrGet("href") or t.attrGet("src")) for t in tokens if t.type in ("link_open", "image")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_in_the_index_and_begins_with_a_command() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        body = page.read_text(encoding="utf-8").split("\n", 1)[1].lstrip()
        first = r"```bash\n(\w+=\S+ )*(sdtune|make|ls|cp) " if page.name != "python.md" else "```python"
        assert re.match(first, body), page.name


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


OPTIONS_OF_KOHYA = (
    ("train", TRAINING, TRAINING_REMARKS),
    ("sample", SAMPLING, SAMPLING_REMARKS),
    ("export", EXPORT, EXPORT_REMARKS),
)


def test_tables_for_users_of_kohya_are_those_of_the_messages() -> None:
    text = (ROOT / "docs" / "from-kohya.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = [(name.strip("| `"), value.strip("| ")) for name, value in rows]
    tables = [*((overrides, remarks) for _, overrides, remarks in OPTIONS_OF_KOHYA), (SD3, SD3_REMARKS)]
    assert table == [
        row
        for overrides, remarks in tables
        for row in [*((name, f"`{value}`") for name, value in overrides.items()), *remarks.items()]
    ]


def test_unavailable_options_are_listed() -> None:
    text = (ROOT / "docs" / "from-kohya.md").read_text(encoding="utf-8")
    paragraph = text[text.index("Not available:") : text.index("Differences:")]
    assert [name for name in UNAVAILABLE if f"`{name}`" not in paragraph] == []


COMPOSED = {
    "train": ["experiment=sd15_lora", "backbone.path=MODEL", "data.path=DIR"],
    "sample": ["prompt=x"],
    "export": ["run=x", "format=kohya"],
}


@pytest.mark.parametrize(
    ("command", "overrides"),
    sorted({(command, value) for command, table, _ in OPTIONS_OF_KOHYA for value in table.values()}),
)
def test_overrides_of_the_tables_can_be_used(command: str, overrides: str) -> None:
    # folders may be missing, but not their settings
    given = [text for text in shlex.split(overrides) if "=VALUE" not in text or text.startswith("data.control.path")]
    config = without_hydra(compose(command, search_path(None), [*COMPOSED[command], *given]))
    container: Any = OmegaConf.to_container(config, resolve=True)
    check_config(container, command)
    for key in (text.partition("=VALUE")[0] for text in overrides.split() if "=VALUE" in text):
        group, _, name = key.rpartition(".")
        assert key == "hydra.run.dir" or name in list(OmegaConf.select(config, group) if group else config)


def test_settings_page_is_up_to_date() -> None:
    """make settings writes it."""
    reference = script("settings_reference")
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()
    assert json.loads(reference.HELP.read_text(encoding="utf-8")) == reference.help_texts()


def test_settings_page_describes_every_setting() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 150
    assert [key for key, description in rows if not description.strip()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_python_example_runs(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny backbone and for two steps."""
    monkeypatch.chdir(tmp_path)
    code = code_blocks(ROOT / "docs" / "python.md", "python")[1]
    for old, new in (
        ('Pretrained("pocket")', f'Pretrained("{tiny}")'),
        ('path="DIR"', f'path="{images}"'),
        ("max_steps=400", "max_steps=2"),
        ("sdtune.sample(", f'sdtune.sample(backbone=Pretrained("{tiny}"), prompt='),
    ):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "python.md", "exec"), {})
    assert {p.name for p in tmp_path.iterdir()} >= {"otter", "otter.png"}


def test_example_method_trains_what_it_says(tiny: Path, images: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "my_package"}
    exec(compile(code_blocks(ROOT / "docs" / "new-method.md", "python")[0], "new-method.md", "exec"), names)
    model = names["CrossAttention"](backbone=Pretrained(str(tiny)), optimizer=lambda g: torch.optim.SGD(g, lr=1.0))
    assert isinstance(model, DreamBooth)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.fit(model, datamodule=Folder(path=str(images), batch_size=1, prior_weight=0, prompt="a photo of sks otter"))
    trained = {name.rsplit(".", 2)[-2] for name, _ in model.trainable()}
    assert trained == {"to_k", "to_v"}
    model.artifact(tmp_path, "otter")
    assert (tmp_path / "otter" / "model_index.json").is_file()
