"""Draws pictures with Lumina Image 2.0 and LoRA files.

    python lumina_minimal_inference.py --pretrained_model_name_or_path ... --lora_weights "my.safetensors;0.8" --prompt ...

See docs/lumina_train_network.md.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("This program needs Python 3.11 or newer; this is Python %d.%d." % sys.version_info[:2])

import contextlib
import dataclasses
import io
import logging
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.command_line import build_parser, read_command_line
from library.console import run_program
from library.errors import DrawingError, NetworkError, SettingsError, UserError
from library.files import check_writable, read_safetensors_header, write_with
from library.importing import uncollected_imports
from library.lumina.prompt_template import PromptTemplate
from library.memory.settings import (
    AttentionSettings,
    MemorySettings,
    Quantisation,
    QuantisationSettings,
    check_blocks_to_swap,
)
from library.prompts import MAX_SEED, MAX_SIZE_PX, MAX_STEPS, Prompt, PromptError, parse_line, parse_multiplier
from library.settings import expanded, flag, from_given, specs_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.lumina.filling import BlockFinish, TensorChange
    from library.lumina.loading import ModelFiles
    from library.memory.block_stream import BlockStream

logger = logging.getLogger(__name__)

HELP = (
    "Type a prompt, with options behind it: --w --h size, --s steps, --g guidance, --d seed, --n negative prompt, --ctr,"
    " --rcfg, --m multipliers of the LoRAs. All but --d and --n hold for the prompts that follow. exit ends."
)
Dtype = Literal["bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "float"]


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Which models draw, in which precision, where."""

    pretrained_model_name_or_path: Path | None = flag(None, "Lumina Image 2.0: file, all-in-one file, or folder")
    gemma2_path: Path | None = flag(None, "Gemma-2-2B: file or folder; may be left out when the first one holds it")
    ae_path: Path | None = flag(None, "FLUX autoencoder: file or folder; may be left out when the first one holds it")
    tokenizer_cache_dir: Path | None = flag(None, "folder with Gemma's tokenizer.model, where its file has none inside")
    weighted_captions: bool = flag(
        False, "(word:1.3), (word) and [word] in prompts weigh words, as in training with it"
    )
    lora_weights: tuple[str, ...] = flag((), 'LoRA files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = flag(
        False, "merge the LoRA files into the model instead of attaching them: faster steps"
    )
    dtype: Dtype = flag("bf16", "precision of the Next-DiT")
    gemma2_dtype: Dtype = flag("bf16", "precision of Gemma2")
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
        if self.dtype in ("fp16", "float16"):
            raise SettingsError(f"--dtype {self.dtype}: this model overflows in fp16 and draws black; use bf16 or fp32")
        for text in self.lora_weights:
            path, multiplier = split_lora(text)
            if not path.is_file():
                raise SettingsError(f"--lora_weights: {path} is no file (of {text!r}, multiplier {multiplier:g})")


@dataclasses.dataclass(frozen=True)
class PictureFlags:
    """What to draw."""

    prompt: str = flag("A beautiful sunset over the mountains", "what to draw")
    negative_prompt: str = flag("", "what to stay away from")
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
        for name in ("steps", "image_width", "image_height", "gemma2_max_token_length", "discrete_flow_shift"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"--{name}: {getattr(self, name)} must be above 0")
        # As in prompt lines: beyond these the program would only seem to hang.
        for name, limit in (("steps", MAX_STEPS), ("image_width", MAX_SIZE_PX), ("image_height", MAX_SIZE_PX)):
            if getattr(self, name) > limit:
                raise SettingsError(f"--{name}: {getattr(self, name)} is too much; give {limit} at most")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise SettingsError(f"--seed: {self.seed} is outside 0 to {MAX_SEED}")

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


def split_lora(text: str) -> tuple[Path, float]:
    """Returns the file and multiplier of ``path`` or ``path;multiplier``.

    Raises:
        SettingsError: the multiplier is no number.
    """
    path, semicolon, multiplier = text.rpartition(";")
    if not semicolon:
        return expanded(Path(text), "--lora_weights"), 1.0
    try:
        return expanded(Path(path), "--lora_weights"), parse_multiplier(multiplier or "1")
    except ValueError as error:
        raise SettingsError(f"--lora_weights: {multiplier!r} of {text!r} is no multiplier; write path;0.8") from error


def to_dtype(name: Dtype) -> torch.dtype:
    """Returns torch's dtype of a short or long name."""
    import torch

    full = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}
    return getattr(torch, full.get(name, name))


def _device(name: str) -> torch.device:
    """Returns torch's device of a name.

    Raises:
        SettingsError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--device: {name!r} cannot be used here ({reason}); leave the flag out") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # not all packages' kernels ask where their tensors are; and pinned memory is its
    return device


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a LoRA file; empty where its format has none."""
    if path.suffix != ".safetensors":
        return {}
    return read_safetensors_header(path)[0].get("__metadata__", {})


class Painter:
    """The three models with their LoRAs, drawing one prompt after the other."""

    def __init__(
        self,
        models: ModelFlags,
        pictures: PictureFlags,
        attention: AttentionSettings,
        quantisation: QuantisationSettings,
    ) -> None:
        """Checks and reads the models.

        Raises:
            UserError: a model or LoRA file is wrong.
        """
        with uncollected_imports():
            from accelerate import PartialState

            from library.lumina import loading
            from library.memory.attention import Workload, choose_attention
            from library.memory.host_memory import keep_freed_memory
            from library.memory.prepare import (
                can_stream,
                prepare_blocks,
                stream_weights,
                streamed_blocks,
                warn_where_useless,
            )

        self._pictures = pictures
        self._offload = models.offload
        self.device = PartialState().device if models.device is None else _device(models.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if quantisation.fp8_fast:
            from library.memory.fp8 import require_fp8_products

            require_fp8_products(self.device)
        files = loading.inspect_models(
            loading.ModelPaths(
                dit=Path(models.pretrained_model_name_or_path or ""),
                gemma2=models.gemma2_path,
                ae=models.ae_path,
                tokenizer_dir=models.tokenizer_cache_dir,
                weighted_captions=models.weighted_captions,
                gemma2_flag="--gemma2_path",
                ae_flag="--ae_path",
            )
        )
        check_blocks_to_swap(models.blocks_to_swap, files.dit.config.num_layers)
        check_writable("--output_dir", pictures.output_dir)
        encoder_change, dit_change = self._check_loras(models, files)
        sizes, dtype = files.dit.config, to_dtype(models.dtype)
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
        work = Workload(self.device, dtype, *heads, training=False)
        chosen = choose_attention(attention, work, "--dtype bf16")
        to_host = self._offload or bool(models.blocks_to_swap)
        logger.info("Reading the models")
        with self._enough_memory("the three models"):  # quantised blocks go to the device while they are read
            self.encoder = loading.load_gemma2(
                files,
                to_dtype(models.gemma2_dtype),
                pictures.gemma2_max_token_length,
                pictures.caption_template,
                change=encoder_change,
                finish=self._quantising(quantisation.text_encoder, to_host),
            )
            self.dit = loading.load_next_dit(
                files.dit,
                to_dtype(models.dtype),
                attention=chosen.function,
                change=dit_change,
                finish=self._quantising(quantisation.transformer, to_host),
            )
            self.autoencoder = loading.load_autoencoder(files.ae, to_dtype(models.ae_dtype))
            self._merged = models.merge_lora_weights
            self.networks = [] if self._merged else [self._attach(*split_lora(text)) for text in models.lora_weights]
            memory = MemorySettings(blocks_to_swap=models.blocks_to_swap)
            warn_where_useless(memory, self.device)
            self._streamed = streamed_blocks(list(self.dit.layers), models.blocks_to_swap, self.device)
            self._stream = prepare_blocks(self.dit.layers, memory, self.device, streamed=self._streamed)
            self._text_stream: BlockStream | None = None
            if models.blocks_to_swap and can_stream(self.device):
                self._text_stream = stream_weights(self.encoder.blocks, self.device, "layers of Gemma2")
            if not self._offload:
                self._place_encoder(self.device)
                for model in (self.dit, self.autoencoder.model):
                    self._move(model, self.device)

    def _quantising(self, kind: Quantisation | None, to_host: bool) -> BlockFinish | None:
        """Returns what quantises a block as soon as it is read, and leaves it on the device or in host memory."""
        if kind is None:
            return None
        from library.memory.quantised import quantise_block

        return partial(quantise_block, kind=kind, device=self.device, place="cpu" if to_host else self.device)

    def _check_loras(
        self, models: ModelFlags, files: ModelFiles
    ) -> tuple[TensorChange, TensorChange] | tuple[None, None]:
        """Fits the LoRA files to models without weights: a wrong file must show before gigabytes are read.

        Returns:
            What merging makes of each tensor of Gemma2 and of the Next-DiT as it is read; None where nothing is merged.
        """
        import torch

        from library.lumina.filling import in_turn
        from library.lumina.gemma2 import empty_gemma2
        from library.lumina.next_dit import NextDiT
        from networks import lora_lumina

        if not models.lora_weights:
            return None, None
        with torch.device("meta"):
            dit = NextDiT(files.dit.config)
        encoder = empty_gemma2(files.gemma2.config)
        networks = []
        for text in models.lora_weights:
            path, multiplier = split_lora(text)
            try:
                network, _ = lora_lumina.create_network_from_weights(
                    multiplier, path, None, [encoder], dit, for_inference=True
                )
            except NetworkError as error:
                raise NetworkError(f"--lora_weights: {error}") from error
            networks.append(network)
            self._tell_of_lora(path, multiplier, "merged" if models.merge_lora_weights else "attached")
        if not models.merge_lora_weights:
            return None, None
        of_encoder, of_dit = ([network.weight_changes(model) for network in networks] for model in (encoder, dit))
        return in_turn(of_encoder), in_turn(of_dit)

    def _attach(self, path: Path, multiplier: float) -> Any:
        from networks import lora_lumina

        network, _ = lora_lumina.create_network_from_weights(
            multiplier, path, None, [self.encoder.model], self.dit, for_inference=True
        )
        network.apply_to([self.encoder.model], self.dit)
        return network.to(self.device).eval()

    def _tell_of_lora(self, path: Path, multiplier: float, how: str) -> None:
        logger.info("LoRA %s, multiplier %g, %s", path, multiplier, how)
        trained_with = read_metadata(path).get("ss_system_prompt", "")
        if trained_with not in ("", "None", self._pictures.system_prompt):
            logger.warning(
                'This LoRA was trained with the system prompt "%s"; draw with the same: --system_prompt "%s"',
                trained_with,
                trained_with,
            )

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Sets the attached LoRAs' multipliers; the last one holds for all that follow.

        Raises:
            PromptError: the LoRAs are merged, or there are more multipliers than LoRAs.
        """
        if self._merged:
            raise PromptError("--m has no effect on merged LoRAs; start without --merge_lora_weights")
        if len(multipliers) > len(self.networks):
            raise PromptError(f"--m gives {len(multipliers)} multipliers; the number of LoRAs is {len(self.networks)}")
        padded = [*multipliers, *[multipliers[-1]] * (len(self.networks) - len(multipliers))]
        for network, multiplier in zip(self.networks, padded, strict=True):
            network.set_multiplier(multiplier)

    def draw(self, prompt: Prompt) -> Path:
        """Draws one picture and returns its file."""
        import torch

        from library.lumina.drawing import draw_latents, to_picture
        from library.lumina.sampler import SamplingOptions

        prompt = prompt.rounded()
        if prompt.multipliers:
            self.set_multipliers(prompt.multipliers)
        seed = random.randrange(2**32) if prompt.seed is None else prompt.seed
        options = SamplingOptions(
            steps=prompt.sample_steps,
            guidance_scale=prompt.scale,
            shift=self._pictures.discrete_flow_shift,
            cfg_trunc_ratio=prompt.cfg_trunc_ratio,
            renorm_cfg=prompt.renorm_cfg,
        )
        with torch.no_grad(), self._enough_memory(f"a picture of {prompt.width}x{prompt.height}"):
            positive, negative = self._encode(prompt)
            size_px = (prompt.width, prompt.height)
            with self._on_device(self.dit):
                latents = draw_latents(self.dit, [positive], [negative], size_px, [seed], options, self.device)
            with self._on_device(self.autoencoder.model):
                picture = to_picture(self.autoencoder.decode, latents)
        path = self._free_path(seed)
        logger.info("Prompt: %s", prompt.prompt or "(none)")
        write_with(path, lambda temporary: picture.save(temporary))
        logger.info("Saved %s (seed %d)", path, seed)
        return path

    @contextlib.contextmanager
    def _enough_memory(self, what: str) -> Iterator[None]:
        """Says what to do where the block finds the device's memory too small.

        Raises:
            DrawingError: it is.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            remedy = (
                "--blocks_to_swap keeps the Next-DiT's weights in host memory, --fp8_base halves them, and a smaller"
                " --image_width and --image_height need less"
                if self._offload
                else "--offload keeps only the model that computes there"
            )
            raise DrawingError(f"the memory of {self.device} is too small for {what}; {remedy}") from error

    def _encode(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        import torch

        num_tokens = self.encoder.tokenizer.count(self.encoder.template.text(prompt.prompt))
        if num_tokens > self._pictures.gemma2_max_token_length:
            logger.warning(
                "The prompt has %d tokens with its system prompt; what is behind the first %d is cut off"
                " (--gemma2_max_token_length)",
                num_tokens,
                self._pictures.gemma2_max_token_length,
            )
        try:
            self._place_encoder(self.device)
            (positive,) = self.encoder.encode([prompt.prompt])
            (negative,) = self.encoder.encode([prompt.negative_prompt], self._pictures.negative_template)
        finally:
            if self._offload:
                self._place_encoder(torch.device("cpu"))
                if self._text_stream is not None:
                    self._text_stream.free()
                self._free()
        return positive, negative

    def _place_encoder(self, device: torch.device) -> None:
        self.encoder.place(device, besides=() if self._text_stream is None else self.encoder.blocks)

    def _move(self, model: torch.nn.Module, device: torch.device) -> None:
        from library.memory.prepare import place

        place(model, device, besides=self._streamed)

    @contextlib.contextmanager
    def _on_device(self, model: torch.nn.Module) -> Iterator[None]:
        """Has a model on the device while the block computes with it, and with ``--offload`` no longer, whatever happens."""
        import torch

        if not self._offload:
            yield
            return
        try:
            self._move(model, self.device)
            yield
        finally:
            self._move(model, torch.device("cpu"))
            if model is self.dit and self._stream is not None:
                self._stream.free()
            self._free()

    def _free(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _free_path(self, seed: int) -> Path:
        name = f"image_{time.strftime('%Y%m%d%H%M%S')}_{seed}"
        path = self._pictures.output_dir / f"{name}.png"
        number = 1
        while path.exists():
            number += 1
            path = self._pictures.output_dir / f"{name}_{number}.png"
        return path


def interact(painter: Painter, first: Prompt) -> None:
    """Draws prompts typed by the user until ``exit`` or the end of input.

    Sizes, steps, guidance and multipliers hold until they are changed; seed and negative prompt are for one prompt.
    """
    logger.info("%s", HELP)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    current = dataclasses.replace(first, seed=None)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line.lower() == "exit":
            return
        if line.lower() in ("help", "?"):
            logger.info("%s", HELP)
        if not line or line.lower() in ("help", "?"):
            continue
        try:
            prompt = parse_line(line, current, "prompt", interactive=True).rounded()
            # A line of options alone draws the last prompt again.
            prompt = dataclasses.replace(prompt, prompt=prompt.prompt or current.prompt)
            painter.draw(prompt)
        except UserError as error:
            logger.error("%s", error)
            continue
        except (RuntimeError, OSError) as error:  # too large a picture, a full disk: the next prompt may do
            logger.error(
                "This prompt could not be drawn: %s", next(iter(str(error).splitlines()), type(error).__name__)
            )
            continue
        current = dataclasses.replace(prompt, seed=None, negative_prompt=first.negative_prompt)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and draws."""
    groups = {
        "models": ModelFlags,
        "attention": AttentionSettings,
        "quantised weights": QuantisationSettings,
        "picture": PictureFlags,
    }
    parser = build_parser(
        "Draws pictures with Lumina Image 2.0 and LoRA files.",
        [(title, specs_of(settings_class)) for title, settings_class in groups.items()],
    )
    specs = {spec.name: spec for settings_class in groups.values() for spec in specs_of(settings_class)}
    given = read_command_line(parser, specs, argv)
    models, pictures = from_given(ModelFlags, given), from_given(PictureFlags, given)
    quantisation = from_given(QuantisationSettings, given)
    if quantisation.fp8_fast and models.dtype not in ("bf16", "bfloat16"):
        raise SettingsError(
            f"--fp8_fast multiplies in fp8 and gives bf16, and --dtype is {models.dtype}; leave one of them out"
        )
    painter = Painter(models, pictures, from_given(AttentionSettings, given), quantisation)
    if pictures.interactive:
        interact(painter, pictures.to_prompt())
    else:
        painter.draw(pictures.to_prompt())


if __name__ == "__main__":
    run_program(main)
