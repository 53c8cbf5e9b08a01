"""LoRA dropouts on CUDA: the same draws as on the CPU, eager and compiled."""

import pytest
import torch
from lora_helpers import fill
from torch import nn

from networks.lora import DropoutKeys, LoRAModule, kept

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
