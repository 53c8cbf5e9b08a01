"""Optimizers and schedules by name."""

import pytest
import torch

from library.errors import SettingsError
from library.training import optimizer_names, optimizers
from library.training.settings import OptimizerSettings


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


@pytest.mark.parametrize("name", ["AdamW", "adamw", "AdamW8bit", "SGD", "RAdam", "SGDNesterov", "torch.optim.NAdam"])
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
    monkeypatch.setitem(
        optimizer_names.OPTIMIZERS, "lion", optimizer_names.OptimizerSource("no_such_lion", "Lion", "lion-pytorch")
    )
    with pytest.raises(SettingsError, match="pip install lion-pytorch"):
        optimizers.optimizer_class(OptimizerSettings(optimizer_type="Lion"))


def rates(num_steps: int, **values: object) -> list[float]:
    settings = OptimizerSettings(**values)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    scheduler = optimizers.build_scheduler(settings, optimizer, num_steps)
    result = []
    for _ in range(num_steps):
        result.append(scheduler.get_last_lr()[0] / 0.1)
        optimizer.step()
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
    if name == "warmup_stable_decay":
        values["lr_decay_steps"] = 0.5
    if "warmup" in name or name == "inverse_sqrt":
        values["lr_warmup_steps"] = 2
    found = rates(40, **values)
    falls = name not in ("constant", "constant_with_warmup")
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
