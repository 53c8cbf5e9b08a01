"""Replacing the large matrices of a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import SettingsError
from library.memory.quantised import QuantisedLinear, quantise_block, require_quantisation
from library.memory.settings import QuantisationSettings


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128, bias=False)
        self.inner = nn.Sequential(nn.Linear(128, 64, bias=False), nn.LayerNorm(64))
        self.small = nn.Linear(64, 4)
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.inner(self.first(x)))


@pytest.mark.parametrize("kind", ["fp8", "fp8_fast", "nf4"])
def test_the_named_matrices_are_replaced_and_nothing_else(kind: str) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    block, whole = Block(), Block()
    whole.load_state_dict(block.state_dict())
    expected = whole(torch.eye(64))
    quantise_block(block, ("first", "inner.0"), kind, "cpu")  # type: ignore[arg-type]
    assert isinstance(block.first, QuantisedLinear)
    assert isinstance(block.inner[0], QuantisedLinear)
    assert not block.first.training
    assert torch.equal(block.small.weight, whole.small.weight)
    assert (block.first.in_features, block.first.out_features) == (64, 128)
    assert not any(tensor.requires_grad for tensor in block.state_dict().values())
    if kind == "fp8_fast":
        assert block.first.fast
        return
    found = block(torch.eye(64))
    # 2.6 % (fp8) or 9.3 % (nf4) in each of two products, of about independent direction.
    error = float((found - expected).norm() / expected.norm())
    assert 0.005 < error < (0.05 if kind == "fp8" else 0.17)


def test_what_is_no_linear_without_bias_is_refused() -> None:
    with pytest.raises(TypeError, match="small"):
        quantise_block(Block(), ("small",), "fp8", "cpu")


@pytest.mark.parametrize(
    ("given", "transformer", "text_encoder"),
    [
        ({}, None, None),
        ({"fp8_base": True}, "fp8", "fp8"),
        ({"fp8_base_unet": True}, "fp8", None),
        ({"fp8_base": True, "fp8_base_unet": True}, "fp8", None),  # as in sd-scripts
        ({"fp8_base": True, "fp8_fast": True}, "fp8_fast", "fp8"),
        ({"nf4_base": True}, "nf4", None),
    ],
)
def test_which_flags_quantise_what(given: dict[str, bool], transformer: str | None, text_encoder: str | None) -> None:
    settings = QuantisationSettings(**given)
    assert (settings.transformer, settings.text_encoder) == (transformer, text_encoder)


def test_a_bitsandbytes_that_cannot_be_used_shows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from library.memory import nf4

    require_quantisation("nf4", torch.device("cpu"))

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this GPU\nand much more")

    monkeypatch.setattr(nf4.Nf4Linear, "forward", fail)
    with pytest.raises(SettingsError, match=r"--nf4_base: .* cannot be used on cpu \(no kernel for this GPU\)"):
        require_quantisation("nf4", torch.device("cpu"))
    require_quantisation("fp8", torch.device("cpu"))
    require_quantisation(None, torch.device("cpu"))
    with pytest.raises(SettingsError, match="--fp8_fast"):
        require_quantisation("fp8_fast", torch.device("cpu"))
