from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
from models_helpers import tiny_models, write_tiny_files
from safetensors.torch import load_file, save_file

from configs.quickstart.make_models import train_tokenizer, write_folder
from library.errors import ModelFileError
from library.lumina.loading import ModelFiles, ModelPaths, gemma2_fingerprint, inspect_models
from library.lumina.tokenizer import GemmaTokenizer
from library.lumina.weighted_captions import WeightedTokenizer


@pytest.fixture
def paths(tmp_path: Path) -> ModelPaths:
    """Model files whose Gemma2 has no tokenizer inside."""
    paths = write_tiny_files(tmp_path)
    assert paths.gemma2 is not None
    from safetensors import safe_open

    with safe_open(paths.gemma2, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(paths.gemma2).items() if name != "spiece_model"}
    save_file(tensors, paths.gemma2, metadata)
    return paths


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_models().tokenizer)


def test_bos_is_in_front_and_the_limit_includes_it() -> None:
    tokenizer = GemmaTokenizer(tiny_models().tokenizer, max_tokens=6)
    text = "a red disc on a blue background"
    everything = GemmaTokenizer(tiny_models().tokenizer, max_tokens=999).encode(text)
    assert everything[0] == tokenizer.bos_id == 2
    assert 2 not in everything[1:]
    assert len(everything) == tokenizer.count(text) > 6
    assert tokenizer.encode(text) == everything[:6]
    assert tokenizer.encode("") == [2]
    assert tokenizer.pad_id == 0


@pytest.mark.parametrize(
    "text", ["a red disc on a blue background", "  two  spaces\n<b>", "猫が好き 🎈 é", "bad \udcff name", ""]
)
def test_the_kept_part_is_what_the_tokens_hold(text: str) -> None:
    whole = GemmaTokenizer(tiny_models().tokenizer, max_tokens=999)
    assert whole.parts(text) == (text, "")
    shown = text.encode("utf-8", "replace").decode("utf-8")
    lengths = []
    for limit in range(1, whole.count(text) + 1):
        tokenizer = GemmaTokenizer(tiny_models().tokenizer, max_tokens=limit)
        kept, cut = tokenizer.parts(text)
        assert kept + cut == text
        lengths.append(len(kept))
        assert text.startswith(kept)
        decoded = whole._processor.DecodeIds(tokenizer.encode(text)[1:])
        # What else the tokens hold is less than a character.
        assert decoded.rstrip("\ufffd") == shown[: len(kept)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(text)


def test_any_text_has_tokens_of_its_own() -> None:
    tokenizer = GemmaTokenizer(tiny_models().tokenizer, max_tokens=99)
    unknown = 3
    for text in ("猫が好き", "É à la carte", "tab\tand  spaces", "🎈"):
        tokens = tokenizer.encode(text)
        assert len(tokens) > 1
        assert unknown not in tokens


def test_the_tensor_in_the_file_comes_first(tmp_path: Path) -> None:
    # defect 13
    paths = write_tiny_files(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"another one")
    assert inspect_models(paths).tokenizer.proto == tiny_models().tokenizer


@pytest.mark.parametrize(
    "place",
    [
        "tokenizer.model",
        "cache/tokenizer.model",
        "cache/tokenizer/tokenizer.model",
        "cache/models--google--gemma-2-2b/snapshots/0123/tokenizer.model",
    ],
)
def test_a_tokenizer_beside_the_file_or_in_the_cache_folder_is_found(paths: ModelPaths, place: str) -> None:
    assert paths.gemma2 is not None
    put(paths.gemma2.parent / place)
    paths = dataclasses.replace(paths, tokenizer_dir=paths.gemma2.parent / "cache")
    assert inspect_models(paths).tokenizer.proto == tiny_models().tokenizer


@pytest.mark.parametrize("place", ["text_encoder", "tokenizer"])
@pytest.mark.parametrize("given", ["", "text_encoder"])
def test_a_tokenizer_in_the_models_folder_is_found(tmp_path: Path, place: str, given: str) -> None:
    write_folder(tiny_models(), tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    put(tmp_path / place / "tokenizer.model")
    files = inspect_models(ModelPaths(dit=tmp_path, gemma2=tmp_path / given))
    assert files.tokenizer.proto == tiny_models().tokenizer


@pytest.mark.parametrize("weighted", [False, True])
def test_the_pieces_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    """Gemma's own 256,000 take a tenth of a second and more each time."""
    import sentencepiece

    read = []
    original = sentencepiece.SentencePieceProcessor.LoadFromSerializedProto

    def counted(processor: object, proto: bytes) -> object:
        read.append(len(proto))
        return original(processor, proto)

    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "LoadFromSerializedProto", counted)
    files = inspect_models(dataclasses.replace(write_tiny_files(tmp_path), weighted_captions=weighted))
    short, long = files.load_tokenizer(3), files.load_tokenizer(500)
    assert gemma2_fingerprint(files, torch.bfloat16, 3, "") != gemma2_fingerprint(files, torch.bfloat16, 500, "")
    assert len(read) == 1
    assert type(short) is type(long) is (WeightedTokenizer if weighted else GemmaTokenizer)
    assert short.encode("a red disc on a blue background") == long.encode("a red disc on a blue background")[:3]
    assert short.fingerprint == long.fingerprint


def test_a_failed_download_says_what_to_do(paths: ModelPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def offline(*args: object, **keywords: object) -> str:
        asked.append((args, keywords))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    files = inspect_models(paths)  # nothing is downloaded to look at files
    assert not asked
    with pytest.raises(ModelFileError) as error:
        files.load_tokenizer(10)
    assert asked == [(("google/gemma-2-2b", "tokenizer.model"), {"cache_dir": None})]
    for words in ("spiece_model", "tokenizer.model", "--tokenizer_cache_dir", "hf auth login", str(paths.gemma2)):
        assert words in str(error.value)


def with_tokenizer(paths: ModelPaths, content: bytes) -> ModelFiles:
    assert paths.gemma2 is not None
    (paths.gemma2.parent / "tokenizer.model").write_bytes(content)
    return inspect_models(paths)


def test_a_tokenizer_that_does_not_fit_is_refused(paths: ModelPaths, caplog: pytest.LogCaptureFixture) -> None:
    larger, num_pieces = train_tokenizer(400)
    assert num_pieces > tiny_models().gemma2_config.vocab_size
    with pytest.raises(ModelFileError, match=f"has {num_pieces} pieces"):
        with_tokenizer(paths, larger).load_tokenizer(10)
    smaller, _ = train_tokenizer(350)
    with caplog.at_level(logging.WARNING):
        files = with_tokenizer(paths, smaller)
        files.load_tokenizer(10)
        files.load_tokenizer(20)
    assert caplog.text.count("may not belong together") == 1
    with pytest.raises(ModelFileError, match="no sentencepiece model"):
        with_tokenizer(paths, b"version https://git-lfs.github.com/spec/v1").load_tokenizer(10)


def test_the_cache_folder_must_be_a_folder(paths: ModelPaths) -> None:
    with pytest.raises(ModelFileError, match=r"--tokenizer_cache_dir: .* is a file"):
        inspect_models(dataclasses.replace(paths, tokenizer_dir=paths.dit))
