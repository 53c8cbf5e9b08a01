"""Block streaming and activation offload fulfil the contract of copies, and train bit for bit what a run without them does.

With all other switches: ``test_training_switches.py``, where nobody watches single operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lora_helpers import cases, fill, velocity
from torch import Tensor, nn
from transport_helpers import LateTransport

from library.lumina.next_dit import LARGE_MATRICES, NextDiT, NextDiTConfig
from library.memory import activation_offload, prepare
from library.memory.quantised import quantise_block
from library.memory.settings import MemorySettings
from networks import lora_lumina

CPU = torch.device("cpu")
CONFIG = NextDiTConfig(
    dim=48,
    num_layers=4,
    num_noise_refiners=1,
    num_context_refiners=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=24,
    ffn_dim=96,
    time_dim=48,
    cap_dim=32,
)
NETWORK_ARGS = {"rank_dropout": "0.2", "split_qkv": "true"}
ONE_FUNCTION: dict[str, str] = {}
"""Network arguments with which each Linear and its LoRA are computed as one function, which keeps the weight itself."""


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateTransport]:
    """A stand-in for a device, which everything here takes for CUDA."""
    made = LateTransport()
    monkeypatch.setattr(prepare, "CudaTransport", lambda device: made)
    monkeypatch.setattr(prepare, "can_stream", lambda device: True)
    monkeypatch.setattr(activation_offload.ActivationOffload.__init__, "__defaults__", ((), 1024, 4096))
    yield made
    made.finish()


class Run:
    """A model and its LoRA, trained for a few steps."""

    def __init__(
        self,
        settings: MemorySettings,
        change: Callable[[nn.Module], Any] = lambda model: None,
        dtype: torch.dtype = torch.float32,
        network_args: dict[str, str] = NETWORK_ARGS,
    ) -> None:
        torch.manual_seed(0)
        self.model = NextDiT(CONFIG).to(dtype).requires_grad_(False)
        change(self.model)
        streamed = prepare.streamed_blocks(list(self.model.layers), settings.blocks_to_swap, CPU)
        self.network = lora_lumina.create_network(1.0, 4, 2.0, None, [], self.model, **network_args)
        self.network.apply_to([], self.model, False, True)
        fill(self.network)
        self.network.train()
        blocks = [*self.model.noise_refiner, *self.model.context_refiner, *self.model.layers]
        self.stream = prepare.prepare_blocks(
            blocks, settings, CPU, streamed=streamed, resident=self.network.parameters()
        )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)

    def train(self) -> dict[str, Tensor]:
        """Returns losses, gradients, and what a pass without gradients gives, of two steps."""
        found = {}
        recorded = cases()
        for step in range(2):
            keys = torch.arange(step, step + recorded["ragged.latents"].shape[0])
            self.network.set_dropout_keys(keys)
            self.network.set_multiplier(0.0)
            with torch.no_grad():  # difference output preservation: the model without the network first
                base = velocity(self.model, recorded)
            self.network.set_multiplier(1.0)
            for part in range(2):  # gradient accumulation
                loss = (velocity(self.model, recorded) - base * (1 + part)).square().mean() + base.abs().mean()
                loss.backward()
                found[f"loss {step} {part}"] = loss.detach()
            for name, parameter in self.network.named_parameters():
                assert parameter.grad is not None
                found[f"gradient {step} {name}"] = parameter.grad.clone()
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                found[f"preview {step}"] = velocity(self.model, recorded)
        return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all()
        assert torch.equal(found[name], value), name


def quantised(model: NextDiT) -> None:
    """Gives the large matrices of the blocks fp8 weights with scales."""
    for block in model.layers:
        quantise_block(block, LARGE_MATRICES, "fp8", CPU)


SELECTIVE = {"gradient_checkpointing": True, "gradient_checkpointing_level": "selective"}
OPTIONS = {
    "streaming": {"blocks_to_swap": 3},
    "offload": {"cpu_offload_checkpointing": True},
    "checkpointing, streaming": {"gradient_checkpointing": True, "blocks_to_swap": 4},
    "checkpointing, offload": {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
    "streaming, offload": {"blocks_to_swap": 4, "cpu_offload_checkpointing": True},
    "all": {"gradient_checkpointing": True, "blocks_to_swap": 3, "cpu_offload_checkpointing": True},
    "selective, streaming": {**SELECTIVE, "blocks_to_swap": 3},
    "selective, all": {**SELECTIVE, "blocks_to_swap": 4, "cpu_offload_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("indices", ["2-3", "1", "0,2"])
def test_blocks_without_gradients_beside_trained_ones_train_the_same(
    transport: LateTransport, name: str, indices: str
) -> None:
    """Blocks before the first trained one have no backward pass; others pass on a gradient and need none."""
    args = {"train_blocks": "transformer", "train_block_indices": indices}
    recomputation = {key: value for key, value in OPTIONS[name].items() if key in SELECTIVE}
    expected = Run(MemorySettings(**recomputation), network_args=args).train()
    assert_same(Run(MemorySettings(**OPTIONS[name]), network_args=args).train(), expected)


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        *(("float32", name) for name in OPTIONS),
        ("bf16", "all"),
        ("fp8", "all"),
        ("fp8", "selective, all"),
    ],
)
def test_training_is_the_same(transport: LateTransport, weights: str, name: str) -> None:
    options = OPTIONS[name]
    change = quantised if weights == "fp8" else lambda model: None
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    recomputation = {key: value for key, value in options.items() if key in SELECTIVE}
    # Observed like the other one: a LoRA adds its part in another operation where operations are observed.
    with LateTransport().watched():
        expected = Run(MemorySettings(**recomputation), change, dtype).train()
    run = Run(MemorySettings(**options), change, dtype)
    with transport.watched():
        found = run.train()
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["streaming", "streaming, offload", "all", "selective, all"])
@pytest.mark.parametrize("weights", ["float32", "fp8"])
@pytest.mark.parametrize("is_watched", [False, True])
def test_a_linear_and_its_lora_as_one_function_train_the_same(
    transport: LateTransport, is_watched: bool, weights: str, name: str
) -> None:
    change = quantised if weights == "fp8" else lambda model: None
    options = OPTIONS[name]
    runs = []
    for given, place in (
        ({key: value for key, value in options.items() if key in SELECTIVE}, LateTransport()),
        (options, transport),
    ):
        run = Run(MemorySettings(**given), change, network_args=ONE_FUNCTION)
        assert all(lora._frozen[0] is not None for lora in run.network.loras)
        # Where operations are observed the LoRA's part is added in another one, which is not what runs on a GPU.
        with place.watched() if is_watched else contextlib.nullcontext():
            runs.append(run.train())
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("options", [OPTIONS["streaming"], OPTIONS["all"]], ids=["streaming", "all"])
def test_selective_recomputation_does_not_mind_in_which_order_weights_come(
    transport: LateTransport, options: dict[str, Any]
) -> None:
    selective: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_level": "selective"}

    def gradients(run: Run) -> dict[str, Tensor]:
        run.network.set_dropout_keys(torch.arange(cases()["ragged.latents"].shape[0]))
        # Backward of the first pass finds other blocks in the ring than its forward did.
        losses = [velocity(run.model, cases()).square().mean() for _ in range(2)]
        for loss in reversed(losses):
            loss.backward()
        found = {name: value.grad for name, value in run.network.named_parameters() if value.grad is not None}
        return {**found, "loss": losses[1].detach()}

    plain, run = Run(MemorySettings(**selective)), Run(MemorySettings(**{**options, **selective}))
    with LateTransport().watched():
        expected = gradients(plain)
    with transport.watched():
        found = gradients(run)
    assert_same(found, expected)
