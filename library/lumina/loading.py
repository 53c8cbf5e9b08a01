"""Single file, all-in-one file, or folder -> the three models.

First :func:`inspect_models` looks at headers alone and refuses what is not exactly the model that a flag wants; that
takes milliseconds and imports nothing heavy. Then each ``load_*`` reads one model: built without memory for its
weights, which are mapped from the file and used in place where they have the wanted dtype already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ModelFileError, SettingsError
from library.lumina.checkpoint_files import Checkpoint, open_checkpoint
from library.lumina.component import ComponentFile, SourceShapes, bind, layout_of, not_this_model
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig
from library.lumina.filling import BlockFinish, TensorChange, fill
from library.lumina.key_maps import GEMMA2_LAYOUTS, NEXT_DIT_LAYOUTS, autoencoder_layouts
from library.lumina.model_guess import AUTOENCODER, GEMMA2, NEXT_DIT, is_other_next_dit
from library.lumina.tokenizer import GemmaTokenizer, TokenizerSource, check_vocabulary, find_tokenizer
from library.lumina.weighted_captions import WeightedTokenizer

if TYPE_CHECKING:
    import torch

    from library.lumina.autoencoder import Autoencoder
    from library.lumina.gemma2 import Gemma2Encoder
    from library.lumina.next_dit import AttentionFn, NextDiT
    from library.lumina.prompt_template import PromptTemplate

__all__ = [
    "ComponentFile",
    "ModelFiles",
    "ModelPaths",
    "autoencoder_fingerprint",
    "gemma2_fingerprint",
    "inspect_gemma2",
    "inspect_models",
    "inspect_next_dit",
    "load_autoencoder",
    "load_gemma2",
    "load_next_dit",
]


@dataclass(frozen=True)
class ModelPaths:
    """What the user gave for the three models and the tokenizer, and with which flags.

    Attributes:
        dit: file, folder, all-in-one file or pipeline root.
        gemma2: None = in the same file or root folder as the transformer.
        ae: likewise.
        tokenizer_dir: where a ``tokenizer.model`` may lie; None = only beside the model.
        mmap: map files into memory instead of reading them.
        weighted_captions: captions hold marks that weigh words.
    """

    dit: Path
    gemma2: Path | None = None
    ae: Path | None = None
    tokenizer_dir: Path | None = None
    mmap: bool = True
    weighted_captions: bool = False
    dit_flag: str = "--pretrained_model_name_or_path"
    gemma2_flag: str = "--gemma2"
    ae_flag: str = "--ae"
    tokenizer_flag: str = "--tokenizer_cache_dir"


@dataclass(frozen=True)
class ModelFiles:
    """The three models' files, checked, and where the tokenizer is."""

    dit: ComponentFile[NextDiTConfig]
    gemma2: ComponentFile[Gemma2TextConfig]
    ae: ComponentFile[AutoencoderConfig]
    tokenizer: TokenizerSource
    weighted_captions: bool = False

    def load_tokenizer(self, max_tokens: int) -> GemmaTokenizer:
        """Returns the tokenizer, which cuts captions off at ``max_tokens``, BOS included.

        Raises:
            ModelFileError: there is none, or it does not belong to this Gemma2.
            SettingsError: Gemma2 cannot read that many.
        """
        most = self.gemma2.config.max_position_embeddings
        if max_tokens > most:
            raise SettingsError(
                f"--gemma2_max_token_length: {max_tokens} is more than the {most} tokens that the Gemma2 in"
                f" {self.gemma2.path} can read; give {most} or less"
            )
        return self._any_tokenizer.limited_to(max_tokens)

    @cached_property
    def _any_tokenizer(self) -> GemmaTokenizer:
        """The tokenizer, made and checked once: its 256,000 pieces take a tenth of a second and more to read."""
        kind = WeightedTokenizer if self.weighted_captions else GemmaTokenizer
        tokenizer = kind(self.tokenizer.proto, 1)
        check_vocabulary(tokenizer, self.gemma2.config.vocab_size, self.gemma2.path)
        return tokenizer


def gemma2_fingerprint(files: ModelFiles, dtype: torch.dtype, max_token_length: int, system_prompt: str) -> str:
    """Returns a hash of all that a text feature depends on besides its caption; the model is not loaded for it.

    Raises:
        ModelFileError: the tokenizer is missing or does not fit.
    """
    tokenizer = files.load_tokenizer(max_token_length)
    return _hash(files.gemma2.fingerprint, dtype, tokenizer.fingerprint, max_token_length, system_prompt)


def autoencoder_fingerprint(file: ComponentFile[AutoencoderConfig], dtype: torch.dtype, tiled: bool = False) -> str:
    """Returns a hash of all that latents depend on besides their picture; the model is not loaded for it.

    What only rounds otherwise is left out: the device, kernels, strips (``library/lumina/strips.py``), pictures in a batch.
    """
    return _hash(file.fingerprint, dtype, *(["tiles"] if tiled else []))


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=16).hexdigest()


def inspect_models(paths: ModelPaths) -> ModelFiles:
    """Returns the three models' files after checking every tensor's name and shape; reads headers only.

    Raises:
        ModelFileError: a file is missing, broken, truncated, another model, or does not fit the other two.
    """
    dit = inspect_next_dit(paths)
    gemma2_path, gemma2_flag = _given_or_same(paths.gemma2, paths.gemma2_flag, paths, "text_encoder")
    gemma2_checkpoint = open_checkpoint(gemma2_path, gemma2_flag, "text_encoder")
    gemma2 = inspect_gemma2(gemma2_checkpoint, paths, gemma2_path, gemma2_flag)
    ae_path, ae_flag = _given_or_same(paths.ae, paths.ae_flag, paths, "vae")
    ae = _inspect_autoencoder(open_checkpoint(ae_path, ae_flag, "vae"), paths, ae_path, ae_flag)
    if gemma2.config.hidden_size != dit.config.cap_dim:
        raise ModelFileError(
            f"{gemma2_flag}: {gemma2_path} gives text features of width {gemma2.config.hidden_size}, but the "
            f"transformer in {paths.dit} takes {dit.config.cap_dim}. Give the text encoder that belongs to it."
        )
    if ae.config.latent_channels != dit.config.channels:
        raise ModelFileError(
            f"{ae_flag}: {ae_path} has {ae.config.latent_channels} latent channels, but the transformer in {paths.dit} "
            f"takes {dit.config.channels}. Give the autoencoder that belongs to it."
        )
    tokenizer = find_tokenizer(gemma2_checkpoint, gemma2_path, paths.tokenizer_dir, paths.tokenizer_flag)
    return ModelFiles(dit, gemma2, ae, tokenizer, paths.weighted_captions)


def _given_or_same(given: Path | None, flag: str, paths: ModelPaths, subfolder: str) -> tuple[Path, str]:
    """Returns a model's path and the flag to name in messages; a model not given is sought with the transformer.

    Raises:
        ModelFileError: it is not given, and the transformer's folder has no ``subfolder``.
    """
    if given is not None:
        return given, flag
    root = paths.dit
    # A folder given as .../transformer of a pipeline: its neighbours belong to it.
    is_part = root.is_dir() and not (root / "transformer").is_dir()
    if is_part and (root.parent / "model_index.json").is_file():
        root = root.parent
    if root.is_dir() and not (root / subfolder).is_dir():
        raise ModelFileError(_left_out(flag, paths, f"{subfolder} folder"))
    return root, flag


def inspect_next_dit(paths: ModelPaths) -> ComponentFile[NextDiTConfig]:
    """Returns the transformer's file after checking every tensor's name and shape.

    Raises:
        ModelFileError: as :func:`inspect_models`.
    """
    checkpoint = open_checkpoint(paths.dit, paths.dit_flag, "transformer")

    def describe(report: str = "") -> str:
        return not_this_model(paths.dit_flag, checkpoint.path, NEXT_DIT, checkpoint.shapes, report)

    found = layout_of(checkpoint, NEXT_DIT_LAYOUTS)
    if found is None or is_other_next_dit(checkpoint.shapes):
        raise ModelFileError(describe())
    shapes = SourceShapes(checkpoint, found)
    try:
        config = NextDiTConfig.from_shapes(shapes)
    except KeyError as error:
        raise ModelFileError(describe(f"the tensor {found.prefix}{error.args[0]} is missing")) from error
    except (ValueError, IndexError) as error:
        raise ModelFileError(describe(str(error))) from error
    optional = frozenset({"norm_final.weight"})
    sources = bind(checkpoint, found, config.tensor_shapes(), (), describe, optional)
    return _component(checkpoint, config, sources, paths.dit, paths.dit_flag, paths.mmap)


def inspect_gemma2(
    checkpoint: Checkpoint, paths: ModelPaths, given: Path, flag: str
) -> ComponentFile[Gemma2TextConfig]:
    """Returns Gemma2's file after checking every tensor's name and shape.

    Args:
        checkpoint: opened from ``given``.
        paths: what the user gave.
        given: Gemma2's own path, or the transformer's where it is sought there.
        flag: for messages.

    Raises:
        ModelFileError: as :func:`inspect_models`.
    """

    def describe(report: str = "") -> str:
        return not_this_model(flag, checkpoint.path, GEMMA2, checkpoint.shapes, report)

    found = layout_of(checkpoint, GEMMA2_LAYOUTS)
    if found is None:
        raise ModelFileError(describe() if paths.gemma2 else _left_out(flag, paths, "text encoder"))
    values = _stated_config(checkpoint, "gemma2_config", "hidden_size", ("model_type", "gemma2"), flag, GEMMA2)
    try:
        config = Gemma2TextConfig.from_config(values)
    except ValueError as error:
        raise ModelFileError(f"{flag}: the configuration of {checkpoint.path} is wrong: {error}.") from error
    sources = bind(checkpoint, found, config.tensor_shapes(), config.unused_shapes(), describe)
    return _component(checkpoint, config, sources, given, flag, paths.mmap)


def _inspect_autoencoder(
    checkpoint: Checkpoint, paths: ModelPaths, given: Path, flag: str
) -> ComponentFile[AutoencoderConfig]:
    def describe(report: str = "") -> str:
        return not_this_model(flag, checkpoint.path, AUTOENCODER, checkpoint.shapes, report)

    values = _stated_config(
        checkpoint, "ae_config", "block_out_channels", ("_class_name", "AutoencoderKL"), flag, AUTOENCODER
    )
    try:
        config = AutoencoderConfig.from_config(values)
    except ValueError as error:
        raise ModelFileError(f"{flag}: the configuration of {checkpoint.path} is wrong: {error}.") from error
    found = layout_of(checkpoint, autoencoder_layouts(len(config.block_out_channels)))
    if found is None:
        raise ModelFileError(describe() if paths.ae else _left_out(flag, paths, "autoencoder"))
    sources = bind(checkpoint, found, config.tensor_shapes(), (), describe)
    return _component(checkpoint, config, sources, given, flag, paths.mmap)


def _left_out(flag: str, paths: ModelPaths, what: str) -> str:
    return (
        f"{flag} is missing: {paths.dit} ({paths.dit_flag}) holds no {what}. Give its file with {flag}, or give an "
        f"all-in-one file or a pipeline's root folder with {paths.dit_flag}."
    )


def _component(
    checkpoint: Checkpoint, config: Any, sources: Mapping[str, Any], given: Path, flag: str, mmap: bool
) -> ComponentFile[Any]:
    single_file = checkpoint.files[0] if len(checkpoint.files) == 1 else None
    return ComponentFile(given, single_file, config, sources, mmap, flag)


def _stated_config(
    checkpoint: Checkpoint, key: str, telling: str, class_entry: tuple[str, str], flag: str, wanted: str
) -> Mapping[str, Any]:
    """Returns the configuration that a folder or file states; empty where it states none (the real model's is meant).

    Args:
        checkpoint: the file or folder.
        key: metadata entry of an all-in-one file; ``config`` is the entry of a file with one model.
        telling: a key that such a configuration has for certain (other programs write other things to ``config``).
        class_entry: key and value that name the model class.
        flag: for messages.
        wanted: what the flag wants, for messages.

    Raises:
        ModelFileError: the folder's ``config.json`` is that of another model, or the entry is not JSON.
    """
    folder = checkpoint.folder_config
    if folder is not None and checkpoint.path.is_dir():
        name, value = class_entry
        if folder.get(name, value) != value:
            raise ModelFileError(
                f"{flag}: {checkpoint.path} is not {wanted}: "
                f"its config.json says {name} = {folder[name]!r}, not {value!r}."
            )
        return folder
    for entry in (key, "config"):
        text = checkpoint.metadata.get(entry)
        if text is None:
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            if entry == "config":
                continue  # another program's entry
            raise ModelFileError(f"{flag}: the metadata entry {entry} of {checkpoint.path} is not JSON.") from error
        if isinstance(values, dict) and telling in values:
            return values
    if folder is not None and folder.get(class_entry[0]) == class_entry[1]:
        return folder
    return {}


def load_next_dit(
    file: ComponentFile[NextDiTConfig],
    dtype: torch.dtype,
    attention: AttentionFn | None = None,
    show_progress: bool = True,
    change: TensorChange | None = None,
    finish: BlockFinish | None = None,
) -> NextDiT:
    """Returns the transformer: frozen, in evaluation mode, on the CPU (its blocks where ``finish`` leaves them).

    Args:
        file: from :func:`inspect_models`.
        dtype: of all weights.
        attention: see ``library.lumina.next_dit.AttentionFn``; None = PyTorch's own.
        show_progress: a bar where reading takes more than two seconds.
        change: applied to each tensor as it is read.
        finish: applied to each block as soon as it is read, before the next one.
    """
    import torch

    from library.lumina.next_dit import BLOCKS, LARGE_MATRICES, NextDiT, plain_attention

    with torch.device("meta"):
        model = NextDiT(file.config, attention or plain_attention).eval()
    fill(model, file.read(dtype, show_progress), BLOCKS, LARGE_MATRICES, change, finish)
    return model


def load_gemma2(
    files: ModelFiles,
    dtype: torch.dtype,
    max_token_length: int,
    template: PromptTemplate | str,
    show_progress: bool = True,
    change: TensorChange | None = None,
    finish: BlockFinish | None = None,
) -> Gemma2Encoder:
    """Returns the text encoder: frozen, in evaluation mode, on the CPU (its layers where ``finish`` leaves them).

    Args:
        files: from :func:`inspect_models`.
        dtype: of all weights and of the features.
        max_token_length: longest caption in tokens, BOS and system prompt included.
        template: system prompts of captions, or the one of captions that are not empty.
        show_progress: a bar where reading takes more than two seconds.
        change: applied to each tensor as it is read.
        finish: applied to each layer as soon as it is read, before the next one.

    Raises:
        ModelFileError: the tokenizer is missing or does not fit.
    """
    from library.lumina.gemma2 import BLOCKS, EMBEDDING, LARGE_MATRICES, Gemma2Encoder, complete_gemma2, empty_gemma2

    tokenizer = files.load_tokenizer(max_token_length)
    config = files.gemma2.config
    model = empty_gemma2(config)
    tensors = files.gemma2.read(dtype, show_progress, in_place=(EMBEDDING,))
    fill(model, tensors, BLOCKS, LARGE_MATRICES, change, finish)
    return Gemma2Encoder(complete_gemma2(config, model), tokenizer, template)


def load_autoencoder(
    file: ComponentFile[AutoencoderConfig], dtype: torch.dtype, show_progress: bool = True, tiled: bool = False
) -> Autoencoder:
    """Returns the autoencoder: frozen, in evaluation mode, on the CPU; ``dtype`` of all weights, ``tiled`` see there."""
    from library.lumina.autoencoder import Autoencoder, build_autoencoder

    model = build_autoencoder(file.config, file.tensors(dtype, show_progress))
    return Autoencoder(model, file.config, tiled)
