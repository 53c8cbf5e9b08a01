"""Every optimizer trains a LoRA; looking at its weights and interrupting it change no bit."""

import warnings

import pytest
import torch
from optimizer_helpers import SmallTraining, equal, through_a_file

from library.training.optimizer_names import OPTIMIZERS, TORCH_OPTIMIZERS, finds_its_own_rate, is_schedule_free

STEPS = 10
OTHERS = [name for name in TORCH_OPTIMIZERS if name not in ("LBFGS", "SparseAdam", "Muon", "AdamW")]
DOTTED = ["torch.optim.Adafactor", "bitsandbytes.optim.AdEMAMix8bit", "optimizer_helpers.FakePlusScheduleFree"]
NAMES = [*OPTIMIZERS, *OTHERS, *DOTTED]


def flags(name: str) -> dict:
    """Returns settings under which this optimizer learns something in a few steps."""
    values: dict = {"optimizer_type": name}
    if finds_its_own_rate(name):
        # The estimate starts at 1e-6 and grows over hundreds of steps; a test has ten.
        values |= {"learning_rate": 1.0, "optimizer_args": ("d0=1e-5",)}
    elif "adafactor" not in name.lower():
        values["lora_plus"] = True
    if "sgd" in name.lower() and not finds_its_own_rate(name):
        values["learning_rate"] = 0.1
    if not (is_schedule_free(name) or name in ("adafactor", "dadaptsgd")):
        values |= {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    return values


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_goes_on_bit_for_bit(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # they keep states unpaged
        whole = SmallTraining(STEPS, **flags(name))
        start = whole.tensors()
        losses = whole.run(STEPS)
        assert losses[-1] < losses[0]
        assert all(not torch.equal(a, b) for a, b in zip(start, whole.tensors(), strict=True))

        first = SmallTraining(STEPS, **flags(name))
        found = []
        for _ in range(5):
            found += first.run(1)
            with first.weights.in_use():
                first.loss()
        state = through_a_file(first.updater.state_dict())
        second = SmallTraining(STEPS, **flags(name))
        with torch.no_grad():
            for parameter, value in zip(second.updater.parameters, first.tensors(), strict=True):
                parameter.copy_(value)
        second.updater.load_state_dict(state)
        found += second.run(STEPS - 5)
    assert found == losses
    assert equal(second.tensors(), whole.tensors())
    assert second.logged == whole.logged[5:]
    last = through_a_file(second.updater.state_dict())
    expected = whole.updater.state_dict()
    assert _flat(last) == _flat(expected)


def _flat(state: object, path: str = "") -> dict:
    if isinstance(state, dict):
        return {key: value for name, entry in state.items() for key, value in _flat(entry, f"{path}/{name}").items()}
    if isinstance(state, list):
        return _flat(dict(enumerate(state)), path)
    return {path: (state.dtype, state.tolist()) if isinstance(state, torch.Tensor) else state}


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_one_kernel_computes_what_single_steps_do_and_takes_over_their_state(name: str) -> None:
    values = flags(name)
    slow = {**values, "optimizer_args": (*values.get("optimizer_args", ()), "fused=False")}
    plain, one_kernel = SmallTraining(STEPS, **slow), SmallTraining(STEPS, **values)
    plain.run(5)
    state = through_a_file(plain.updater.state_dict())
    with torch.no_grad():
        for parameter, value in zip(one_kernel.updater.parameters, plain.tensors(), strict=True):
            parameter.copy_(value)
    one_kernel.updater.load_state_dict(state)
    assert all(group["fused"] for group in one_kernel.updater.optimizer.param_groups)
    plain.run(5)
    one_kernel.run(5)
    for found, expected in zip(one_kernel.tensors(), plain.tensors(), strict=True):
        # Both compute in float32, in another order: some roundings of 6e-8 in each of five steps.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_eight_bit_states_are_eight_bit_before_and_after() -> None:
    first = SmallTraining(STEPS, optimizer_type="AdamW8bit")
    first.run(3)
    state = through_a_file(first.updater.state_dict())
    second = SmallTraining(STEPS, optimizer_type="AdamW8bit")
    second.updater.load_state_dict(state)
    for training in (first, second):
        kinds = {entry["state1"].dtype for entry in training.optimizer.state.values()}
        assert kinds == {torch.uint8, torch.float32}  # tensors below 4096 values are kept in float32


@pytest.mark.parametrize("name", ["Adafactor", "AdamW8bit", "Prodigy", "AdamWScheduleFree"])
def test_states_finer_than_the_parameters_stay_fine(name: str) -> None:
    """With --full_bf16, torch's own way of loading would round float32 states to the parameters' dtype."""
    values = {**flags(name), "dtype": torch.bfloat16, "lora_plus": False}
    whole = SmallTraining(6, **values)
    losses = whole.run(6)
    first, second = SmallTraining(6, **values), SmallTraining(6, **values)
    found = first.run(3)
    with torch.no_grad():
        for parameter, value in zip(second.updater.parameters, first.tensors(), strict=True):
            parameter.copy_(value)
    second.updater.load_state_dict(through_a_file(first.updater.state_dict()))
    assert found + second.run(3) == losses
    assert equal(second.tensors(), whole.tensors())


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "torch.optim.Adam"])
def test_the_values_in_use(name: str) -> None:
    """Schedule-free optimizers are used at their average, other optimizers at what they train."""
    training = SmallTraining(STEPS, optimizer_type=name, learning_rate=0.01)
    training.run(STEPS)
    trained = training.tensors()
    with training.weights.in_use():
        used = training.tensors()
        assert not training.network.training
        if is_schedule_free(name):
            group = training.optimizer.param_groups[0]
            share = group["betas"][0] if "betas" in group else group["momentum"]
            # The trained point lies between the average x and the base sequence z: y = share * x + (1 - share) * z.
            z = [training.optimizer.state[parameter]["z"] for parameter in training.updater.parameters]
            for y, x, base in zip(trained, used, z, strict=True):
                # Two roundings of float32 (2^-24 each) of sums whose parts are up to ten times larger.
                torch.testing.assert_close(share * x + (1 - share) * base, y, rtol=2e-6, atol=1e-7)
            assert not equal(used, trained)
        else:
            assert equal(used, trained)
    assert equal(training.tensors(), trained)
    assert training.network.training


def test_an_error_while_in_use_still_puts_the_training_values_back() -> None:
    training = SmallTraining(STEPS, optimizer_type="AdamWScheduleFree")
    training.run(3)
    trained = training.tensors()
    with pytest.raises(OSError, match="full"), training.weights.in_use():
        raise OSError("disk full")
    assert equal(training.tensors(), trained)
    training.run(1)  # the optimizer is back in its training mode
