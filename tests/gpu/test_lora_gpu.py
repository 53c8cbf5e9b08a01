"""LoRA on CUDA: dropouts draw what they draw on the CPU, eager and compiled; in halves gradients are summed in float32."""

import pytest
import torch
from lora_helpers import fill
from torch import Tensor, nn

from networks.lora import LoRAModule
from networks.lora_dropout import DropoutKeys, kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_draws_equal_those_of_the_cpu():
    keys, module = torch.arange(64) * (2**57 + 12345), torch.tensor(2**62 + 7)
    expected = kept(keys, module, 1, 4096, 0.3)
    assert torch.equal(kept(keys.cuda(), module.cuda(), 1, 4096, 0.3).cpu(), expected)
    compiled = torch.compile(kept, fullgraph=True)
    for positions in (4096, 1, 24):  # of neurons, of the module as a whole, of ranks
        found = compiled(keys.cuda(), module.cuda(), 1, positions, 0.3).cpu()
        assert torch.equal(found, expected[:, :positions])


def test_a_compiled_module_with_all_dropouts_equals_the_eager_one():
    torch.manual_seed(0)
    base = nn.Linear(64, 128).requires_grad_(False).cuda()
    keys = DropoutKeys()
    keys.keys = torch.arange(4, device="cuda")
    settings = {"dropout": 0.3, "rank_dropout": 0.2, "module_dropout": 0.3, "dropout_keys": keys}
    lora = LoRAModule("lora_unet_x", base, rank=8, **settings).cuda()
    fill_on_cuda = LoRAModule("lora_unet_x", base, rank=8)
    fill(fill_on_cuda)
    lora.load_state_dict(fill_on_cuda.state_dict())
    lora.apply_to()
    x = torch.randn(4, 33, 64, device="cuda")
    # float32 (TF32 is off by default); fused kernels round in another order.
    torch.testing.assert_close(torch.compile(base, fullgraph=True)(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4, 16])  # also such as kernels that load 16 bytes cannot take as they are
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_and_its_lora_as_one_function(dtype: torch.dtype, rank: int):
    torch.manual_seed(0)
    base = nn.Linear(64, 128).requires_grad_(False).to("cuda", dtype)
    lora = LoRAModule("lora_unet_x", base, rank=rank, alpha=1.5)
    fill(lora, size=0.5)
    lora.cuda().apply_to()
    x = torch.randn(2, 333, 64, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 333, 128, device="cuda", dtype=dtype)
    trained = [x, lora.lora_down.weight, lora.lora_up.weight]
    out = base(x)
    assert type(out.grad_fn).__name__ == "LinearWithLoRABackward"
    found = [out, *torch.autograd.grad(out, trained, upstream)]

    def exact(*given: Tensor) -> Tensor:
        rows, down, up = given
        return (
            torch.nn.functional.linear(rows, base.weight.double(), base.bias.double())
            + rows @ down.T @ up.T * lora.scale
        )

    wide = [tensor.detach().double().requires_grad_() for tensor in trained]
    expected = [exact(*wide), *torch.autograd.grad(exact(*wide), wide, upstream.double())]
    for ours, wanted in zip(found, expected, strict=True):
        # Factors, rank activations, products and sums are rounded to halves, each by a quarter of the step on average.
        assert (ours.double() - wanted).norm() < torch.finfo(dtype).eps * wanted.norm()
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    if torch.version.hip is None:  # sums of halves in float32 are never halves but by chance
        for gradient in found[2:]:
            assert (gradient != gradient.to(dtype)).float().mean() > 0.5
