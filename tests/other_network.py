"""A network module as another program brings it, for ``--network_module=other_network``: the ways of LyCORIS, in small.

It finds what it trains by class names, computes in float32 whatever the model has, reads the model's weights, draws from
torch's generators, keeps in its files what is computed from its parameters, and checks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PARTS = {"attention": "JointAttention", "mlp": "FeedForward", "nothing": "CrossAttention"}


class OtherModule(nn.Module):
    """Beside a Linear; its change is scalar * up @ down, and a file holds scalar * up."""

    def __init__(self, name: str, linear: nn.Linear, rank: int, dropout: float, reads_weights: bool) -> None:
        super().__init__()
        self.lora_name, self.linear, self.dropout, self.multiplier = name, (linear,), dropout, 1.0
        if reads_weights:
            linear.weight.sum().item()
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scalar = nn.Parameter(torch.ones(()))

    def apply_to(self) -> None:
        self.original, self.linear[0].forward = self.linear[0].forward, self.forward

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear[0].weight.detach().float()
        changed = weight + self.multiplier * self.scalar * (self.up @ self.down)
        return self.original(x) + F.dropout(F.linear(x, changed - weight), self.dropout, self.training)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination[f"{prefix}down"] = self.down.detach()
        destination[f"{prefix}up"] = (self.up * self.scalar).detach()
        return destination


class OtherNetwork(nn.Module):
    """All modules; attached ones are its children."""

    def __init__(self, encoders: Sequence[nn.Module], model: nn.Module, rank: int, **args: Any) -> None:
        super().__init__()
        part = PARTS[args.get("train", "attention")]
        settings = (rank, float(args.get("dropout") or 0), args.get("reads_weights") == "yes")
        self.text_encoder_loras: list[OtherModule] = []
        self.unet_loras = [
            OtherModule(f"lora_unet_{path}_{name}".replace(".", "_"), linear, *settings)
            for path, module in model.named_modules()
            if type(module).__name__ == part
            for name, linear in module.named_modules()
            if isinstance(linear, nn.Linear)
        ]

    @property
    def loras(self) -> list[OtherModule]:
        return self.text_encoder_loras + self.unet_loras

    def apply_to(self, encoders: Any, model: Any, text: bool, unet: bool) -> None:
        for lora in self.loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def load_weights(self, file: str) -> dict[str, list[str]]:
        missing, unexpected = self.load_state_dict(load_file(file), strict=False)
        return {"missing keys": [name for name in missing if "scalar" not in name], "unexpected keys": unexpected}

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        save_file(
            {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}, file, metadata
        )

    def prepare_optimizer_params(self, text_lr: float | None, unet_lr: float | None, lr: float) -> list[Any]:
        return [{"params": self.parameters(), "lr": unet_lr or lr}]

    def merge_to(self, encoders: Any, model: Any, tensors: Any, dtype: torch.dtype, device: str) -> None:
        for lora in self.unet_loras:  # whatever the multiplier
            lora.linear[0].weight.data += tensors[f"{lora.lora_name}.up"] @ tensors[f"{lora.lora_name}.down"]


def create_network(
    multiplier: float, rank: int | None, alpha: float, vae: Any, encoders: Any, model: nn.Module, **args: Any
) -> OtherNetwork:
    return OtherNetwork(encoders, model, rank or 4, **args)


def create_network_from_weights(
    multiplier: float, file: str, vae: Any, encoders: Any, model: nn.Module, **args: Any
) -> tuple[OtherNetwork, dict[str, Tensor]]:
    tensors = load_file(file)
    network = OtherNetwork(encoders, model, 4)
    network.unet_loras = [lora for lora in network.unet_loras if f"{lora.lora_name}.up" in tensors]
    for lora in network.unet_loras:
        lora.up.data, lora.down.data = tensors[f"{lora.lora_name}.up"], tensors[f"{lora.lora_name}.down"]
    return network, tensors
