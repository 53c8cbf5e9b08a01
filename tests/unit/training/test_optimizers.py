"""Optimizers and schedules by name."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.errors import SettingsError
from library.training import optimizer_names, optimizers
from library.training.settings import OptimizerSettings
from library.training.updater import Updater


def parameters() -> list[dict]:
    return [
        {"params": [torch.nn.Parameter(torch.ones(4, 64))], "lr": 0.1},
        {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.01},
    ]


def test_the_table_of_torch_names_is_torchs() -> None:
    found = {
        name
        for name in dir(torch.optim)
        if isinstance(getattr(torch.optim, name), type)
        and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    }
    assert found - {"Optimizer", "Adafactor"} == set(optimizer_names.TORCH_OPTIMIZERS)


@pytest.mark.parametrize("name", ["AdamW", "adamw", "AdamW8bit", "LION", "RAdam", "SGDNesterov", "torch.optim.NAdam"])
def test_a_step_of_each_kind_moves_the_parameters(name: str) -> None:
    settings = OptimizerSettings(optimizer_type=name)
    groups = parameters()
    optimizer = optimizers.build_optimizer(settings, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter != 1).all() for group in groups for parameter in group["params"])


def test_arguments_reach_the_optimizer() -> None:
    settings = OptimizerSettings(optimizer_args=("weight_decay=0.5", "betas=0.8,0.9", "fused=False"))
    optimizer = optimizers.build_optimizer(settings, parameters())
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizers.describe_optimizer(settings) == (
        "torch.optim.adamw.AdamW(weight_decay=0.5,betas=(0.8, 0.9),fused=False)"
    )


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_step_of_torchs_optimizers_is_one_kernel(name: str) -> None:
    optimizer = optimizers.build_optimizer(OptimizerSettings(optimizer_type=name), parameters())
    assert all(group["fused"] for group in optimizer.param_groups)
    asked = OptimizerSettings(optimizer_type=name, optimizer_args=("foreach=True",))
    assert not any(group["fused"] for group in optimizers.build_optimizer(asked, parameters()).param_groups)
    assert "fused" not in optimizers.describe_optimizer(OptimizerSettings(optimizer_type=name))  # nor in metadata
    elsewhere = [{"params": [torch.nn.Parameter(torch.ones(3, device="meta"))], "lr": 0.1}]
    on_meta = optimizers.build_optimizer(OptimizerSettings(optimizer_type=name), elsewhere)
    assert not any(group["fused"] for group in on_meta.param_groups)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGDNesterov", "RAdam"])
def test_a_first_gradient_may_come_later_than_others(name: str) -> None:
    """As where a network module leaves modules out of a step by chance."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(4)) for _ in range(2)], "lr": 0.1}]
    optimizer = optimizers.build_optimizer(OptimizerSettings(optimizer_type=name), groups)
    first, second = groups[0]["params"]
    first.grad = torch.ones(4)
    optimizer.step()
    assert (second == 1).all()
    second.grad = torch.ones(4)
    optimizer.step()
    assert (second != 1).all()


@pytest.mark.parametrize("alone", [False, True])
def test_groups_of_other_networks_may_be_generators_or_single_tensors(alone: bool) -> None:
    """torch takes both; looking at a generator must not use it up."""
    parameter = torch.nn.Parameter(torch.ones(()))
    given = parameter if alone else (one for one in [parameter])
    network = SimpleNamespace(prepare_optimizer_params=lambda *_: [{"params": given, "lr": 0.1}])
    settings = OptimizerSettings()
    optimizer = optimizers.build_optimizer(settings, optimizers.parameter_groups(network, settings)[0])
    assert [group["params"] for group in optimizer.param_groups] == [[parameter]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optimizer_args": ("weight_dekay=1",)}, "weight_dekay"),
        ({"optimizer_args": ("lr=1",)}, "--learning_rate"),
        ({"optimizer_type": "no_such_package.Adam"}, "cannot be imported"),
        ({"optimizer_type": "torch.optim.AdamZ"}, "has no AdamZ"),
        ({"optimizer_type": "math.sqrt"}, "no class"),
    ],
)
def test_what_cannot_be_built_is_a_users_error(values: dict, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        optimizers.build_optimizer(OptimizerSettings(**values), parameters())


def test_a_missing_package_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = optimizer_names.OptimizerSource("no_such_lion", "Lion", "lion-pytorch")
    monkeypatch.setitem(optimizer_names.OPTIMIZERS, "lion", missing)
    settings = OptimizerSettings(optimizer_type="Lion")
    with pytest.raises(SettingsError, match="pip install lion-pytorch"):
        optimizer_names.require_package(settings)  # before anything is imported
    with pytest.raises(SettingsError, match="pip install lion-pytorch"):
        optimizers.optimizer_class(settings)


@pytest.mark.parametrize(
    ("first_line", "reason"),
    [
        ("raise OSError('libcuda.so: undefined symbol')", "undefined symbol"),
        ("import no_such_part_of_it", "No module named 'no_such_part_of_it'"),
    ],
)
def test_a_broken_package_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first_line: str, reason: str
) -> None:
    (tmp_path / "broken_lion.py").write_text(first_line, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    broken = optimizer_names.OptimizerSource("broken_lion", "Lion", "lion-pytorch")
    monkeypatch.setitem(optimizer_names.OPTIMIZERS, "lion", broken)
    settings = OptimizerSettings(optimizer_type="Lion")
    optimizer_names.require_package(settings)
    with pytest.raises(SettingsError, match=f"lion-pytorch, which is installed but cannot be loaded .*{reason}"):
        optimizers.optimizer_class(settings)


def test_torch_is_not_missed_as_an_optimizers_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no package to install under --optimizer_type; whoever imports it says that it is missing."""
    monkeypatch.setattr(optimizer_names.importlib.util, "find_spec", lambda name: None)
    optimizer_names.require_package(OptimizerSettings(optimizer_type="AdamW"))


@pytest.mark.parametrize(
    "values",
    [{"optimizer_type": "no_such_package.Lion"}, {"lr_scheduler_type": "no_such_package.sub.Cosine"}],
)
def test_a_missing_package_of_a_dotted_path(values: dict) -> None:
    with pytest.raises(SettingsError, match="there is no package no_such_package"):
        optimizer_names.require_package(OptimizerSettings(**values))
    optimizer_names.require_package(OptimizerSettings(optimizer_type="schedulefree.AdamWScheduleFree"))


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigy-plus-schedule-free"),
        ("prodigyopt.Prodigy", "prodigyopt"),
        ("lion_pytorch.Lion", "lion-pytorch"),
    ],
)
def test_a_missing_package_of_a_known_path_names_its_install_line(
    path: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=f"there is no package .*; run: pip install {package}$"):
        optimizer_names.require_package(OptimizerSettings(optimizer_type=path))


@pytest.mark.parametrize(
    ("values", "is_given", "own_rates", "says"),
    [
        ({}, False, {"Next-DiT": None, "Gemma2": None}, "default of 2e-06 is used for Next-DiT and Gemma2, with"),
        ({}, False, {"Next-DiT": 1e-4, "Gemma2": None}, "default of 2e-06 is used for Gemma2, with"),
        (
            {"optimizer_type": "adafactor", "optimizer_args": ("relative_step=False",)},
            False,
            {"Next-DiT": None},
            "2e-06",
        ),
        ({}, True, {"Next-DiT": None}, None),
        ({}, False, {"Next-DiT": 1e-4, "Gemma2": 0.0}, None),
        ({"optimizer_type": "adafactor"}, False, {"Next-DiT": None}, None),
        ({"optimizer_type": "Prodigy"}, False, {"Next-DiT": None}, None),  # warned of a rate far from 1 instead
        ({"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree"}, False, {"Next-DiT": None}, None),
    ],
)
def test_a_rate_that_nobody_gave_is_told(
    values: dict, is_given: bool, own_rates: dict, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer_names.warn_where_no_rate_is_given(OptimizerSettings(**values), is_given, own_rates)
    assert len(caplog.records) == (says is not None)
    assert says is None or says in caplog.text


def test_words_that_mean_one_thing_are_read() -> None:
    assert optimizer_names.parse_literals("--optimizer_args", ("a=inf", "b=true", "c=None", "d=0.9,0.99", "e='x'")) == {
        "a": math.inf,
        "b": True,
        "c": None,
        "d": (0.9, 0.99),
        "e": "x",
    }


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptation", "DAdaptAdan", "dadaptation.DAdaptLion"])
def test_one_rate_for_all_groups_or_an_error(name: str) -> None:
    # Some of these would fail at the first step, others silently take the first group's rate.
    with pytest.raises(SettingsError, match="give --learning_rate=1 alone"):
        optimizers.build_optimizer(OptimizerSettings(optimizer_type=name), parameters())


@pytest.mark.parametrize(("rate", "warned"), [(1e-4, True), (0.1, True), (0.5, False), (1.0, False), (100.0, True)])
def test_a_rate_far_from_one_is_warned_of(rate: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(4, 64))], "lr": rate}]
    optimizers.build_optimizer(OptimizerSettings(optimizer_type="Prodigy", learning_rate=rate), groups)
    assert ("the usual value is 1.0" in caplog.text) == warned


def test_prodigy_with_warmup_is_told_of_its_safeguard(caplog: pytest.LogCaptureFixture) -> None:
    for arguments in ((), ("safeguard_warmup=True",)):
        values = {"lr_scheduler": "cosine", "lr_warmup_steps": 0.1, "optimizer_args": arguments, "learning_rate": 1.0}
        groups = [{"params": [torch.nn.Parameter(torch.ones(4, 64))], "lr": 1.0}]
        caplog.clear()
        optimizers.build_optimizer(OptimizerSettings(optimizer_type="Prodigy", **values), groups)
        assert ("safeguard_warmup=True" in caplog.text) == (not arguments)


def test_the_general_rate_may_be_zero_where_groups_have_their_own() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(4, 64))], "lr": 1.0}]
    optimizer = optimizers.build_optimizer(OptimizerSettings(optimizer_type="Prodigy", learning_rate=0.0), groups)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_adafactor_sets_its_own_rate_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    settings = OptimizerSettings(optimizer_type="AdaFactor", lr_scheduler="cosine", learning_rate=1e-3)
    optimizer = optimizers.build_optimizer(settings, parameters())
    scheduler = optimizers.build_scheduler(settings, optimizer, 10)
    assert "--lr_scheduler have no effect" in caplog.text
    updater = Updater(None, optimizer, scheduler, ["a", "b"], 1.0, None)
    found = []
    for _ in range(3):
        for parameter in updater.parameters:
            parameter.grad = torch.ones_like(parameter)
        found.append(updater.apply())
    # 0.01 times the parameter's size, which is 1 at first; --learning_rate and the cosine are not in it.
    assert found[0] == pytest.approx({"lr/a": 0.01, "lr/b": 0.01})
    assert found[2]["lr/a"] == pytest.approx(0.01, rel=0.05)
    assert optimizers.describe_optimizer(settings) == "transformers.optimization.Adafactor(relative_step=True)"


def test_adafactor_with_a_rate_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("relative_step=False", "scale_parameter=False", "warmup_init=False")
    settings = OptimizerSettings(optimizer_type="adafactor", lr_scheduler="linear", optimizer_args=arguments)
    optimizer = optimizers.build_optimizer(settings, parameters())
    scheduler = optimizers.build_scheduler(settings, optimizer, 10)
    updater = Updater(None, optimizer, scheduler, ["a", "b"], 1.0, None)
    assert [updater.apply()["lr/a"] for _ in range(3)] == pytest.approx([0.1, 0.09, 0.08])
    assert not caplog.records
    scaled = OptimizerSettings(optimizer_type="adafactor", optimizer_args=("relative_step=False",))
    optimizers.build_optimizer(scaled, parameters())
    assert "scale_parameter=False" in caplog.text
    both = OptimizerSettings(optimizer_type="adafactor", optimizer_args=("relative_step=False", "warmup_init=True"))
    assert optimizer_names.sets_its_own_rate(both)  # as in sd-scripts
    assert optimizers.build_optimizer(both, parameters()).param_groups[0]["relative_step"]


def test_eight_bit_optimizers_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # defect 66: made twice there, which costs twice the paged memory
    import bitsandbytes

    made = []
    original = bitsandbytes.optim.AdamW8bit.__init__
    monkeypatch.setattr(
        bitsandbytes.optim.AdamW8bit, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1]
    )
    optimizers.build_optimizer(OptimizerSettings(optimizer_type="AdamW8bit"), parameters())
    assert made == [1]


def rates(num_steps: int, **values: object) -> list[float]:
    settings = OptimizerSettings(**values)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    scheduler = optimizers.build_scheduler(settings, optimizer, num_steps)
    result = []
    for _ in range(num_steps):
        result.append(scheduler.get_last_lr()[0] / 0.1)
        optimizer.step()
        if not optimizers.goes_by_the_loss(scheduler):
            scheduler.step()
    return result


def test_constant() -> None:
    assert rates(5) == [1.0] * 5


def test_warmup_counts_steps_shares_and_percentages() -> None:
    by_steps = rates(20, lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    assert by_steps == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 16)
    assert rates(20, lr_scheduler="constant_with_warmup", lr_warmup_steps=0.2) == by_steps


@pytest.mark.parametrize("name", optimizer_names.SCHEDULERS)
def test_every_known_schedule_is_built_and_ends_as_it_should(name: str) -> None:
    values: dict = {"lr_scheduler": name}
    if "min_lr" in name:
        values["lr_scheduler_min_lr_ratio"] = 0.1
    if name == "piecewise_constant":
        values["lr_scheduler_args"] = ("step_rules='1:10,0.1'",)
    if name == "adafactor":
        values["optimizer_type"] = "Adafactor"
    if name == "warmup_stable_decay":
        values["lr_decay_steps"] = 0.5
    if "warmup" in name or name == "inverse_sqrt":
        values["lr_warmup_steps"] = 2
    found = rates(40, **values)
    falls = name not in ("constant", "constant_with_warmup", "reduce_lr_on_plateau", "adafactor")
    assert max(found) == pytest.approx(1.0)
    assert (found[-1] < 0.5) == falls


def test_custom_schedule_class() -> None:
    found = rates(6, lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2", "gamma=0.5"))
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    with pytest.raises(SettingsError, match="StepLRR"):
        rates(2, lr_scheduler_type="StepLRR")


def test_clipping() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert float(optimizers.clip_gradients([parameter], 0)) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(6.0)
    assert float(optimizers.clip_gradients([parameter], 1.0)) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, abs=1e-5)  # the divisor has 1e-6 added
