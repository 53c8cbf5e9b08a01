"""Flags of sd-scripts that this program knows but does not act on.

*Ignored* flags have no meaning for Lumina Image 2.0, or nothing to switch here; a run names those that were set in one
warning and goes on. *Refused* flags would change the result or the memory that a run needs and are not built in this
version; a run that sets one ends at once instead of doing something else than asked. A value equal to sd-scripts'
default asks for nothing and passes in both cases (graphical front ends write every default).
"""

from __future__ import annotations

from typing import Any

from library.settings import FlagSpec

_SD = "Stable Diffusion only"
_DDPM = "a setting of noise-predicting models, not of flow matching"
_REDUCED = "gradients are reduced in a few flat buckets of the LoRA's own"
_ZERO = (
    "only the LoRA is trained, so there is next to nothing that DeepSpeed could share out; several GPUs work without it"
)
_OFFLOAD = "DeepSpeed's offloading; --blocks_to_swap keeps frozen weights in host memory, on one GPU too"


def _row(name: str, kind: type, default: Any, reason: str, choices: tuple[str, ...] | None = None) -> FlagSpec:
    many = default == ()
    return FlagSpec(name, kind, default, reason, many, choices, None, (), "token" in name and kind is str)


IGNORED: tuple[FlagSpec, ...] = (
    _row("v2", bool, False, _SD),
    _row("v_parameterization", bool, False, _SD),
    _row("clip_skip", int, None, _SD),
    _row("max_token_length", int, None, "CLIP only; --gemma2_max_token_length is Gemma2's limit"),
    _row("vae", str, None, _SD + "; --ae is the autoencoder"),
    _row("skip_cache_check", bool, False, "cache entries are found by content, so there is no check to skip"),
    _row("persistent_data_loader_workers", bool, False, "reader threads always stay alive"),
    _row("ddp_gradient_as_bucket_view", bool, False, _REDUCED),
    _row("ddp_static_graph", bool, False, _REDUCED),
    _row("deepspeed", bool, False, _ZERO),
    _row("zero_stage", int, 2, _ZERO),
    _row("offload_optimizer_device", str, None, _ZERO, ("cpu", "nvme")),
    _row("offload_optimizer_nvme_path", str, None, _ZERO),
    _row("zero3_init_flag", bool, False, _ZERO),
    _row("zero3_save_16bit_model", bool, False, _ZERO),
    _row("fp16_master_weights_and_gradients", bool, False, _ZERO),
    _row("lowram", bool, False, "models are read straight to where they are used"),
    _row("highvram", bool, False, "nothing is emptied between cached batches"),
    _row("noise_offset", float, None, _DDPM),
    _row("noise_offset_random_strength", bool, False, _DDPM),
    _row("multires_noise_iterations", int, None, _DDPM),
    _row("multires_noise_discount", float, 0.3, _DDPM),
    _row("adaptive_noise_scale", float, None, _DDPM),
    _row("zero_terminal_snr", bool, False, _DDPM),
    _row("min_snr_gamma", float, None, _DDPM),
    _row("scale_v_pred_loss_like_noise_pred", bool, False, _DDPM),
    _row("v_pred_like_loss", float, None, _DDPM),
    _row("debiased_estimation_loss", bool, False, _DDPM),
    _row("fused_backward_pass", bool, False, "meant for training whole models"),
    _row("sample_sampler", str, "ddim", "the model has one sampler, Euler over the flow"),
)

REFUSED: tuple[FlagSpec, ...] = (
    _row("full_fp16", bool, False, "fp16 overflows in this model; --mixed_precision fp16 has products alone in it"),
    _row(
        "dataset_class",
        str,
        None,
        "such a class is written against sd-scripts' own dataset module, which is not part of this program; describe the"
        " pictures with --dataset_config (folders, .json or .jsonl metadata, masks)",
    ),
    _row("offload_param_device", str, None, _OFFLOAD, ("cpu", "nvme")),
    _row("offload_param_nvme_path", str, None, _OFFLOAD),
)
