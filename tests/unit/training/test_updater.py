"""What is logged of a step, the moving average, and states that do not fit."""

import itertools

import pytest
import torch
from optimizer_helpers import SmallTraining, equal, through_a_file

from library import console
from library.errors import SettingsError
from library.training.ema import MovingAverage


def test_each_group_is_logged_once_under_its_name() -> None:
    # defect 61: duplicate keys (lr/group0 beside lr/unet) and stray spaces
    training = SmallTraining(4, lora_plus=True, learning_rate=1e-3)
    training.run(1)
    assert training.logged[0] == {"lr/unet": 1e-3, "lr/unet plus": 2e-3}


def test_the_rate_that_an_optimizer_finds_is_logged() -> None:
    training = SmallTraining(4, optimizer_type="Prodigy", learning_rate=1.0, optimizer_args=("d0=1e-5",))
    training.run(2)
    assert set(training.logged[0]) == {"lr/unet", "lr/d*lr/unet"}
    assert training.logged[1]["lr/unet"] == 1.0
    assert training.logged[1]["lr/d*lr/unet"] == training.optimizer.param_groups[0]["d"] >= 1e-5


def test_growth_is_limited_by_its_argument() -> None:
    free = SmallTraining(9, optimizer_type="Prodigy", learning_rate=1.0)
    slow = SmallTraining(9, optimizer_type="Prodigy", learning_rate=1.0, optimizer_args=("growth_rate=1.02",))
    for training in (free, slow):
        training.run(9)
    # The start, d0 = 1e-6, may be left at once; from then on each step grows it by 2 % at most.
    grown = [values["lr/d*lr/unet"] for values in slow.logged if values["lr/d*lr/unet"] > 1e-6]
    assert len(grown) > 3
    assert all(after <= 1.02 * before * (1 + 1e-9) for before, after in itertools.pairwise(grown))
    assert grown[-1] < free.logged[-1]["lr/d*lr/unet"]


def test_an_optimizers_own_warmup_is_logged() -> None:
    training = SmallTraining(4, optimizer_type="AdamWScheduleFree", optimizer_args=("warmup_steps=4",))
    training.run(4)
    assert [values["lr/unet"] for values in training.logged] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


def test_a_schedule_for_a_schedule_free_optimizer_is_not_followed() -> None:
    training = SmallTraining(4, optimizer_type="SGDScheduleFree", lr_scheduler="cosine", lr_warmup_steps=2)
    training.run(4)
    assert [values["lr/unet"] for values in training.logged] == pytest.approx([1e-3] * 4)


def test_norms() -> None:
    training = SmallTraining(2, lora_plus=True)
    training.run(2)
    found = training.updater.norms()
    flat = torch.cat([tensor.flatten() for tensor in training.tensors()])
    # Sums of some hundred thousand float32 squares in another order.
    assert found["norm/lora"] == pytest.approx(float(flat.norm()), rel=1e-5)
    assert set(found) == {"norm/lora", "norm/lora/unet", "norm/lora/unet plus"}
    assert found["norm/lora"] ** 2 == pytest.approx(
        found["norm/lora/unet"] ** 2 + found["norm/lora/unet plus"] ** 2, rel=1e-5
    )


def test_a_part_without_learning_rate_takes_no_part() -> None:
    # defect 21: its gradients stayed and shortened those of the other parts when clipping
    from lora_helpers import gemma2, small_next_dit

    from library.training import optimizers
    from library.training.settings import OptimizerSettings
    from networks.lora_lumina import create_network

    network = create_network(1.0, 4, 4, None, [gemma2()], small_next_dit())
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([0.0], 1e-3, 1e-3)
    optimizer = optimizers.build_optimizer(OptimizerSettings(text_encoder_lr=(0.0,)), groups)
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert names == ["unet"]
    assert trained == sum(parameter.numel() for lora in network.unet_loras for parameter in lora.parameters())
    assert not any(parameter.requires_grad for lora in network.text_encoder_loras for parameter in lora.parameters())


def test_the_average_follows_the_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], 0.5)
    expected = 0.0
    for step in range(1, 20):
        with torch.no_grad():
            parameter.fill_(float(step))
        average.update()
        decay = min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
    with torch.no_grad():
        average.copy_to_parameters()
    # Twenty roundings of float32, 2^-24 each.
    assert parameter.tolist() == pytest.approx([expected] * 3, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_swapped_in_and_out_without_a_trace(dtype: torch.dtype) -> None:
    training, plain = (SmallTraining(6, ema_decay=decay, dtype=dtype) for decay in (0.9, None))
    training.run(3)
    before = training.tensors()
    with training.weights.in_use(averaged=True):
        averaged = training.tensors()
        assert not equal(averaged, before)
    with training.weights.in_use():
        assert equal(training.tensors(), before)
    training.run(3)
    plain.run(6)
    assert equal(training.tensors(), plain.tensors())
    assert training.weights.has_average
    with pytest.raises(ValueError, match="no moving average"), plain.weights.in_use(averaged=True):
        pass


def test_ctrl_c_while_values_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    training = SmallTraining(6, ema_decay=0.9)
    training.run(3)
    before = training.tensors()
    put_back = torch._foreach_copy_

    def interrupted(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        console._stop()
        put_back(tensors, values)

    try:
        with training.weights.in_use(averaged=True):
            monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
        assert console.is_stopped()
    finally:
        console._stopped.clear()
        console._signals.clear()
    assert equal(training.tensors(), before)


def test_the_average_goes_on_bit_for_bit() -> None:
    whole, first, second = (SmallTraining(6, ema_decay=0.9) for _ in range(3))
    whole.run(6)
    first.run(2)
    with torch.no_grad():
        for parameter, value in zip(second.updater.parameters, first.tensors(), strict=True):
            parameter.copy_(value)
    second.updater.load_state_dict(through_a_file(first.updater.state_dict()))
    second.run(4)
    with whole.weights.in_use(averaged=True), second.weights.in_use(averaged=True):
        assert equal(whole.tensors(), second.tensors())


def test_an_average_may_begin_or_end_where_a_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with_average, without = SmallTraining(6, ema_decay=0.9), SmallTraining(6)
    for training in (with_average, without):
        training.run(1)
    state = through_a_file(with_average.updater.state_dict())
    with_average.updater.load_state_dict(without.updater.state_dict())
    assert "starts one from here" in caplog.text
    with with_average.weights.in_use(averaged=True):
        averaged = with_average.tensors()
    assert equal(averaged, with_average.tensors())
    without.updater.load_state_dict(state)
    assert "ends here" in caplog.text


def test_a_state_of_something_else_is_refused() -> None:
    state = SmallTraining(6).updater.state_dict()
    with pytest.raises(SettingsError, match="the same --optimizer_type"):
        SmallTraining(6, optimizer_type="RAdam").updater.load_state_dict(state)
    with pytest.raises(SettingsError, match="the same network flags"):
        SmallTraining(6, lora_plus=True).updater.load_state_dict(state)


def test_flags_that_change_on_the_way_act() -> None:
    """A state keeps what has moved; what the user sets is read from the flags of the run that goes on."""
    first = SmallTraining(6, lr_scheduler="linear", optimizer_args=("weight_decay=0.5",))
    first.run(3)
    second = SmallTraining(12, lr_scheduler="linear", optimizer_args=("weight_decay=0.1",), learning_rate=2e-3)
    second.updater.load_state_dict(through_a_file(first.updater.state_dict()))
    second.run(2)
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert [values["lr/unet"] for values in second.logged] == pytest.approx([2e-3 * 9 / 12, 2e-3 * 8 / 12])
