"""A Next-DiT with quantised blocks: how far it is from the whole one, what must be equal, and what loading takes."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import ROOT, Job, make_job
from lora_helpers import fill
from quantisation_helpers import emulated_product, realistic_weight, relative_error
from torch import Tensor, nn
from trainer_helpers import fill_network, made_trainer

from library.lumina import loading
from library.lumina.gemma2 import LARGE_MATRICES as OF_GEMMA2
from library.lumina.next_dit import LARGE_MATRICES, FeedForward, NextDiT, NextDiTConfig
from library.memory import fp8
from library.memory.half_attention import in_halves
from library.memory.quantised import QuantisedLinear, quantise_block
from networks import lora_lumina

KINDS = ["fp8", "fp8_fast", "nf4"]
# Bounds on the relative errors of velocity and LoRA gradients, 1.4 times what this model has. One matrix rounds by 2.6 %
# (fp8), 3.7 % (fp8_fast) or 9.3 % (nf4); the residual stream carries most of the velocity past the matrices, and errors of
# several layers add up at random.
BOUNDS = {"fp8": (0.03, 0.05), "fp8_fast": (0.04, 0.065), "nf4": (0.11, 0.18)}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(fp8, "scaled_product", emulated_product)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def blocks_of(model: Any) -> list[nn.Module]:
    return [*model.noise_refiner, *model.context_refiner, *model.layers]


CONFIG = NextDiTConfig(
    dim=192, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=96, ffn_dim=256, time_dim=64, cap_dim=64
)


def realistic_next_dit() -> NextDiT:
    """A small Next-DiT of realistic matrices of variance 1 / inputs; as in the real one, 64 divides every row."""
    torch.manual_seed(0)
    model = NextDiT(CONFIG).requires_grad_(False)
    for number, block in enumerate(blocks_of(model)):
        for path in LARGE_MATRICES:
            weight = block.get_submodule(path).weight
            new = realistic_weight(*weight.shape, seed=number)  # type: ignore[misc]
            weight.copy_(new * (len(weight) ** 0.5 / new.norm()))  # type: ignore[operator, arg-type]
    return model


def quantised(model: NextDiT, kind: str) -> NextDiT:
    """Returns a copy with quantised blocks."""
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        quantise_block(block, LARGE_MATRICES, kind, "cpu")  # type: ignore[arg-type]
    return model


def with_lora(model: NextDiT) -> Any:
    network = lora_lumina.create_network(1.0, 4, 4, None, None, model)
    fill(network)
    network.apply_to(None, model)
    return network


def results(model: NextDiT, network: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns velocity, gradient of the caption features, and the LoRA's gradients as one vector."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, CONFIG.channels, 8, 12, generator=generator)
    features = torch.randn(2, 9, CONFIG.cap_dim, generator=generator).requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    velocity = model(latents, torch.tensor([0.3, 0.8]), features, mask)
    (velocity - latents).square().mean().backward()
    assert features.grad is not None
    gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    return velocity.detach(), features.grad, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_stay_near_the_whole_model(kind: str) -> None:
    model = realistic_next_dit()
    velocity, _, gradients = results(*_both(copy.deepcopy(model)))
    found = results(*_both(quantised(model, kind)))
    errors = relative_error(found[0], velocity), relative_error(found[2], gradients)
    assert all(error < bound for error, bound in zip(errors, BOUNDS[kind], strict=True)), errors
    assert min(errors) > 1e-3, "nothing was quantised"


def _both(model: NextDiT) -> tuple[NextDiT, Any]:
    return model, with_lora(model)


def in_fp16(model: NextDiT, kind: str | None = None) -> NextDiT:
    """Returns a copy that multiplies and attends in fp16."""
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        quantise_block(block, LARGE_MATRICES, kind, "cpu", in_halves=True)  # type: ignore[arg-type]
        block.attention.attention = in_halves(block.attention.attention)  # type: ignore[union-attr, assignment, arg-type]
    return model


def test_products_in_fp16_are_nearer_to_float32_than_bf16() -> None:
    model = realistic_next_dit()
    velocity, _, gradients = results(*_both(copy.deepcopy(model)))
    found = {"fp16": results(*_both(in_fp16(model))), "bf16": results(*_both(copy.deepcopy(model).bfloat16()))}
    errors = {
        name: (relative_error(velocity_too, velocity), relative_error(gradients_too, gradients))
        for name, (velocity_too, _, gradients_too) in found.items()
    }
    # 11 bits instead of 8, and no rounding of the residual stream.
    assert all(0 < fp16 < bf16 / 8 for fp16, bf16 in zip(errors["fp16"], errors["bf16"], strict=True)), errors
    assert max(errors["fp16"]) < 1e-3  # twice what this model has


def test_quantised_weights_are_multiplied_in_fp16() -> None:
    model = realistic_next_dit()
    # The same codes: only products are rounded otherwise.
    expected, found = results(*_both(quantised(model, "fp8"))), results(*_both(in_fp16(model, "fp8")))
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 < relative_error(ours, theirs) < 3e-3  # twice what the captions' gradient has, behind most roundings


def test_activations_may_be_larger_than_fp16_holds() -> None:
    model = realistic_next_dit()
    for block in blocks_of(model):  # 1e6 in the residual stream, 1e8 behind SwiGLU
        block.ffn_norm2.weight *= 1e6  # type: ignore[union-attr, operator]
        for path in ("feed_forward.w1", "feed_forward.w3"):
            block.get_submodule(path).weight *= 1e4  # type: ignore[operator, arg-type]
    whole, bf16 = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    seen: list[float] = []
    for module in whole.modules():
        if isinstance(module, FeedForward):
            module.w2.register_forward_hook(lambda w2, given, out: seen.append(float(given[0].detach().abs().max())))
    expected = results(*_both(whole))
    assert min(seen) > 1e8
    for ours, theirs, wanted in zip(results(*_both(in_fp16(model))), results(*_both(bf16)), expected, strict=True):
        assert relative_error(ours, wanted) < relative_error(theirs, wanted) / 4
    assert not results(*_both(copy.deepcopy(model).half()))[0].isfinite().all()  # what fp16 alone does


def _is_code(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.uint8, torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", [None, "fp8", "fp8_fast", "nf4"])
def test_no_whole_weight_is_kept_for_backward(kind: str | None) -> None:
    model = realistic_next_dit()
    shapes = {tuple(block.get_submodule(path).weight.shape) for block in blocks_of(model) for path in LARGE_MATRICES}  # type: ignore[union-attr]
    shapes |= {shape[::-1] for shape in shapes}
    if kind is not None:
        model = quantised(model, kind)
    codes = {tensor.data_ptr() for tensor in model.state_dict().values() if _is_code(tensor)}
    kept: list[Tensor] = []
    network = with_lora(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        results(model, network)
    whole = [tensor for tensor in kept if tensor.is_floating_point() and tuple(tensor.shape) in shapes]
    whole = [tensor for tensor in whole if tensor.element_size() > 1]
    assert bool(whole) == (kind is None)
    kept_codes = [tensor for tensor in kept if _is_code(tensor)]
    assert bool(kept_codes) == (kind is not None)
    assert all(tensor.data_ptr() in codes for tensor in kept_codes)


@pytest.mark.parametrize("flags", [["--fp8_base"], ["--fp8_base_unet"], ["--nf4_base"]], ids=str)
def test_base_weights_are_merged_before_quantising(job: Job, tmp_path: Path, flags: list[str]) -> None:
    trainer = made_trainer(job.train_flags(tmp_path, "--network_alpha=2"), last="build_network")
    fill_network(trainer.network, size=0.1)
    file = tmp_path / "base.safetensors"
    trainer.network.save_weights(file, None, {})
    more = ["--base_weights", str(file), "--base_weights_multiplier", "0.5"]
    found = made_trainer(job.train_flags(tmp_path, *more, *flags), last="load_models")
    dit = loading.load_next_dit(trainer.files.dit, torch.float32, show_progress=False)
    encoder = loading.load_gemma2(trainer.files, torch.float32, 256, "", show_progress=False)
    network, weights = lora_lumina.create_network_from_weights(0.5, file, None, [encoder.model], dit)
    network.merge_to([encoder.model], dit, weights)
    settings = found.config.quantisation
    for block in blocks_of(dit):
        quantise_block(block, LARGE_MATRICES, settings.transformer, "cpu")
    if settings.text_encoder is not None:
        for layer in encoder.model.layers:
            quantise_block(layer, OF_GEMMA2, settings.text_encoder, "cpu")
    for model, expected in ((found.dit, dit), (found.text_encoder.model, encoder.model)):
        ours, theirs = model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name].float(), tensor.float()), name
    assert isinstance(found.dit.layers[0].attention.qkv, QuantisedLinear)
    of_gemma2 = found.text_encoder.model.layers[0].mlp.up_proj
    assert isinstance(of_gemma2, QuantisedLinear) == (settings.text_encoder is not None)
    # Norms, embedders, modulation and the final layer keep the run's precision.
    others = [module for module in found.dit.modules() if isinstance(module, nn.Linear)]
    assert {module.weight.dtype for module in others} == {torch.float32}
    assert len(others) == 5 + 1 + sum(block.modulated for block in blocks_of(found.dit))


def test_a_block_is_finished_before_the_next_one_is_read(job: Job) -> None:
    files = loading.inspect_models(
        loading.ModelPaths(*(job.models / f"quickstart_{part}.safetensors" for part in ("dit", "gemma2", "ae")))
    )
    order: list[str] = []

    def change(name: str, tensor: Tensor) -> Tensor:
        order.append(name.partition(".attention")[0].partition(".feed")[0])
        return tensor

    def finish(block: nn.Module, large: Any) -> None:
        order.append("finished")
        assert large == LARGE_MATRICES
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in block.state_dict().values())

    loading.load_next_dit(files.dit, torch.bfloat16, None, False, change, finish)
    read = [name for name, following in itertools.pairwise(order) if following == "finished"]
    blocks = [name.split(".ffn_norm2")[0].split(".adaLN")[0] for name in read]
    config = files.dit.config
    assert (
        len(blocks) == len(set(blocks)) == config.num_noise_refiners + config.num_context_refiners + config.num_layers
    )


_LOADING = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from library.lumina import loading
from library.memory.quantised import quantise_block

def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

path, kind = Path(sys.argv[1]), sys.argv[2]
file = loading.inspect_next_dit(loading.ModelPaths(path))
quantise_block(torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, bias=False)}), ("a",), "fp8", "cpu")  # imports
before, peak = anonymous(), 0

def finish(block, large):
    global peak
    peak = max(peak, anonymous())
    if kind != "none":
        quantise_block(block, large, kind, "cpu")

model = loading.load_next_dit(file, torch.bfloat16, None, False, None, finish)
peak = max(peak, anonymous())
print(json.dumps({"peak": peak - before, "end": anonymous() - before,
                  "tensors": sum(t.numel() * t.element_size() for t in model.state_dict().values())}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_never_holds_the_model_in_its_full_precision(tmp_path: Path) -> None:
    """The file is float32, so that no weight can be used in place: what is resident is what loading keeps."""
    from library.files import write_safetensors

    config = NextDiTConfig(
        dim=384, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=96, ffn_dim=1536, time_dim=64, cap_dim=64
    )
    tensors = {name: torch.full(shape, 0.01) for name, shape in config.tensor_shapes().items()}
    file = tmp_path / "model.safetensors"
    write_safetensors(file, tensors, {})
    in_bf16 = sum(tensor.numel() for tensor in tensors.values()) * 2
    of_a_block = in_bf16 // 16
    found = {}
    for kind in ("none", "fp8"):
        done = subprocess.run(
            [sys.executable, "-c", _LOADING, str(file), kind],
            cwd=ROOT,
            # Freed memory goes back to the system at once, whatever its size; one thread has one arena.
            env={
                "PATH": "",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout)
    assert found["none"]["peak"] > 0.95 * in_bf16
    assert found["fp8"]["tensors"] < 0.6 * in_bf16
    # A block as it was read, and a float32 matrix and Python's own objects on top.
    assert found["fp8"]["peak"] < found["fp8"]["tensors"] + 3 * of_a_block
    assert found["fp8"]["peak"] < 0.85 * in_bf16
