"""What the inference program is told: which models draw, and what.

Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from library.errors import SettingsError
from library.lumina.prompt_template import PromptTemplate, plain_system_prompt
from library.memory.settings import check_blocks_to_swap
from library.prompts import MAX_SEED, MAX_SIZE_PX, MAX_STEPS, Prompt, parse_multiplier
from library.settings import expanded, flag, require, require_positive

Dtype = Literal["bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "float"]


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Which models draw, in which precision, where."""

    pretrained_model_name_or_path: Path | None = flag(None, "Lumina Image 2.0: file, all-in-one file, or folder")
    gemma2_path: Path | None = flag(
        None, "Gemma-2-2B: file or folder; may be left out when the first one holds it", aliases=("gemma2",)
    )
    ae_path: Path | None = flag(
        None, "FLUX autoencoder: file or folder; may be left out when the first one holds it", aliases=("ae",)
    )
    tokenizer_cache_dir: Path | None = flag(None, "folder with Gemma's tokenizer.model, where its file has none inside")
    weighted_captions: bool = flag(
        False, "(word:1.3), (word) and [word] in prompts weigh words, as in training with it"
    )
    lora_weights: tuple[str, ...] = flag((), 'LoRA files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = flag(
        False, "merge the LoRA files into the model instead of attaching them: faster steps"
    )
    dtype: Dtype = flag(
        "bf16", "precision of the Next-DiT; fp16, for cards without bf16, has products in it and all else in float32"
    )
    gemma2_dtype: Dtype = flag("bf16", "precision of Gemma2, with the same meanings")
    ae_dtype: Dtype = flag("bf16", "precision of the autoencoder")
    device: str | None = flag(None, "where to compute, such as cuda or cpu; the best one when left out")
    offload: bool = flag(False, "keep only the model that is computing on the device, the others in host memory")
    blocks_to_swap: int | None = flag(
        None,
        "keep the weights of this many of the Next-DiT's blocks, and of Gemma2's layers, in host memory and copy them to the"
        " GPU ahead of use, as in training",
    )

    def __post_init__(self) -> None:
        if self.pretrained_model_name_or_path is None:
            raise SettingsError("--pretrained_model_name_or_path is missing; give the Lumina Image 2.0 file or folder")
        check_blocks_to_swap(self.blocks_to_swap)
        for text in self.lora_weights:
            path, multiplier = split_lora(text)
            if not path.is_file():
                raise SettingsError(f"--lora_weights: {path} is no file (of {text!r}, multiplier {multiplier:g})")


@dataclasses.dataclass(frozen=True)
class PictureFlags:
    """What to draw."""

    prompt: str = flag("A beautiful sunset over the mountains", "what to draw")
    negative_prompt: str = flag("", "what to stay away from")
    from_file: Path | None = flag(
        None,
        "draw the prompts of this .txt, .toml or .json file, as in training, instead of --prompt; what they leave out is"
        " taken from the other flags",
        aliases=("prompt_file", "sample_prompts"),
    )
    images_per_prompt: int = flag(1, "pictures of each prompt, with seeds that count up", aliases=("num_images",))
    batch_size: int = flag(1, "pictures of one size and equal options that are drawn at a time")
    output_dir: Path = flag(Path("outputs"), "folder for the pictures, made if missing")
    seed: int | None = flag(None, "start of the noise; drawn when left out")
    steps: int = flag(36, "Euler steps")
    guidance_scale: float = flag(3.5, "strength of guidance; 1 turns it off")
    image_width: int = flag(1024, "width in pixels, a multiple of 16")
    image_height: int = flag(1024, "height in pixels, a multiple of 16")
    system_prompt: str = flag("", "text before the prompt, as in training")
    add_system_prompt_to_negative_prompt: bool = flag(False, "put it before the negative prompt too")
    system_prompt_on_empty_caption: bool = flag(
        False, "put it before empty prompts and empty negative prompts too, as the training flag of this name does"
    )
    gemma2_max_token_length: int = flag(256, "longest prompt in tokens, system prompt included")
    discrete_flow_shift: float = flag(6.0, "shift of the sampling schedule")
    cfg_trunc_ratio: float = flag(
        0.25, "guidance while the model's time (0 noise, 1 picture) is below this: 24 of 36 steps at shift 6"
    )
    renorm_cfg: float = flag(1.0, "largest norm of the guided prediction, relative to the unguided one; 0 is no limit")
    interactive: bool = flag(False, "read prompts from the keyboard, with options such as --w 512 --d 1; exit ends")

    def __post_init__(self) -> None:
        object.__setattr__(self, "system_prompt", plain_system_prompt(self.system_prompt))
        require_positive(self, "steps", "image_width", "image_height", "gemma2_max_token_length", "discrete_flow_shift")
        require_positive(self, "images_per_prompt", "batch_size")
        # As in prompt lines: beyond these the program would only seem to hang.
        for name, limit in (("steps", MAX_STEPS), ("image_width", MAX_SIZE_PX), ("image_height", MAX_SIZE_PX)):
            if getattr(self, name) > limit:
                raise SettingsError(f"--{name}: {getattr(self, name)} is too much; give {limit} at most")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise SettingsError(f"--seed: {self.seed} is outside 0 to {MAX_SEED}")
        require(
            self.from_file is None or self.from_file.is_file(),
            f"--from_file: {self.from_file} is no file; give a .txt, .toml or .json file with prompts",
        )
        require(
            self.from_file is None or not self.interactive,
            "--from_file and --interactive: prompts come from the file or from the keyboard; leave one of the two out",
        )

    @property
    def caption_template(self) -> PromptTemplate:
        """The system prompts of prompts."""
        return PromptTemplate.of_captions(self.system_prompt, self.system_prompt_on_empty_caption)

    @property
    def negative_template(self) -> PromptTemplate:
        """The system prompts of negative prompts."""
        return PromptTemplate.of_negatives(
            self.system_prompt, self.system_prompt_on_empty_caption, self.add_system_prompt_to_negative_prompt
        )

    def to_prompt(self) -> Prompt:
        """Returns the flags as a prompt."""
        return Prompt(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.image_width,
            height=self.image_height,
            seed=self.seed,
            sample_steps=self.steps,
            scale=self.guidance_scale,
            cfg_trunc_ratio=self.cfg_trunc_ratio,
            renorm_cfg=self.renorm_cfg,
        )


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    """LoRA files that are compared with each other."""

    compare_lora_weights: tuple[Path, ...] = flag(
        (),
        "LoRA files, or folders of them, that draw every prompt from the same seeds, one file after the other; a sheet shows"
        " what each draws",
    )
    compare_multipliers: tuple[float, ...] = flag(
        (1.0,), "the multipliers that each of them draws with; 0 is without it, and drawn once"
    )

    def __post_init__(self) -> None:
        for path in self.compare_lora_weights:
            if not files_of(path):
                raise SettingsError(
                    f"--compare_lora_weights: {path} is neither a file nor a folder with .safetensors files; give the"
                    " files of a run or their folder, and multipliers behind --compare_multipliers"
                )
        require(
            bool(self.compare_lora_weights) or self.compare_multipliers == (1.0,),
            "--compare_multipliers has no effect without --compare_lora_weights; add the LoRA files",
        )
        require(bool(self.compare_multipliers), "--compare_multipliers: there is no number; give some, such as 0.5 1")

    @property
    def files(self) -> list[Path]:
        """The files, each once, in their order; those of a folder by name, where a run's last file comes last."""
        return list(dict.fromkeys(file for path in self.compare_lora_weights for file in files_of(path)))


def files_of(path: Path) -> list[Path]:
    """Returns a file, or the LoRA files of a folder or of a pattern: some shells leave ``*`` to the program.

    As in a shell, files that begin with a dot are left out: a run that is going on writes under such names.
    """
    if path.is_dir():
        path = path / "*.safetensors"
    if path.is_file():
        return [path]
    shown = (file for file in path.parent.glob("*") if not file.name.startswith("."))
    return sorted(file for file in shown if fnmatchcase(file.name, path.name) and file.is_file())


def split_lora(text: str) -> tuple[Path, float]:
    """Returns the file and multiplier of ``path`` or ``path;multiplier``.

    Raises:
        SettingsError: there is no path, or the multiplier is no number.
    """
    path, semicolon, multiplier = text.rpartition(";")
    if not semicolon:
        path, multiplier = text, ""
    if not path:
        raise SettingsError(f"--lora_weights: {text!r} names no file; write path or path;0.8, or leave the flag out")
    file = expanded(Path(path), "--lora_weights")
    try:
        return file, parse_multiplier(multiplier or "1")
    except ValueError as error:
        raise SettingsError(f"--lora_weights: {multiplier!r} of {text!r} is no multiplier; write path;0.8") from error
