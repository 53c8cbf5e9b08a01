"""Drawing on CUDA: no step waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.lumina.next_dit import NextDiT, NextDiTConfig
from library.lumina.sampler import Conditioning, SamplingOptions, initial_noise, sample
from library.memory.attention import sdpa_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = NextDiTConfig(
    dim=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24, ffn_dim=384, time_dim=64, cap_dim=64
)


@pytest.fixture
def model() -> NextDiT:
    torch.manual_seed(0)
    return NextDiT(SIZES, sdpa_attention).to("cuda", torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("negative_tokens", [12, 3])
def test_no_step_waits_for_the_device(model: NextDiT, negative_tokens: int, together: bool) -> None:
    prompt, negative = (
        Conditioning(torch.randn(2, tokens, SIZES.cap_dim).to("cuda", torch.bfloat16))
        for tokens in (12, negative_tokens)
    )
    noise = initial_noise([0, 1], SIZES.channels, 128, 96).cuda()
    calls: list[int] = []

    def predict(latents: Tensor, lumina_time: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        # From the first step on; before it, the texts' masks and the noise are brought to the device.
        torch.cuda.set_sync_debug_mode("error")
        calls.append(len(latents))
        return model(latents.to(model.dtype), lumina_time, features, mask)

    def waiting(latents: Tensor, lumina_time: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return predict(latents, lumina_time, features, mask) * float(latents.abs().max())

    options = SamplingOptions(steps=6)
    try:
        drawn = sample(predict, noise, prompt, negative, options, together=together)
        with pytest.raises(RuntimeError, match="synchroniz"):  # the test can fail
            sample(waiting, noise, prompt, negative, options, together=together)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(drawn.isfinite().all())
    # Four of six steps are guided; the call that ended the second drawing is its first.
    assert calls == ([4] * 4 + [2] * 2 + [4] if together else [2] * (2 * 4 + 2) + [2])
