"""The three models that draw: read, quantised, streamed, and on the device while they compute."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import DrawingError, SettingsError
from library.importing import uncollected_imports
from library.inference.loras import LoraFiles
from library.inference.settings import Dtype, ModelFlags
from library.lumina.prompt_template import PromptTemplate
from library.memory.settings import (
    AttentionSettings,
    MemorySettings,
    QuantisationSettings,
    check_blocks_to_swap,
)
from library.picture_text import name_of_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.lumina.loading import ModelFiles
    from library.memory.block_stream import BlockStream

logger = logging.getLogger(__name__)


class DrawingModels:
    """Gemma2, Next-DiT and autoencoder with their LoRAs.

    Attributes:
        name: of the Next-DiT's file or folder.
        device: where they compute.
        encoder: Gemma2 with its tokenizer.
        dit: the Next-DiT.
        autoencoder: the AE.
    """

    def __init__(
        self,
        flags: ModelFlags,
        attention: AttentionSettings,
        quantisation: QuantisationSettings,
        loras: LoraFiles,
        max_tokens: int,
        template: PromptTemplate,
    ) -> None:
        """Checks and reads the models.

        Args:
            flags: which models, how and where.
            attention: which kernel.
            quantisation: of their large matrices.
            loras: merged or attached.
            max_tokens: longest prompt.
            template: the system prompts of prompts.

        Raises:
            UserError: a model or LoRA file is wrong, or memory is too small.
        """
        with uncollected_imports():
            import torch
            from accelerate import PartialState

            from library.lumina import loading
            from library.lumina.elementwise_trial import announce_kernels
            from library.memory.attention import Workload, choose_attention
            from library.memory.host_memory import keep_freed_memory
            from library.memory.prepare import prepare_blocks, streamed_blocks
            from library.memory.quantised import finish_of, require_quantisation

        self._flags, self._quantisation = flags, quantisation
        self.name = name_of_model(flags.pretrained_model_name_or_path)
        self._offload = flags.offload
        self._memory = MemorySettings(blocks_to_swap=flags.blocks_to_swap)
        self.device = PartialState().device if flags.device is None else _device(flags.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        require_quantisation(quantisation.transformer, self.device)
        self._warn_of_flags()
        files = _inspect(flags)
        encoder_change, dit_change = loras.check(files)
        sizes = files.dit.config
        dtype, in_halves = _precision(flags.dtype)
        gemma2_dtype, gemma2_in_halves = _precision(flags.gemma2_dtype)
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
        work = Workload(self.device, torch.float16 if in_halves else dtype, *heads, training=False)
        chosen = choose_attention(attention, work, "--dtype bf16")
        announce_kernels(self.device, dtype)
        home = torch.device("cpu") if flags.offload or flags.blocks_to_swap else self.device
        logger.info("Reading the models")
        with self.enough_memory("the three models"):  # blocks go to the device while they are read
            self.encoder = loading.load_gemma2(
                files,
                gemma2_dtype,
                max_tokens,
                template,
                change=encoder_change,
                finish=finish_of(quantisation.text_encoder, self.device, home, gemma2_in_halves),
            )
            self.dit = loading.load_next_dit(
                files.dit,
                dtype,
                attention=chosen.function,
                change=dit_change,
                finish=finish_of(quantisation.transformer, self.device, home, in_halves),
            )
            self.autoencoder = loading.load_autoencoder(files.ae, _torch_dtype(flags.ae_dtype))
            loras.attach(self.encoder.model, self.dit, self.device)
            self._streamed = streamed_blocks(list(self.dit.layers), flags.blocks_to_swap, self.device)
            self._stream = prepare_blocks(self.dit.layers, self._memory, self.device, streamed=self._streamed)
            self._text_stream = self._streamed_text() if flags.blocks_to_swap else None
            if not self._offload:
                self._place_encoder(self.device)
                for model in (self.dit, self.autoencoder.model):
                    self._move(model, self.device)

    def _warn_of_flags(self) -> None:
        """Says which of the flags do nothing on the device, or are slow there."""
        import torch

        from library.memory.half_products import multiplies_bf16
        from library.memory.prepare import warn_where_useless

        dtypes = [_torch_dtype(name) for name in (self._flags.dtype, self._flags.gemma2_dtype, self._flags.ae_dtype)]
        if torch.bfloat16 in dtypes and not multiplies_bf16(self.device):
            logger.warning(
                "The device has no bf16 units: torch computes bf16 in a slow detour. --dtype fp16 --gemma2_dtype fp16"
                " --ae_dtype fp32 are made for such cards"
            )
        warn_where_useless(self._memory, self.device)
        if self._offload and self.device.type == "cpu":
            logger.warning("--offload: no effect on the device cpu, which has no memory beside the host's")

    def _streamed_text(self) -> BlockStream | None:
        from library.memory.prepare import can_stream, stream_weights

        return stream_weights(self.encoder.blocks, self.device, "layers of Gemma2") if can_stream(self.device) else None

    @contextlib.contextmanager
    def enough_memory(self, what: str, remedy: str = "") -> Iterator[None]:
        """Says what to do where the block finds memory too small for ``what``.

        Args:
            what: is read or computed.
            remedy: that helps beside the flags about models.

        Raises:
            DrawingError: it is.
        """
        from library.shortage import is_out_of_memory

        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found = [*self._remedies(), *([remedy] if remedy else [])]
            raise DrawingError(
                f"the memory of {self.device} is too small for {what}; {', '.join(found) or 'close other programs'}"
            ) from error

    def _remedies(self) -> list[str]:
        """Returns the flags that this run does not use yet, those that cost least first."""
        flags = self._flags
        found = [
            (self.device.type != "cpu" and not flags.offload, "--offload keeps only the model that computes there"),
            (self.device.type == "cuda" and not flags.blocks_to_swap, "--blocks_to_swap keeps weights in host memory"),
            (self._quantisation.transformer is None, "--fp8_base halves the large weights"),
            (flags.dtype in ("fp32", "float32", "float"), "--dtype bf16 (fp16 on cards without it) needs half"),
        ]
        return [text for helps, text in found if helps]

    def encode(
        self, prompts: Sequence[str], negatives: Sequence[str], negative_template: PromptTemplate
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the features (L,cap_dim) of prompts and of negative prompts, in host memory.

        One text after the other: in a batch, each would be padded, and rounded otherwise than alone.
        """
        import torch

        try:
            self._place_encoder(self.device)
            found = [self.encoder.encode([text])[0].cpu() for text in prompts]
            against = [self.encoder.encode([text], negative_template)[0].cpu() for text in negatives]
        finally:
            if self._offload:
                self._place_encoder(torch.device("cpu"))
                if self._text_stream is not None:
                    self._text_stream.free()
                self._free()
        return found, against

    def _place_encoder(self, device: torch.device) -> None:
        self.encoder.place(device, besides=() if self._text_stream is None else self.encoder.blocks)

    @contextlib.contextmanager
    def on_device(self, model: torch.nn.Module) -> Iterator[None]:
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

    def _move(self, model: torch.nn.Module, device: torch.device) -> None:
        from library.memory.prepare import place

        place(model, device, besides=self._streamed)

    def _free(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _inspect(flags: ModelFlags) -> ModelFiles:
    """Returns the model files, checked by their headers.

    Raises:
        UserError: one is wrong.
    """
    from library.lumina import loading

    files = loading.inspect_models(
        loading.ModelPaths(
            dit=Path(flags.pretrained_model_name_or_path or ""),
            gemma2=flags.gemma2_path,
            ae=flags.ae_path,
            tokenizer_dir=flags.tokenizer_cache_dir,
            weighted_captions=flags.weighted_captions,
            gemma2_flag="--gemma2_path",
            ae_flag="--ae_path",
        )
    )
    check_blocks_to_swap(flags.blocks_to_swap, files.dit.config.num_layers)
    return files


def _torch_dtype(name: Dtype) -> torch.dtype:
    """Returns torch's dtype of a short or long name."""
    import torch

    full = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}
    return getattr(torch, full.get(name, name))


def _precision(name: Dtype) -> tuple[torch.dtype, bool]:
    """Returns the dtype of a transformer's activations, and whether its large products are in fp16."""
    import torch

    dtype = _torch_dtype(name)
    return (torch.float32, True) if dtype == torch.float16 else (dtype, False)


def _device(name: str) -> torch.device:
    """Returns torch's device of a name.

    Raises:
        SettingsError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f"--device: {name!r} is no name of a device; give one such as cuda, cuda:1, cpu or mps, or leave the flag out"
        ) from error
    try:
        torch.ones(1, device=device).item()  # what cannot be read back, such as meta, draws nothing
    except Exception as error:  # of a kind that depends on the device; that it cannot compute is the answer
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).partition(". ")[0]
        raise SettingsError(
            f"--device: {name!r} cannot be used here ({reason}); leave the flag out, and the best device that there is"
            " draws"
        ) from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # not all packages' kernels ask where their tensors are; and pinned memory is its
    return device
