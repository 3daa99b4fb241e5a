"""Allowed targets, and checks of a config against constructor signatures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge, Gt, Interval
from pydantic import StringConstraints

from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.targets import resolve
from sdtune.errors import UserError
from sdtune.objective import MinSNR, Objective

HERE = __name__
TRUST = (HERE,)


class Thing:
    """Something to configure."""

    def __init__(
        self,
        count: Annotated[int, Ge(1)],
        rate: Annotated[float, Gt(0)] | None = None,
        kinds: Sequence[Literal["a", "b"]] = ("a",),
        name: str = "thing",
        inner: Any = None,
        weighting: MinSNR | None = None,
    ) -> None:
        self.count, self.rate, self.kinds, self.name, self.inner = count, rate, kinds, name, inner
        self.weighting = weighting


class Holder:
    """Something whose arguments are objects in a list and in a mapping."""

    def __init__(self, losses: Sequence[Any] = (), more: dict[str, Any] | None = None) -> None:
        self.losses, self.more = losses, more


@dataclass
class Settings:
    """A dataclass to configure."""

    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    flip: bool = False


@dataclass(kw_only=True)
class More(Settings):
    """Annotations are inherited."""

    path: str


def make(rate: float, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return (rate, args, kwargs)


def node(target: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.{target}", **settings}


# --- allowed targets


def test_classes_of_allowed_packages_are_resolved() -> None:
    assert resolve("sdtune.objective.Objective", "k") is Objective
    assert resolve("sdtune.objective.loss.Objective", "k") is Objective
    assert resolve("torch.optim.AdamW", "k") is torch.optim.AdamW
    assert resolve("sdtune.loggers.Wandb", "k").__name__ == "Wandb"
    assert resolve("pytorch_lightning.Trainer", "k").__name__ == "Trainer"


@pytest.mark.parametrize(
    "target",
    [
        # Objects of other packages.
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.Popen",
        "torch.hub.load",
        "torch.load",
        "torch.jit.load",
        "pathlib.Path.write_text",
        "pickle.loads",
        "eval",
        # An allowed prefix, then another package through the imports of a module.
        "pytorch_lightning.trainer.trainer.os.system",
        "pytorch_lightning.trainer.trainer.torch.load",
        "pytorch_lightning.trainer.trainer.torch.hub.load",
        "sdtune.cli.main.os.system",
        "sdtune.cli.main.runpy.run_path",
        "sdtune.paths.os.makedirs",
        "sdtune.cli.launch.shutil.rmtree",
        "sdtune.config.schema.importlib.import_module",
        "torch.optim.optimizer.functools.partial",
        "torch.optim.adamw.torch.load",
        # The name of the package only begins with an allowed name.
        "torch.optimizer_of_mine.Thing",
        "sdtune_evil.Thing",
        "pytorch_lightning_evil.Thing",
    ],
)
def test_target_of_another_package_is_refused_with_its_key(target: str) -> None:
    with pytest.raises(UserError, match=r"^method\._target_: ") as caught:
        resolve(target, "method")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^method\._target_: "):
        check_node({"_target_": target}, "method")
    with pytest.raises(UserError):
        build({"_target_": target})


@pytest.mark.parametrize(
    "target", ["sdtune.cli.main.HELP", "sdtune.objective", "sdtune.no_such.Thing", "sdtune.paths.NoSuch", ""]
)
def test_target_that_is_neither_class_nor_function_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=r"^method\._target_: "):
        resolve(target, "method")


def test_refused_target_is_found_at_any_depth() -> None:
    inner = {"_target_": "sdtune.objective.Objective", "weighting": {"_target_": "os.system"}}
    with pytest.raises(UserError, match=r"^objective\.weighting\._target_: os\.system is not allowed"):
        check_node(inner, "objective")
    with pytest.raises(UserError, match=r"^top\.a\[1\]\.b\._target_: "):
        check_node({"a": [1, {"b": {"_target_": "os.system"}}]}, "top")


def test_module_of_the_user_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg/__init__.py").write_text("imported = True\n", encoding="utf-8")
    (tmp_path / "mypkg/mine.py").write_text(
        "import os\n\nclass Mine:\n    def __init__(self, size: int) -> None:\n        self.size = size\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"^method\._target_: mypkg\.mine\.Mine is not allowed; add trust=\[mypkg\]"):
        resolve("mypkg.mine.Mine", "method")
    assert "mypkg" not in sys.modules  # refused before the import, because an import runs the module
    assert build({"_target_": "mypkg.mine.Mine", "size": 3}, ["mypkg"]).size == 3
    with pytest.raises(UserError, match="mypkg"):
        resolve("mypkg.mine.Mine", "method", ["my"])
    with pytest.raises(UserError, match="is defined in"):
        resolve("mypkg.mine.os.makedirs", "method", ["mypkg"])


def test_missing_dependency_of_a_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import no_such_package\n\nclass Thing: ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"needs the package no_such_package; install it with pip"):
        resolve("needy.Thing", "k", ["needy"])


# --- checks against the constructor


def test_valid_config_passes() -> None:
    check_node(node("Thing", count=1), "t", TRUST)
    check_node(node("Thing", count=3, rate=0.5, kinds=["a", "b"], name="x", inner=node("Settings")), "t", TRUST)
    check_node(node("More", path="p", share=1, flip=True), "t", TRUST)
    check_node(node("Thing"), "t", TRUST, given=("count",))
    check_node({"a": None, "b": [1, 2], "c": {"d": "e"}}, "t")


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"count": 1, "nmae": "x"}, "t.nmae", "did you mean name"),
        ({"count": 0}, "t.count", "got 0; expected int >= 1"),
        ({"count": "many"}, "t.count", 'got "many"; expected int >= 1'),
        ({"count": 1.5}, "t.count", "expected int"),
        ({"count": None}, "t.count", "got null"),
        ({"count": 1, "rate": 0.0}, "t.rate", "expected float > 0 or null"),
        ({"count": 1, "rate": [1]}, "t.rate", "expected float > 0 or null"),
        ({"count": 1, "kinds": ["a", "c"]}, "t.kinds.1", 'got "c"; expected a or b'),
        ({"count": 1, "name": 5}, "t.name", "got 5; expected text"),
        ({"count": "???"}, "t.count", "missing"),
        ({}, "t.count", "missing"),
    ],
)
def test_mismatch_is_one_line_with_the_key(settings: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_node(node("Thing", **settings), "t", TRUST)
    message = str(caught.value)
    assert message.startswith(f"{key}:")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"path": "p", "share": 1.5}, "t.share"),
        ({"path": "p", "share": float("nan")}, "t.share"),
        ({"path": "p", "flip": "perhaps"}, "t.flip"),
        ({"path": 3}, "t.path"),
        ({}, "t.path"),
        ({"path": "p", "shares": 1}, "t.shares"),
    ],
)
def test_dataclass_is_checked_with_inherited_fields(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}[: ]"):
        check_node(node("More", **settings), "t", TRUST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": {"_target_": f"{HERE}.Settings"}}, "t.count: got a node with _target_; expected int >= 1"),
        ({"count": 1, "name": {"_target_": f"{HERE}.Settings"}}, "t.name: got a node with _target_; expected text"),
        ({"count": 1, "weighting": "strong"}, 't.weighting: got "strong"; expected a node with _target_'),
        ({"count": 1, "weighting": [1]}, "t.weighting: got [1]; expected a node with _target_"),
    ],
)
def test_objects_and_values_are_not_exchanged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_node(node("Thing", **settings), "t", TRUST)
    assert str(caught.value) == message


def test_constraint_without_a_description_gives_the_reason() -> None:
    with pytest.raises(UserError, match=r'^name: got "/x"; string should match pattern'):
        check_value("/x", Annotated[str, StringConstraints(pattern=r"^\w+$")], "name")


def test_lists_and_mappings_may_hold_objects() -> None:
    check_node(node("Holder", losses=[node("Settings")], more={"a": node("Settings")}), "t", TRUST)


def test_argument_that_the_command_passes_cannot_be_set() -> None:
    with pytest.raises(UserError, match=r"^t\.count: not a setting of Thing"):
        check_node(node("Thing", count=1), "t", TRUST, given=("count",))


def test_nested_nodes_are_checked() -> None:
    with pytest.raises(UserError, match=r"^t\.inner\.share: got 2; expected float >= 0, <= 1"):
        check_node(node("Thing", count=1, inner=node("Settings", share=2)), "t", TRUST)


def test_partial_may_omit_arguments() -> None:
    check_node({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}, "optimizer")
    with pytest.raises(UserError, match=r"^optimizer\.lrr: not a setting of AdamW; did you mean lr\?"):
        check_node({"_target_": "torch.optim.AdamW", "_partial_": True, "lrr": 1e-3}, "optimizer")


@pytest.mark.parametrize(
    ("value", "hint"), [(3, int), ("x", str), (None, int | None), ([1, 2], tuple[int, ...]), (1, float)]
)
def test_value_that_fits_its_annotation_passes(value: Any, hint: Any) -> None:
    check_value(value, hint, "k")


def test_value_of_a_library_class_is_not_checked() -> None:
    check_value(torch.zeros(1), torch.Tensor, "k")


# --- building


def test_nested_nodes_are_built_first() -> None:
    config = {
        "_target_": "sdtune.objective.Objective",
        "weighting": {"_target_": "sdtune.objective.MinSNR", "gamma": 3.0},
    }
    built = build(config)
    assert isinstance(built.weighting, MinSNR)
    assert built.weighting.gamma == 3.0


def test_additional_arguments_are_passed_and_nodes_in_lists_and_dicts_are_built() -> None:
    inner = node("Settings", share=0.25)
    built = build(node("Thing", inner=[inner, {"deep": inner, "plain": 1}]), TRUST, {"count": 2})
    assert built.count == 2
    assert built.inner[0].share == built.inner[1]["deep"].share == 0.25
    assert built.inner[1]["plain"] == 1


def test_building_none_returns_none() -> None:
    assert build(None) is None


def test_partial_is_called_with_the_remaining_arguments() -> None:
    built = build(node("make", _partial_=True, rate=2.0), TRUST)
    with pytest.raises(TypeError):
        built(1, rate=3)
    optimizer = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5})(
        [torch.nn.Parameter(torch.ones(1))]
    )
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_function_of_sdtune_is_refused_as_target() -> None:
    with pytest.raises(UserError, match="is a function, not a class"):
        resolve("sdtune.pocket.pretraining.assemble.assemble_pipeline", "evaluation")


def test_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package prodigyopt; install it with pip, or install 'sdtune\[optimizers\]'"
    ):
        resolve("prodigyopt.Prodigy", "optimizer")
