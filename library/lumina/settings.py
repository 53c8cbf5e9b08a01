"""Settings of the model family: where the three models come from, and how flow matching is trained.

Nothing heavy is imported here: these dataclasses are read to answer ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import SettingsError
from library.lumina.prompt_template import plain_system_prompt
from library.settings import flag

TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"]
PredictionType = Literal["raw", "additive", "sigma_scaled"]
WeightingScheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]


@dataclass(frozen=True)
class ModelSettings:
    """The three models and how captions become tokens."""

    pretrained_model_name_or_path: Path | None = flag(
        None, "Lumina Image 2.0: .safetensors file, all-in-one file, or Hugging Face-style folder"
    )
    gemma2: Path | None = flag(
        None, "Gemma-2-2B: .safetensors file or folder; may be left out when the first model's file or folder holds it"
    )
    ae: Path | None = flag(
        None,
        "FLUX autoencoder: .safetensors file or folder; may be left out when the first model's file or folder holds it",
    )
    gemma2_max_token_length: int = flag(256, "longest caption in tokens, system prompt included; the rest is cut off")
    system_prompt: str = flag("", 'text before every caption: "{system_prompt} <Prompt Start> {caption}"')
    system_prompt_on_empty_caption: bool = flag(
        False, "put the system prompt also before empty captions and empty negative prompts, unlike the official code"
    )
    weighted_captions: bool = flag(
        False, "(word:1.3), (word) and [word] in captions make words count more or less; \\( and \\[ are plain brackets"
    )
    tokenizer_cache_dir: Path | None = flag(
        None, "folder with Gemma's tokenizer.model (or a Hugging Face cache), where the Gemma2 file has none inside"
    )
    disable_mmap_load_safetensors: bool = flag(
        False, "read model files into memory instead of mapping them (for slow network drives)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "system_prompt", plain_system_prompt(self.system_prompt))
        if self.gemma2_max_token_length < 1:
            raise SettingsError(
                f"--gemma2_max_token_length: {self.gemma2_max_token_length} leaves no token; give 256 or more"
            )


@dataclass(frozen=True)
class FlowSettings:
    """Which noise levels are trained, and how the prediction is compared with its target."""

    timestep_sampling: TimestepSampling = flag(
        "shift", "distribution of the noise levels; nextdit_shift follows the picture's size"
    )
    discrete_flow_shift: float = flag(6.0, "shift of 'shift' and 'sigma' sampling, and of the previews' sampler")
    sigmoid_scale: float = flag(1.0, "scale of the normal draw before the sigmoid (sigmoid, shift, flux_shift)")
    model_prediction_type: PredictionType = flag(
        "raw", "raw compares velocities; sigma_scaled compares clean latents, weighted by --weighting_scheme"
    )
    weighting_scheme: WeightingScheme = flag(
        "uniform",
        "density of 'sigma' sampling (logit_normal, mode) or loss weight of sigma_scaled (sigma_sqrt, cosmap)",
    )
    logit_mean: float = flag(0.0, "mean of the logit_normal density")
    logit_std: float = flag(1.0, "standard deviation of the logit_normal density")
    mode_scale: float = flag(1.29, "scale of the mode density")
    min_timestep: int | None = flag(None, "lowest timestep trained, 0 to 999; the density is squeezed into the range")
    max_timestep: int | None = flag(None, "highest timestep trained, 1 to 1000")
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = flag("l2", "how far prediction and target are apart")
    huber_schedule: Literal["constant", "exponential", "snr"] = flag("snr", "how huber's threshold follows the noise")
    huber_c: float = flag(0.1, "huber's threshold at full noise")
    huber_scale: float = flag(1.0, "factor on huber's threshold (constant and exponential)")
    ip_noise_gamma: float | None = flag(None, "extra noise on the model's input only (input perturbation), about 0.1")
    ip_noise_gamma_random_strength: bool = flag(False, "draw that strength between 0 and ip_noise_gamma")

    def __post_init__(self) -> None:
        low, high = self.timestep_range
        if not 0 <= low < high <= 1000:
            raise SettingsError(
                f"--min_timestep {low} and --max_timestep {high} give no range; 0 <= min < max <= 1000 is needed"
            )
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std", "huber_c", "huber_scale"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"--{name}: {getattr(self, name)} must be above 0")
        if self.weighting_scheme in ("logit_normal", "mode") and self.timestep_sampling != "sigma":
            raise SettingsError(
                f"--weighting_scheme {self.weighting_scheme} is a density of --timestep_sampling sigma and would have no"
                f" effect with {self.timestep_sampling}; change one of the two"
            )
        if self.weighting_scheme in ("sigma_sqrt", "cosmap") and self.model_prediction_type != "sigma_scaled":
            raise SettingsError(
                f"--weighting_scheme {self.weighting_scheme} weighs --model_prediction_type sigma_scaled and would have"
                f" no effect with {self.model_prediction_type}; change one of the two"
            )
        if not 0 <= (self.ip_noise_gamma or 0) <= 10:
            raise SettingsError(f"--ip_noise_gamma: {self.ip_noise_gamma} is outside 0 to 10; about 0.1 is usual")
        if self.ip_noise_gamma is None and self.ip_noise_gamma_random_strength:
            raise SettingsError("--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma; add it")

    @property
    def timestep_range(self) -> tuple[int, int]:
        """Lowest and highest timestep trained, each 0 to 1000."""
        low = 0 if self.min_timestep is None else self.min_timestep
        return low, 1000 if self.max_timestep is None else self.max_timestep
