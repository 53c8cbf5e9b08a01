"""What must be equal with a LoRA: merged and attached, mapped weights untouched, compiled and eager, recomputed and not."""

import hashlib

import pytest
import torch
from lora_helpers import GOLDEN, cases, fill, gemma2, largest_relative_difference, small_next_dit, velocity
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.lumina.filling import in_turn
from library.memory.half_linear import HalfLinear
from networks.lora import LoRAModule
from networks.lora_dropout import DropoutKeys
from networks.lora_lumina import create_network, create_network_from_weights

GOLDEN_LORA = GOLDEN / "lora.safetensors"


def load(model, multiplier=1.0):
    return create_network_from_weights(multiplier, GOLDEN_LORA, None, None, model, for_inference=True)[0]


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # float32: two orders of summation.
        (torch.float32, 1e-5),
        # bfloat16: either result is 1.2 % from the float32 one, merged or attached; twice that between them.
        (torch.bfloat16, 0.025),
    ],
)
def test_merged_equals_attached(dtype, tolerance, multiplier):
    recorded = {
        name: tensor.to(dtype) if "latents" in name or "feats" in name else tensor for name, tensor in cases().items()
    }
    attached_model, merged_model = small_next_dit(dtype), small_next_dit(dtype)
    base = velocity(small_next_dit(dtype), recorded)
    load(attached_model, multiplier).apply_to()
    load(merged_model, multiplier).merge_to(None, merged_model)
    attached, merged = velocity(attached_model, recorded), velocity(merged_model, recorded)
    assert merged.dtype == attached.dtype == dtype
    assert largest_relative_difference(merged, attached) < tolerance
    assert largest_relative_difference(base, attached) > 3 * tolerance, "the LoRA must matter more than the tolerance"


def test_merging_is_done_in_float32_and_rounded_once():
    model = small_next_dit(torch.bfloat16)
    before = model.layers[0].attention.qkv.weight.clone()
    network = load(model, 0.7)
    lora = network.get_submodule("lora_unet_layers_0_attention_qkv")
    network.merge_to(None, model)
    expected = before.float() + 0.7 * 2 / 5 * (lora.lora_up.weight @ lora.lora_down.weight)
    assert torch.equal(model.layers[0].attention.qkv.weight, expected.bfloat16())
    assert not model.layers[0].attention.qkv.weight.requires_grad


def test_merging_with_given_weights_dtype_and_device():
    model, source = small_next_dit(), small_next_dit()
    _, weights = create_network_from_weights(1.0, GOLDEN_LORA, None, None, source)
    network = create_network_from_weights(1.0, GOLDEN_LORA, None, None, model)[0]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.merge_to(None, model, weights, torch.bfloat16, "cpu")
    load(source).merge_to(None, source, None, torch.bfloat16)
    assert torch.equal(model.layers[1].feed_forward.w2.weight, source.layers[1].feed_forward.w2.weight)
    assert model.layers[1].feed_forward.w2.weight.dtype == torch.bfloat16


def test_multiplier_zero_merges_nothing_and_attaches_nothing_bit_for_bit():
    recorded, model = cases(), small_next_dit()
    base = velocity(model, recorded)
    weight = model.layers[0].attention.qkv.weight
    load(model, 0.0).merge_to(None, model)
    assert model.layers[0].attention.qkv.weight is weight
    load(model, 0.0).apply_to()
    assert torch.equal(velocity(model, recorded), base)


def test_merging_into_mapped_weights_does_not_write_to_the_file(tmp_path):
    file = tmp_path / "base.safetensors"
    save_file({"weight": torch.randn(8, 6)}, file)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    with safe_open(file, framework="pt") as opened:
        base = nn.Linear(6, 8, bias=False)
        mapped = opened.get_tensor("weight")
        base.weight = nn.Parameter(mapped, requires_grad=False)
        values = mapped.clone()
        lora = LoRAModule("lora_unet_x", base, rank=2)
        fill(lora, size=1.0)
        lora.merge()
        assert torch.equal(mapped, values)
        assert not torch.equal(base.weight, values)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_several_loras_attached_equal_several_merged():
    recorded = cases()
    attached, merged = small_next_dit(), small_next_dit()
    for multiplier in (1.0, 0.5):
        load(attached, multiplier).apply_to()
        load(merged, multiplier).merge_to()
    # float32, two orders of summation
    assert largest_relative_difference(velocity(merged, recorded), velocity(attached, recorded)) < 1e-5
    once = small_next_dit()
    load(once, 1.5).merge_to()
    assert largest_relative_difference(velocity(once, recorded), velocity(attached, recorded)) < 1e-5


def test_several_merged_while_reading_are_rounded_once():
    model = small_next_dit()
    name, weight = "layers.0.attention.qkv.weight", model.layers[0].attention.qkv.weight.detach().bfloat16()
    changes = [load(model, multiplier).weight_changes(model) for multiplier in (1.0, -0.7, 0.4)]
    expected = weight.float()
    for change in changes:
        expected = change[name](expected)
    merged = in_turn(changes)(name, weight)
    assert torch.equal(merged, expected.bfloat16())
    rounded_each_time = weight
    for change in changes:
        rounded_each_time = change[name](rounded_each_time)
    assert not torch.equal(merged, rounded_each_time), "the test would not see rounding in between"
    assert torch.equal(in_turn(changes[:1])(name, weight), changes[0][name](weight))
    assert in_turn(changes)("other", weight) is weight


def test_quantised_weights_take_no_merge():
    base = nn.Linear(6, 8, bias=False)
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(RuntimeError, match="merge before quantising"):
        LoRAModule("lora_unet_x", base, rank=2).merge()
    with pytest.raises(RuntimeError, match="merge before quantising"):
        LoRAModule("lora_unet_x", HalfLinear(torch.ones(8, 6)), rank=2).merge()


def test_gemma2_merged_equals_attached():
    torch.manual_seed(0)
    attached, ids = gemma2(), torch.arange(10).view(2, 5)
    merged = gemma2()
    merged.load_state_dict(attached.state_dict())
    dit = small_next_dit()

    def network(model):
        made = create_network(1.0, 4, 4.0, None, [model], dit)
        fill(made, size=0.3)
        return made.eval()

    base = attached(ids).last_hidden_state
    network(attached).apply_to(apply_unet=False)
    network(merged).merge_to()
    found = merged(ids).last_hidden_state
    # float32, two orders of summation
    assert largest_relative_difference(found, attached(ids).last_hidden_state) < 1e-5
    assert largest_relative_difference(found, base) > 1e-2


# ---- dropouts under recomputation and compilation


class Tiny(nn.Module):
    """Two Linears with a non-linearity between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        return x + self.second(torch.nn.functional.silu(self.first(x)))


def attached_tiny():
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    keys = DropoutKeys()
    keys.keys = torch.tensor([11, 22, 33])
    settings = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3, "dropout_keys": keys}
    loras = nn.ModuleList(LoRAModule(name, getattr(model, name), rank=4, **settings) for name in ("first", "second"))
    fill(loras, size=0.5)
    for lora in loras:
        lora.apply_to()
    return model, loras, keys


def outputs_and_gradients(model, loras, call):
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    loras.zero_grad()
    out = call(model, x)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in loras.parameters())]


def test_recomputation_drops_the_same():
    model, loras, _ = attached_tiny()
    plain = outputs_and_gradients(model, loras, lambda m, x: m(x))
    again = outputs_and_gradients(model, loras, lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_a_module_with_all_dropouts_compiles_as_one_graph():
    model, loras, keys = attached_tiny()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = outputs_and_gradients(model, loras, lambda m, x: m(x))
    found = outputs_and_gradients(model, loras, lambda m, x: compiled(x))
    # The same operations on the same numbers: the eager backend runs the captured graph as it is.
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    keys.keys = torch.tensor([1, 2, 3])
    other = outputs_and_gradients(model, loras, lambda m, x: compiled(x))
    assert not torch.equal(other[0], found[0]), "the keys must be an input of the graph, not a constant in it"
    assert torch.equal(other[0], outputs_and_gradients(model, loras, lambda m, x: m(x))[0])


def test_blocks_share_one_graph():
    class Counter:
        graphs = 0

        def __call__(self, graph, inputs):
            self.graphs += 1
            return graph.forward

    blocks = [attached_tiny()[0] for _ in range(4)]
    counter = Counter()
    torch._dynamo.reset()
    x = torch.randn(3, 7, 12)

    @torch.compile(fullgraph=True, backend=counter)
    def call(block, x):
        return block(x)

    for block in blocks:
        call(block, x)
    assert counter.graphs <= 2
