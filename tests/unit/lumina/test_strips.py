"""Convolutions in strips: the same numbers, from strips of one size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_helpers import tiny_models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.lumina import autoencoder as autoencoder_module
from library.lumina import strips
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.strips import can_be_cut, convolution_in_strips, in_strips


class Shapes(TorchDispatchMode):
    """Notes the shapes of what is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.inputs.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


LAYERS = {
    "3 x 3": nn.Conv2d(6, 4, 3, padding=1),
    "downwards": nn.Conv2d(6, 4, 3, stride=2),
    "downwards, padded": nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "1 x 1": nn.Conv2d(6, 4, 1, bias=False),
    "5 x 3, in groups": nn.Conv2d(6, 4, (5, 3), stride=(3, 1), padding=(2, 1), groups=2),
}


@pytest.mark.parametrize("height", [9, 16, 23])
@pytest.mark.parametrize("name", LAYERS)
def test_strips_give_the_same_numbers(name: str, height: int) -> None:
    layer = LAYERS[name].double()
    assert can_be_cut(layer)
    x = torch.randn(2, 6, height, 7, generator=torch.Generator().manual_seed(height)).double()
    with torch.no_grad():
        expected = layer(x)
        for strip_bytes in (1, 2000, 5000):
            with Shapes() as seen:
                found = in_strips(layer, x, strip_bytes)
            # float64; a kernel may sum a smaller picture in another order.
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert len(set(seen.inputs)) == 1  # a kernel is looked for once
            assert len(seen.inputs) > 1


def test_as_many_strips_as_their_size_asks_for() -> None:
    layer, x = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), torch.zeros(1, 4, 64, 8)
    for strip_bytes, heights in ((2 * x.nbytes, [64]), (x.nbytes, [34, 34]), (x.nbytes // 2, [18] * 4), (1, [3] * 64)):
        with Shapes() as seen:
            assert in_strips(layer, x, strip_bytes).shape == x.shape
        assert [shape[2] for shape in seen.inputs] == heights


def test_layers_that_are_not_known_are_left_alone() -> None:
    assert not can_be_cut(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert not can_be_cut(nn.Conv2d(4, 4, 3, padding="same"))
    assert not can_be_cut(nn.Conv2d(4, 4, 3, dilation=2))
    assert not can_be_cut(nn.Conv2d(4, 4, 1, padding=1))  # a strip that lies outside of the picture


def test_nothing_is_cut_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    with Shapes() as seen:
        convolution_in_strips(layer, torch.zeros(1, 4, 64, 8))
    assert seen.inputs == [(1, 4, 64, 8)]


def test_an_autoencoder_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny_models()
    whole = Autoencoder(build_autoencoder(models.ae_config, dict(models.ae)), models.ae_config)
    strip_bytes = 2000
    monkeypatch.setattr(autoencoder_module, "convolution_in_strips", lambda layer, x: in_strips(layer, x, strip_bytes))
    cut = Autoencoder(build_autoencoder(models.ae_config, dict(models.ae)), models.ae_config)
    pixels = torch.rand(2, 3, 48, 72, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = whole.encode(pixels)
    with Shapes() as seen:
        found = cut.encode(pixels)
    assert len(seen.inputs) > 10 * sum(isinstance(module, nn.Conv2d) for module in whole.model.encoder.modules())
    # float32, over some twenty layers with normalisations.
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut.decode(latents), whole.decode(latents), rtol=1e-4, atol=1e-4)
