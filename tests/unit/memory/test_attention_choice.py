"""Which kernels a run gets: auto's order, what is missing, kernels that fail when they are tried."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from typing import NoReturn

import pytest
import torch
from attention_helpers import fake_flash, fake_sage, written_out

from library.errors import SettingsError
from library.memory import attention as attention_module
from library.memory.attention import AttentionChoice, Workload, choose_attention, failure_of
from library.memory.attention_kernels import KERNELS, AttentionFn, Kernel, sdpa_attention
from library.memory.settings import AttentionSettings

ADA, HOPPER, BLACKWELL, DATA_CENTRE_BLACKWELL, TURING = (8, 9), (9, 0), (12, 0), (10, 0), (7, 5)
PACKAGES = ("flash_attn", "flash_attn_interface", "sageattention")


def pretend_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *installed: str, picks: str = "flash"
) -> None:
    """Makes the choice as on a GPU of this capability with these packages; kernels are not tried.

    ``picks`` is the kernel that torch picks there where nothing is padded.
    """
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(attention_module, "failure_of", lambda *_: None)
    monkeypatch.setattr(attention_module, "sdpa_kernel_name", lambda work, ragged: "efficient" if ragged else picks)
    for name in PACKAGES:
        module = fake_sage() if name == "sageattention" else fake_flash(name, with_sums=False)
        monkeypatch.setitem(sys.modules, name, module if name in installed else None)  # None: import fails


def work(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Workload:
    settings = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 96, "training": True, **changes}
    return Workload(torch.device(device), dtype, **settings)  # type: ignore[arg-type]


def choose(mode: str = "auto", of: Workload | None = None) -> AttentionChoice:
    return choose_attention(AttentionSettings(attn_mode=mode), of or work(), "--mixed_precision bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "installed", "equal", "ragged"),
    [
        (HOPPER, PACKAGES, "flash3", "flash3"),
        (HOPPER, ("flash_attn",), "flash2", "flash2"),
        (ADA, PACKAGES, "flash2", "flash2"),  # FlashAttention 3 is for Hopper alone
        (BLACKWELL, PACKAGES, "flash2", "flash2"),
        (HOPPER, (), "sdpa", "varlen"),
        (ADA, ("sageattention",), "sdpa", "varlen"),  # SageAttention is not exact
        (TURING, PACKAGES, "sdpa", "sdpa"),
    ],
)
def test_auto_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: tuple[str, ...], equal: str, ragged: str
) -> None:
    pretend_cuda(monkeypatch, capability, *installed)
    chosen = choose()
    assert (chosen.equal, chosen.ragged) == (equal, ragged)


@pytest.mark.parametrize(
    ("capability", "installed", "equal", "ragged"),
    [
        (HOPPER, PACKAGES, "flash3", "flash3"),
        (HOPPER, ("flash_attn",), "sdpa", "cudnn"),
        (DATA_CENTRE_BLACKWELL, PACKAGES, "sdpa", "cudnn"),
        (HOPPER, (), "sdpa", "cudnn"),
    ],
)
def test_auto_where_torch_picks_cudnn(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: tuple[str, ...], equal: str, ragged: str
) -> None:
    pretend_cuda(monkeypatch, capability, *installed, picks="cudnn")
    chosen = choose()
    assert (chosen.equal, chosen.ragged) == (equal, ragged)
    assert choose("varlen").ragged == "varlen"  # what is asked for comes first


def test_what_stands_in_for_cudnn_where_it_fails_with_padding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_cuda(monkeypatch, HOPPER, picks="cudnn")
    no_channels = "a try ended with an error (No available kernel)"
    monkeypatch.setattr(
        attention_module,
        "failure_of",
        lambda kernel, function, work, ragged: no_channels if ragged and "cuDNN" in kernel.label else None,
    )
    for mode, equal in (("auto", "sdpa"), ("cudnn", "cudnn")):
        chosen = choose(mode)
        assert (chosen.equal, chosen.ragged) == (equal, "varlen")
        assert f"cuDNN's attention cannot be used where captions differ in length: {no_channels}" in caplog.text
        caplog.clear()


def test_attention_in_fp16_takes_and_gives_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, TURING, *PACKAGES)
    chosen = choose(of=work(dtype=torch.float16))
    assert (chosen.equal, chosen.ragged) == ("sdpa", "sdpa")  # whose memory-efficient kernel takes halves there
    q, k, v = (torch.randn(2, 20, heads, 96) for heads in (6, 2, 2))
    attended = chosen.function(q, k, 1e6 * v, None)
    assert attended.dtype == torch.float32
    expected = sdpa_attention(q, k, 1e6 * v, None)
    assert 0 < float((attended - expected).norm() / expected.norm()) < 1e-3  # rounded to 11 bits three times


def test_auto_takes_sdpa_where_flash_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, HOPPER, *PACKAGES)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for of in (work(dtype=torch.float32), work(head_dim=12), work(head_dim=264), work("cpu"), work("mps")):
        chosen = choose(of=of)
        assert (chosen.equal, chosen.ragged) == ("sdpa", "sdpa")
        assert chosen.function is sdpa_attention


@pytest.mark.parametrize(("capability", "kv_heads"), [(TURING, 6), (ADA, 2)])
def test_heads_are_shared_only_where_a_kernel_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kv_heads: int
) -> None:
    pretend_cuda(monkeypatch, capability)
    chosen = choose("sdpa")
    seen: list[tuple[int, bool]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False, **more: object
    ) -> torch.Tensor:
        seen.append((k.shape[1], enable_gqa))
        return real(q, k, v, enable_gqa=enable_gqa, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (6, 2, 2))
    # Float32; a fused kernel sums in blocks.
    torch.testing.assert_close(chosen.function(q, k, v, None), written_out(q, k, v, None), rtol=1e-4, atol=2e-5)
    assert seen == [(kv_heads, kv_heads == 2)]


def test_a_mode_means_its_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend_cuda(monkeypatch, ADA, *PACKAGES)
    found = {mode: choose(mode, work(training=False)) for mode in ("sdpa", "cudnn", "flash", "varlen", "flex", "sage")}
    assert {mode: (chosen.equal, chosen.ragged) for mode, chosen in found.items()} == {
        "sdpa": ("sdpa", "sdpa"),
        "cudnn": ("cudnn", "cudnn"),
        "flash": ("flash2", "flash2"),
        "varlen": ("sdpa", "varlen"),
        "flex": ("flex", "flex"),
        "sage": ("sage", "sage"),
    }


def test_the_choice_is_logged_with_what_ragged_batches_get(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    choose(of=work("cpu", torch.float32))
    pretend_cuda(monkeypatch, ADA)
    choose()
    choose("sdpa")
    pretend_cuda(monkeypatch, ADA, "flash_attn")
    choose()
    sdpa = "torch's scaled_dot_product_attention"
    assert caplog.messages == [
        f"Attention: {sdpa} (flash kernel)",
        f"Attention: {sdpa} (flash kernel); where captions differ in length torch's varlen_attn",
        f"Attention: {sdpa} (flash kernel); where captions differ in length {sdpa} (efficient kernel)",
        "Attention: FlashAttention 2",
    ]


def test_batches_with_a_mask_go_to_the_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(value: float) -> AttentionFn:
        return lambda q, k, v, key_mask: torch.full_like(q, value)

    pretend_cuda(monkeypatch, ADA)
    kernel = Kernel("one", lambda: constant(1.0))
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    monkeypatch.setitem(KERNELS, "varlen", Kernel("two", lambda: constant(2.0)))
    function = choose().function
    q = torch.zeros(1, 1, 1, 1)
    assert function(q, q, q, None).item() == 1
    assert function(q, q, q, torch.ones(1, 1, dtype=torch.bool)).item() == 2


@pytest.mark.parametrize(
    ("mode", "of", "capability", "installed", "says"),
    [
        ("flash", work("cpu"), ADA, PACKAGES, "--attn_mode flash: FlashAttention 3 and FlashAttention 2 cannot be used: it"
         " needs a CUDA device, and this run computes on cpu; leave it out"),
        ("flash", work(dtype=torch.float32), ADA, PACKAGES, "it computes in bf16 or fp16, and this run in float32; add"
         " --mixed_precision bf16, or leave it out"),
        ("flash", work(), ADA, (), "no kernels for Some GPU; FlashAttention 2 cannot be used: it cannot be imported"),
        ("flash", work(), ADA, (), "pip install flash-attn --no-build-isolation); leave it out"),
        ("flash", work(head_dim=18), ADA, PACKAGES, "multiples of 8 up to 256, and this model's is 18"),
        ("varlen", work(), TURING, (), "torch's varlen_attn cannot be used: it has no kernels for Some GPU"),
        ("varlen", work("cpu"), ADA, (), "it needs a CUDA device"),
        ("cudnn", work("mps"), ADA, (), "cuDNN's attention cannot be used: it needs a CUDA device, and this run computes"),
        ("flex", work("cpu"), ADA, (), "torch's flex_attention cannot be used: it has no gradients on cpu; leave it out"),
        ("sage", work(), ADA, PACKAGES, "SageAttention cannot be used: it has no gradients; leave it out"),
        ("sage", work(training=False), ADA, (), "pip install sageattention"),
        ("sage", work(training=False, head_dim=192), ADA, PACKAGES, "multiples of 8 up to 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_the_run_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    of: Workload,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    says: str,
) -> None:
    pretend_cuda(monkeypatch, capability, *installed)
    with pytest.raises(SettingsError, match=re.escape(says)):
        choose(mode, of)


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    raise RuntimeError("undefined symbol\nand a long trace")


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    return written_out(q, k, v.cumsum(1), key_mask)


def nan_at_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    output = written_out(q, k, v, key_mask)
    return output if key_mask is None else output.masked_fill(~key_mask[:, :, None, None], math.nan)


def without_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    return written_out(q, k, v, key_mask).detach()


@pytest.mark.parametrize(
    ("function", "training", "ragged", "says"),
    [
        (written_out, True, True, None),
        (written_out, False, False, None),
        (broken, False, False, "a try ended with an error (undefined symbol)"),
        (causal, False, False, "a try gave wrong results"),
        (nan_at_padding, False, False, None),
        (nan_at_padding, True, True, "a try gave wrong results (off by nan%)"),
        (without_gradients, False, True, None),
        (without_gradients, True, True, "a try ended with an error"),
    ],
)
def test_a_kernel_is_tried(function: AttentionFn, training: bool, ragged: bool, says: str | None) -> None:
    # bf16 results are within the tolerance: one rounding of probabilities and one of the result.
    found = failure_of(KERNELS["varlen"], function, work("cpu", training=training, head_dim=24), ragged)
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(says)


def test_a_kernel_that_fails_when_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    here = {"on_cuda": False, "half_only": False}
    monkeypatch.setitem(KERNELS, "flash3", Kernel("Three", lambda: broken, **here))
    monkeypatch.setitem(KERNELS, "flash2", Kernel("Two", lambda: causal, **here))
    of = work("cpu", torch.float32, head_dim=24)
    with pytest.raises(
        SettingsError, match=r"Three cannot be used: a try ended with .*; Two cannot be used: a try gave"
    ):
        choose("flash", of)
    caplog.clear()
    assert choose("auto", of).equal == "sdpa"
    # What is installed and fails is named even where something else stands in.
    assert "Attention: Three cannot be used: a try ended with an error (undefined symbol)" in caplog.messages
    assert any("Two cannot be used where captions differ in length" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("flags", "mode", "given_as"),
    [
        ({}, "auto", "--attn_mode auto"),
        ({"use_flash_attn": True}, "flash", "--use_flash_attn"),
        ({"use_sage_attn": True}, "sage", "--use_sage_attn"),
        ({"sdpa": True, "xformers": True, "mem_eff_attn": True}, "sdpa", "--sdpa"),
        ({"xformers": True}, "sdpa", "--xformers"),
        ({"mem_eff_attn": True, "attn_mode": "sdpa"}, "sdpa", "--attn_mode sdpa"),
        ({"attn_mode": "auto", "use_flash_attn": True}, "flash", "--use_flash_attn"),
    ],
)
def test_flags_that_mean_a_mode(flags: dict[str, object], mode: str, given_as: str) -> None:
    settings = AttentionSettings(**flags)  # type: ignore[arg-type]
    assert (settings.mode, settings.given_as) == (mode, given_as)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"use_flash_attn": True, "sdpa": True}, "--use_flash_attn and --sdpa ask for different attention kernels"),
        ({"attn_mode": "flex", "use_sage_attn": True}, "--attn_mode flex and --use_sage_attn"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        AttentionSettings(**flags)  # type: ignore[arg-type]


def unloadable(*_: object) -> NoReturn:
    raise RuntimeError("libcudart.so.11: cannot open shared object file")


def test_a_package_that_does_not_go_with_this_torch_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_cuda(monkeypatch, ADA, "flash_attn")
    monkeypatch.setitem(KERNELS, "flash2", dataclasses.replace(KERNELS["flash2"], make=unloadable))
    assert choose().equal == "sdpa"
    assert (
        "FlashAttention 2 cannot be used: it does not go with this torch (libcudart.so.11: cannot open" in caplog.text
    )
    with pytest.raises(SettingsError, match=r"^--attn_mode flash: .*FlashAttention 2 cannot be used: it does not go"):
        choose("flash")


def test_a_package_that_fails_in_its_own_way_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, ADA, "flash_attn")
    monkeypatch.setattr("library.memory.attention_kernels.importlib.import_module", unloadable)
    assert KERNELS["flash2"].unsuitable(work()) == (
        "it cannot be imported (libcudart.so.11: cannot open shared object file; pip install flash-attn"
        " --no-build-isolation)"
    )


def test_a_kernel_that_is_compiled_first_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_module, "failure_of", lambda *_: None)
    caplog.set_level(logging.INFO)
    choose("flex", work("cpu", torch.float32, training=False))
    assert "trying torch's flex_attention, which is compiled first" in caplog.text
    caplog.clear()
    choose("auto", work("cpu", torch.float32, training=False))
    assert "trying" not in caplog.text
