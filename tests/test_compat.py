"""Every private name of a library that sdtune uses still works as expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from sdtune import lightning_compat, peft_compat, torch_compat
from sdtune.config import hydra_compat

# --- torch


def test_foreach_operators_apply_to_every_tensor() -> None:
    tensors = [torch.zeros(2), torch.zeros(3)]
    torch_compat.foreach_copy_(tensors, [torch.ones(2), torch.full((3,), 2.0)])
    assert [t.tolist() for t in tensors] == [[1.0] * 2, [2.0] * 3]
    torch_compat.foreach_lerp_(tensors, [torch.zeros(2), torch.zeros(3)], 0.5)
    assert [t.tolist() for t in tensors] == [[0.5] * 2, [1.0] * 3]
    assert [t.tolist() for t in torch_compat.foreach_mul(tensors, 2.0)] == [[1.0] * 2, [2.0] * 3]
    torch_compat.foreach_mul_(tensors, torch.tensor(0.0))
    assert [t.tolist() for t in tensors] == [[0.0] * 2, [0.0] * 3]


def test_memory_efficient_attention_operator_exists() -> None:
    assert str(torch_compat.efficient_attention) == "aten._scaled_dot_product_efficient_attention"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_view_has_the_storage_key_of_its_tensor(device: str) -> None:
    tensor, other = torch.zeros(4, device=device), torch.zeros(4, device=device)
    assert torch_compat.storage_key(tensor[1:]) == torch_compat.storage_key(tensor)
    assert torch_compat.storage_key(other) != torch_compat.storage_key(tensor)


def test_operator_of_a_dispatched_call_is_known() -> None:
    seen = []

    class OperatorRecorder(torch_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(torch_compat.operator_of(func))
            return func(*args, **(kwargs or {}))

    with OperatorRecorder():
        torch.zeros(2).add(1)
    assert torch.ops.aten.add in seen


def test_tree_leaves_are_the_tensors_of_nested_arguments() -> None:
    assert torch_compat.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3]


@pytest.mark.parametrize(("fused", "takes"), [(True, True), (False, False)])
def test_fused_optimizers_take_found_inf(fused: bool, takes: bool) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=fused)
    assert torch_compat.supports_found_inf(optimizer) is takes
    torch_compat.set_supports_found_inf(optimizer, not takes)
    assert torch_compat.supports_found_inf(optimizer) is not takes


# --- Lightning


def test_attached_trainer_is_the_trainer_or_none() -> None:
    module = pl.LightningModule()
    assert lightning_compat.attached_trainer(module) is None
    module.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert lightning_compat.attached_trainer(module) is trainer


def test_path_like_includes_str_and_path() -> None:
    assert {str, Path} <= set(get_args(lightning_compat.PathLike))


# --- peft


def test_peft_uses_registered_layer_classes() -> None:
    class Registered(Linear):
        pass

    config = LoraConfig(r=2, target_modules=["0"])
    peft_compat.register_layers(config, {nn.Linear: Registered})
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(3, 3)))
    assert type(model[0]) is Registered


# --- Hydra and OmegaConf


def test_full_key_of_a_node_is_its_dotted_key() -> None:
    config = OmegaConf.create({"a": {"b": {"c": 1}}})
    assert hydra_compat.full_key(config.a.b) == "a.b"
    assert hydra_compat.full_key(config) == ""


def test_basic_sweeper_creates_one_job_per_combination() -> None:
    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=3"])
    basic = get_class("hydra._internal.core_plugins.basic_sweeper.BasicSweeper")
    assert hydra_compat.grid_of_jobs(basic, overrides) == [["a=1", "b=3"], ["a=2", "b=3"]]
    assert hydra_compat.grid_of_jobs(object, overrides) is None


def test_hydra_composes_a_config_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "any.yaml").write_text("a: 1\n", encoding="utf-8")
    search = hydra_compat.create_config_search_path(str(tmp_path))
    try:
        hydra = hydra_compat.Hydra.create_main_hydra2(task_name="any", config_search_path=search)
        composed = hydra.compose_config(
            config_name="any", overrides=["a=2"], run_mode=RunMode.RUN, with_log_configuration=False
        )
    finally:
        GlobalHydra.instance().clear()
    assert composed.a == 2


def test_composed_config_runs_as_a_hydra_job_in_the_given_folder(tmp_path: Path) -> None:
    node = "{job: {chdir: false}, job_logging: {handlers: {}, root: {handlers: []}}}"
    text = f"a: 1\nb: ${{hydra:runtime.output_dir}}\nhydra: {node}\n"
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8")
    search, run = hydra_compat.create_config_search_path(str(tmp_path)), tmp_path / "run"
    received = []

    def work(config: DictConfig) -> None:
        received.append(OmegaConf.to_container(config, resolve=True))
        raise ValueError(HydraConfig.get().run.dir)

    with hydra_compat.initialized("any", search) as hydra:
        config = hydra.compose_config("any", ["a=2"], RunMode.RUN)
        with pytest.raises(ValueError, match=re.escape(str(run))):
            hydra_compat.run_composed(hydra, config, f"hydra.run.dir={run}", work)
    assert received == [{"a": 2, "b": str(run)}]
    saved = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra
    assert (saved.overrides.task, saved.overrides.hydra, saved.mode) == (["a=2"], [f"hydra.run.dir={run}"], "RUN")


def test_default_hydra_callbacks_are_empty() -> None:
    assert hydra_compat.Callbacks().callbacks == []


def test_hydra_parser_separates_options_from_overrides() -> None:
    arguments = hydra_compat.get_args_parser().parse_args(["a=1", "--cfg", "job"])
    assert (arguments.overrides, arguments.cfg) == (["a=1"], "job")


def test_hydra_prints_the_config_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "any.yaml").write_text("a: 1\n", encoding="utf-8")
    parser = hydra_compat.get_args_parser()
    hydra_compat.print_info(parser.parse_args(["--cfg", "job"]), parser, str(tmp_path), "any")
    assert capsys.readouterr().out.strip() == "a: 1"
