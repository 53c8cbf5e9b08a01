"""Gemma's tokenizer: the sentencepiece library itself, and the places where its model is looked for.

transformers' own tokenizer classes build nothing useful from a bare ``tokenizer.model`` and want the gated repository;
the sentencepiece model alone, with BOS in front, gives the right tokens in every case.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from library.errors import ModelFileError
from library.lumina.checkpoint_files import Checkpoint, TensorEntry

logger = logging.getLogger(__name__)

HUB_REPOSITORY = "google/gemma-2-2b"
MODEL_NAME = "tokenizer.model"
TENSOR_NAME = "spiece_model"


class GemmaTokenizer:
    """Text -> token numbers."""

    def __init__(self, model_proto: bytes, max_tokens: int) -> None:
        """Reads a serialised sentencepiece model.

        Args:
            model_proto: the content of ``tokenizer.model``.
            max_tokens: longest result of :meth:`encode`, BOS included.

        Raises:
            ModelFileError: the bytes are no sentencepiece model, or it has no BOS.
        """
        import sentencepiece

        self.max_tokens = max_tokens
        self.fingerprint = hashlib.blake2b(model_proto, digest_size=16).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_proto)
        except RuntimeError as error:
            raise ModelFileError(
                f"The Gemma2 tokenizer is no sentencepiece model ({error}). Download it again."
            ) from error
        self.bos_id: int = self._processor.bos_id()
        self.pad_id: int = max(self._processor.pad_id(), 0)
        if self.bos_id < 0:
            raise ModelFileError(
                "The tokenizer has no BOS token, so it is not Gemma's. Give Gemma-2-2B's tokenizer.model."
            )

    def limited_to(self, max_tokens: int) -> Self:
        """Returns a tokenizer that cuts off at ``max_tokens`` and shares the pieces with this one."""
        limited = copy.copy(self)
        limited.max_tokens = max_tokens
        return limited

    @property
    def vocab_size(self) -> int:
        """How many pieces the tokenizer knows."""
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the text's tokens, cut off at ``max_tokens``."""
        return [self.bos_id, *self._processor.EncodeAsIds(_valid(text))][: self.max_tokens]

    def count(self, text: str) -> int:
        """Returns how many tokens the text has, BOS included, without cutting off."""
        return 1 + len(self._processor.EncodeAsIds(_valid(text)))

    def parts(self, text: str) -> tuple[str, str]:
        """Returns the beginning of a text that the tokens of :meth:`encode` hold, and the end that is cut off."""
        tokens = self._processor.EncodeAsIds(_valid(text))
        kept = tokens[: self.max_tokens - 1]
        if len(kept) == len(tokens):
            return text, ""
        # Half a character's bytes at the end come out as another character, which is not in the text.
        held = self._processor.DecodeIds(kept)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(_valid(text), held, strict=False))
        num_kept = sum(1 for _ in same)
        return text[:num_kept], text[num_kept:]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Returns :meth:`count` of each text; many at once are counted by several threads."""
        return [1 + len(ids) for ids in self._processor.EncodeAsIds([_valid(text) for text in texts])]

    def weights(self, text: str) -> list[float] | None:
        """Returns how much each token of the text counts; ``None``: all the same (see ``weighted_captions.py``)."""
        return None


def _valid(text: str) -> str:
    """Returns the text with ``?`` for what is no Unicode, as folder names of other code pages give it."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer's model is: a tensor in a model file, a file, or (neither) only the gated hub repository."""

    tensor: TensorEntry | None
    file: Path | None
    cache_dir: Path | None
    gemma2_path: Path
    flag: str

    @cached_property
    def proto(self) -> bytes:
        """The serialised sentencepiece model.

        Raises:
            ModelFileError: it is nowhere, and cannot be downloaded.
        """
        if self.tensor is not None:
            with self.tensor.file.open("rb") as file:
                file.seek(self.tensor.start)
                return file.read(self.tensor.end - self.tensor.start)
        return (self.file or self._download()).read_bytes()

    def _download(self) -> Path:
        logger.info("Downloading the Gemma2 tokenizer from %s, as none was found beside the model", HUB_REPOSITORY)
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(HUB_REPOSITORY, MODEL_NAME, cache_dir=self.cache_dir))
        # The hub's library fails in many ways (offline, gated, no login, proxies); for the user they are one.
        except Exception as error:
            raise ModelFileError(
                f"No Gemma2 tokenizer was found: {self.gemma2_path} holds no {TENSOR_NAME} tensor, no {MODEL_NAME} "
                f"lies beside it or in {self.flag}, and the download from {HUB_REPOSITORY} failed "
                f"({type(error).__name__}). Do one of these: use ComfyUI's gemma_2_2b_fp16.safetensors, which contains "
                f"the tokenizer; or put {MODEL_NAME} of Gemma-2-2B beside the model, or in a folder given with "
                f"{self.flag}; or accept the licence at https://huggingface.co/{HUB_REPOSITORY} and run "
                "`hf auth login`."
            ) from error


def find_tokenizer(checkpoint: Checkpoint, given: Path, cache_dir: Path | None, flag: str) -> TokenizerSource:
    """Returns where the tokenizer is: in the file, beside it, in ``cache_dir``, or in the model's folder.

    Args:
        checkpoint: the file or folder that holds Gemma2.
        given: the path that the user gave for it.
        cache_dir: ``--tokenizer_cache_dir``.
        flag: that flag's name, for messages.

    Raises:
        ModelFileError: ``cache_dir`` does not exist or is no folder.
    """
    if cache_dir is not None and cache_dir.exists() and not cache_dir.is_dir():
        raise ModelFileError(f"{flag}: {cache_dir} is a file; give the folder that holds {MODEL_NAME}.")
    for name in (TENSOR_NAME, f"text_encoders.{TENSOR_NAME}"):
        if name in checkpoint.entries:
            return TokenizerSource(checkpoint.entries[name], None, cache_dir, given, flag)
    tensor = next((e for n, e in checkpoint.entries.items() if n.endswith("." + TENSOR_NAME)), None)
    file = None if tensor else next((path for path in _places(checkpoint, given, cache_dir) if path.is_file()), None)
    return TokenizerSource(tensor, file, cache_dir, given, flag)


def _places(checkpoint: Checkpoint, given: Path, cache_dir: Path | None) -> Iterator[Path]:
    if given.is_file():
        yield given.parent / MODEL_NAME
    if cache_dir is not None:
        yield cache_dir / MODEL_NAME
        yield cache_dir / "tokenizer" / MODEL_NAME
        yield from sorted(cache_dir.glob(f"models--*gemma-2-2b*/snapshots/*/{MODEL_NAME}"))
    if given.is_dir():
        for folder in (checkpoint.path, given):
            yield folder / MODEL_NAME
            yield folder / "tokenizer" / MODEL_NAME
            yield folder.parent / "tokenizer" / MODEL_NAME


def check_vocabulary(tokenizer: GemmaTokenizer, num_embeddings: int, path: Path) -> None:
    """Checks that every token has an embedding.

    Raises:
        ModelFileError: the tokenizer has more pieces than the model.
    """
    if tokenizer.vocab_size > num_embeddings:
        raise ModelFileError(
            f"The tokenizer has {tokenizer.vocab_size} pieces, but the Gemma2 in {path} has {num_embeddings} "
            "embeddings, so they do not belong together. Give the tokenizer.model of this model."
        )
    if tokenizer.vocab_size < num_embeddings:
        logger.warning(
            "The tokenizer has %d pieces and the Gemma2 in %s has %d embeddings: they may not belong together",
            tokenizer.vocab_size,
            path,
            num_embeddings,
        )
