"""Recomputation keeps less, and computes again what it is meant to; what it trains is in ``test_training_switches.py``."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from attention_helpers import over_sequences
from lora_helpers import cases, fill, velocity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from library.lumina.next_dit import AttentionFn, NextDiT, NextDiTConfig, plain_attention
from library.memory import prepare
from library.memory.attention_masks import by_sequences
from library.memory.settings import MemorySettings
from networks import lora_lumina

CPU = torch.device("cpu")
CONFIG = NextDiTConfig(
    dim=96,
    num_layers=2,
    num_noise_refiners=1,
    num_context_refiners=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    ffn_dim=384,
    time_dim=48,
    cap_dim=32,
)
LEVELS: dict[str, MemorySettings] = {
    "none": MemorySettings(),
    "selective": MemorySettings(gradient_checkpointing=True, gradient_checkpointing_level="selective"),
    "full": MemorySettings(gradient_checkpointing=True),
}


class Run:
    """A model with a LoRA beside everything, prepared by the settings."""

    def __init__(self, settings: MemorySettings, attention: AttentionFn = plain_attention, drops: bool = True) -> None:
        torch.manual_seed(0)
        self.model = NextDiT(CONFIG, attention).requires_grad_(False)
        blocks = [*self.model.noise_refiner, *self.model.context_refiner, *self.model.layers]
        # Without dropouts each Linear and its LoRA are one function.
        arguments: dict[str, Any] = {"neuron_dropout": 0.1, "rank_dropout": "0.2"} if drops else {}
        self.network = lora_lumina.create_network(1.0, 4, 2.0, None, [], self.model, **arguments)
        self.network.apply_to([], self.model, False, True)
        fill(self.network)
        self.network.train()
        prepare.prepare_blocks(blocks, settings, CPU, preserve_rng_state=False)

    def forward(self) -> Tensor:
        recorded = cases()
        self.network.set_dropout_keys(torch.arange(recorded["ragged.latents"].shape[0]))
        return velocity(self.model, recorded).float().square().mean()

    def results(self) -> list[Tensor]:
        """Returns the loss and every gradient."""
        loss = self.forward()
        loss.backward()
        gradients = []
        for parameter in self.network.parameters():
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            parameter.grad = None
        return [loss.detach(), *gradients]


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("level", ["selective", "full"])
def test_bounds_of_sequences_are_found_anew_in_backward(level: str, drops: bool) -> None:
    # Forward, the second block of the captions finds what the first one made; backward comes to it from other masks.
    expected = Run(LEVELS["none"], by_sequences(over_sequences), drops).results()
    found = Run(LEVELS[level], by_sequences(over_sequences), drops).results()
    for ours, wanted in zip(found, expected, strict=True):
        # The LoRA's part is added in another operation while results are kept: one rounding in float32.
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("drops", [True, False])
def test_selective_computes_the_wide_products_again_and_nothing_else(drops: bool) -> None:
    operations = {}
    for level, settings in LEVELS.items():
        run = Run(settings, drops=drops)
        run.results()
        with FlopCounterMode(display=False) as counter:
            run.results()
        operations[level] = counter.get_total_flops()
    again = operations["full"] - operations["none"]
    share = (operations["selective"] - operations["none"]) / again
    # w1 and w3 are 8 of 15 parts of the products (qkv 2, out 1, w1, w2, w3 4 each; grouped heads half as many), and the
    # LoRA beside everything is computed again. Attention, which is a part of full recomputation, is not.
    assert 0.4 < share < 0.6


def peak_of_a_pass(level: str, drops: bool) -> int:
    """Returns the most bytes that tensors of a forward and backward pass take at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    run = Run(LEVELS[level], drops=drops)
    run.results()

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages: dict[int, int] = {}
            self.now = self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, (list, tuple)) else [found]:
                if isinstance(tensor, Tensor):
                    self.note(tensor.untyped_storage())
            return found

        def note(self, storage: torch.UntypedStorage) -> None:
            if storage._cdata in self.storages:
                return
            self.storages[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

        def gone(self, key: int) -> None:
            self.now -= self.storages.pop(key)

    with Live() as live:
        run.results()
    return live.peak


@pytest.mark.parametrize("drops", [True, False])
def test_each_level_keeps_less(drops: bool) -> None:
    peaks = {level: peak_of_a_pass(level, drops) for level in LEVELS}
    # Of four blocks one is whole in memory while its backward pass runs: measured 0.75.
    assert peaks["full"] < peaks["selective"] < 0.85 * peaks["none"]


def test_blocks_of_a_kind_share_what_was_compiled_and_sizes_do_too() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from library.memory.compilation import compile_blocks

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    # Two refiners of a kind: the first one's input has no gradient.
    model = NextDiT(dataclasses.replace(CONFIG, num_noise_refiners=2, num_context_refiners=2)).requires_grad_(False)
    network = lora_lumina.create_network(1.0, 4, 2.0, None, [], model)
    network.apply_to([], model, False, True)
    compile_blocks([*model.noise_refiner, *model.context_refiner, *model.layers], counter)  # type: ignore[arg-type]

    def run(batch: int, height: int, width: int, lengths: tuple[int, ...]) -> None:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        captions = torch.randn(batch, max(lengths), CONFIG.cap_dim)
        latents, times = torch.randn(batch, CONFIG.channels, height, width), torch.rand(batch)
        found = model(latents, times, captions, None if bool(mask.all()) else mask)
        if torch.is_grad_enabled():
            found.sum().backward()

    with torch.no_grad():
        run(2, 8, 8, (5, 3))  # a preview compiles nothing
    assert counter.frame_count == 0
    run(2, 8, 8, (5, 3))
    # The noise refiner has no mask, the context refiner no modulation, layers have both.
    assert counter.frame_count == 3
    for size in ((2, 8, 8, (7, 6)), (2, 4, 12, (5, 9)), (3, 6, 8, (2, 5, 4))):
        run(*size)
    assert counter.frame_count == 3
    run(2, 8, 8, (5, 5))  # positions are the same for all samples; layers are as noise refiners
    assert counter.frame_count == 5
    for length in (6, 7):
        run(1, 8, 8, (length,))  # of one sample torch makes code of its own, the same for noise refiners and layers
    assert counter.frame_count == 7
