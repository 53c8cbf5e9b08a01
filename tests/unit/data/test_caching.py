import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import (
    FakeAutoencoder,
    FakeProcesses,
    FakeTextEncoder,
    build,
    captions_of,
    make_pictures,
    missing_latents,
    missing_text,
    noise_image,
)
from safetensors.torch import load_file, save_file

from library import files
from library.data import cache, images
from library.data.dataset import TrainingData
from library.data.sharing import ALONE, Sharing
from library.errors import DatasetError

SIZES = {"a.png": (64, 64), "b.png": (96, 64), "c.png": (64, 96), "d.png": (70, 70)}
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}


def _latents_made(folder: Path, fingerprint: str = "ae-1", **changes: Any) -> int:
    """Starts a run on the folder, fills its latents, and returns how many pictures were encoded for it."""
    data = build(folder, **{**DISK, **changes})
    expected = missing_latents(data, fingerprint)
    encoder = FakeAutoencoder()
    data.fill_latents(encoder, fingerprint)
    assert missing_latents(data, fingerprint) == 0
    assert (expected > 0) == (encoder.encoded > 0)
    return encoder.encoded


def _texts_made(folder: Path, fingerprint: str = "te-1", **changes: Any) -> list[str]:
    """As :func:`_latents_made`, for captions of one epoch."""
    data = build(folder, **{**DISK, **changes})
    captions = captions_of(data, [1])
    expected = missing_text(data, captions, fingerprint)
    encoder = FakeTextEncoder()
    data.fill_captions([1], encoder, fingerprint)
    assert len(encoder.encoded) == expected
    assert missing_text(data, captions, fingerprint) == 0
    return encoder.encoded


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("flip_aug", [False, True])
def test_what_is_cached_is_what_the_encoder_gives(tmp_path: Path, to_disk: bool, flip_aug: bool) -> None:
    make_pictures(tmp_path, SIZES)
    flags = DISK if to_disk else {"cache_latents": True, "cache_text_encoder_outputs": True}
    data = build(tmp_path, flip_aug=flip_aug, vae_batch_size=3, **BUCKETS, **flags)
    autoencoder, text_encoder = FakeAutoencoder(), FakeTextEncoder()
    data.fill_latents(autoencoder, "ae-1")
    data.fill_captions([1], text_encoder, "te-1")
    assert autoencoder.encoded == len(SIZES) * (1 + flip_aug)
    for item in data.items:
        pixels = images.load_pixels(item.path, item.placement, None)
        for flip in (False, True)[: 1 + flip_aug]:
            expected = FakeAutoencoder()((pixels.flip(-1) if flip else pixels)[None])[0].to(torch.bfloat16)
            latents = data.latents.get(item, flip)
            assert latents.dtype == torch.bfloat16
            assert torch.equal(latents, expected)
        features = data.text.get(item.caption)
        assert torch.equal(features, FakeTextEncoder()([item.caption])[0].to(torch.bfloat16))
    # Nothing is written beside the pictures unless it is asked for.
    assert (tmp_path / "lumina_cache").exists() is to_disk


@pytest.mark.parametrize("to_disk", [False, True])
def test_an_encoder_that_changes_for_one_size_encodes_that_size_again(tmp_path: Path, to_disk: bool) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64), "wide.png": (128, 64)})
    data = build(tmp_path, **BUCKETS, **(DISK if to_disk else {"cache_latents": True}))
    data.fill_latents(FakeAutoencoder(), "ae-1")
    assert missing_latents(data, lambda size_px: "ae-1") == 0
    assert missing_latents(data, lambda size_px: "ae-2" if size_px[0] > size_px[1] else "ae-1") == 1


def test_pictures_of_one_bucket_are_encoded_together(tmp_path: Path) -> None:
    make_pictures(tmp_path, {f"{n}.png": (64, 64) for n in range(5)} | {"w.png": (128, 64)})
    data = build(tmp_path, cache_latents=True, vae_batch_size=2, **BUCKETS)
    encoder = FakeAutoencoder()
    data.fill_latents(encoder, "ae-1")
    assert sorted(shape[0] for shape in encoder.batches) == [1, 1, 2, 2]


def test_by_itself_a_batch_has_the_pixels_of_one_picture_of_usual_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PIXELS_AT_ONCE", 3 * 64 * 64)
    sizes = {f"{n}.png": (64, 64) for n in range(7)} | {f"w{n}.png": (128, 64) for n in range(2)}
    make_pictures(tmp_path, sizes | {"large.png": (128, 128)})
    data = build(tmp_path, cache_latents=True, **{**BUCKETS, "resolution": (128, 128)}, bucket_no_upscale=True)
    encoder = FakeAutoencoder()
    data.fill_latents(encoder, "ae-1")
    batches = [(count, height * width) for count, _, height, width in encoder.batches]
    # A picture larger than that is encoded alone; the largest come first, so that too little memory shows at once.
    assert batches == [(1, 128 * 128), (1, 128 * 64), (1, 128 * 64), (3, 64 * 64), (3, 64 * 64), (1, 64 * 64)]


def test_by_themselves_captions_of_small_batches_are_encoded_eight_at_a_time(tmp_path: Path) -> None:
    make_pictures(tmp_path, {f"{n}.png": (64, 64) for n in range(12)})
    for batch_size, expected in ((1, [8, 4]), (10, [10, 2])):
        data = build(tmp_path, cache_text_encoder_outputs=True, train_batch_size=batch_size)
        encoder = FakeTextEncoder()
        data.fill_captions([1], encoder, "te-1")
        assert [len(batch) for batch in encoder.batches] == expected


def test_the_encoder_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path, SIZES)
    encoded_more = threading.Event()
    write = files.write_safetensors
    late = []

    def slow(path: Path, *rest: Any) -> None:
        late.append(encoded_more.wait(20))  # until the encoder was asked for the next batch
        write(path, *rest)

    monkeypatch.setattr(files, "write_safetensors", slow)
    for fill in ("latents", "text"):
        encoded_more.clear()
        data = build(tmp_path, vae_batch_size=1, text_encoder_batch_size=1, **BUCKETS, **DISK)
        encoders = {"latents": FakeAutoencoder(), "text": FakeTextEncoder()}

        def encode(given: Any, encoder: Any = encoders[fill]) -> Any:
            if encoder.batches:
                encoded_more.set()
            return encoder(given)

        if fill == "latents":
            data.fill_latents(encode, "ae-1")
        else:
            data.fill_captions([1], encode, "te-1")
        assert late == [True] * len(SIZES)
        late.clear()


def test_a_disk_that_fills_up_meanwhile_is_named_and_leaves_whole_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path, SIZES)
    replacing = files.replacing
    room = iter([True] * 2 + [False] * 100)

    def write(path: Path, tensors: Any, metadata: Any) -> None:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
            if not next(room):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_safetensors", write)
        data = build(tmp_path, vae_batch_size=1, **BUCKETS, **DISK)
        with pytest.raises(DatasetError, match=r"lumina_cache cannot be written to \(No space left .* --cache_dir"):
            data.fill_latents(FakeAutoencoder(), "ae-1")
        with pytest.raises(DatasetError, match=r"No space left .* --cache_dir"):
            data.fill_captions([1], FakeTextEncoder(), "te-1")
    entries = list((tmp_path / "lumina_cache" / "latents").iterdir())
    assert [path.suffix for path in entries] == [".safetensors"] * 2
    assert not any(path.name.startswith(".") for path in entries)
    assert _latents_made(tmp_path, **BUCKETS) == len(SIZES) - 2


def test_ctrl_c_while_encoding_keeps_what_was_written_whole(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    encoder = FakeAutoencoder()

    def stopped(pixels: torch.Tensor) -> torch.Tensor:
        if encoder.encoded == 3:
            raise KeyboardInterrupt
        return encoder(pixels)

    data = build(tmp_path, vae_batch_size=1, **BUCKETS, **DISK)
    with pytest.raises(KeyboardInterrupt):
        data.fill_latents(stopped, "ae-1")
    entries = list((tmp_path / "lumina_cache" / "latents").iterdir())
    assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in entries)
    assert len(entries) <= 3
    assert _latents_made(tmp_path, **BUCKETS) == len(SIZES) - len(entries)


def test_a_second_start_encodes_nothing(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    assert _latents_made(tmp_path) == 4
    assert _latents_made(tmp_path) == 0
    assert len(_texts_made(tmp_path)) == 4
    assert _texts_made(tmp_path) == []


def test_a_changed_picture_alone_is_encoded_again(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    _latents_made(tmp_path)
    noise_image(64, 64, seed=99).save(tmp_path / "a.png")
    assert _latents_made(tmp_path) == 1
    make_pictures(tmp_path, {"e.png": (64, 64)})
    (tmp_path / "b.png").unlink()
    noise_image(64, 64, seed=77).save(tmp_path / "e.png")
    assert _latents_made(tmp_path) == 1


def test_a_new_mtime_alone_encodes_nothing_but_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path, SIZES)
    _latents_made(tmp_path)
    hashed = _count_hashes(monkeypatch)
    assert _latents_made(tmp_path) == 0
    assert hashed == []
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert _latents_made(tmp_path) == 0
    assert hashed == ["a.png"]
    assert _latents_made(tmp_path) == 0
    assert hashed == ["a.png"]


def _count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    real = files.sha256_of_file
    monkeypatch.setattr(files, "sha256_of_file", lambda path: hashed.append(path.name) or real(path))
    return hashed


def test_a_copied_or_renamed_picture_is_found_by_its_content(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    _latents_made(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "renamed.png")
    assert _latents_made(tmp_path) == 0


def test_every_ingredient_of_a_latent_counts(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    assert _latents_made(tmp_path) == 4
    assert _latents_made(tmp_path, fingerprint="ae-2") == 4
    assert _latents_made(tmp_path, resolution=(32, 32)) == 4
    assert _latents_made(tmp_path, flip_aug=True) == 4  # only the mirrored ones are new
    # Only d.png is resized at all, so the method changes nothing for the others.
    assert _latents_made(tmp_path, resize_interpolation="bicubic") == 1
    assert _latents_made(tmp_path) == 0


def test_every_ingredient_of_a_text_counts(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    assert sorted(_texts_made(tmp_path)) == ["a a, tag", "a b, tag", "a c, tag", "a d, tag"]
    (tmp_path / "b.txt").write_text("something else", encoding="utf-8")
    assert _texts_made(tmp_path) == ["something else"]
    assert len(_texts_made(tmp_path, fingerprint="te-2")) == 4
    assert len(_texts_made(tmp_path, caption_prefix="photo")) == 4
    assert _texts_made(tmp_path, caption_dropout_rate=0.1) == [""]
    assert _texts_made(tmp_path) == []


def test_texts_are_encoded_once_in_batches_of_like_length(tmp_path: Path) -> None:
    make_pictures(tmp_path, {f"{n}.png": (64, 64) for n in range(6)}, captions=False)
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text("x" * (1 + n % 3), encoding="utf-8")
    data = build(tmp_path, cache_text_encoder_outputs=True, text_encoder_batch_size=2)
    encoder = FakeTextEncoder()
    data.fill_captions([1], encoder, "te-1")
    assert encoder.batches == [["xxx", "xx"], ["x"]]


def test_length_is_what_the_caller_says(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    data = build(tmp_path, cache_text_encoder_outputs=True)
    encoder = FakeTextEncoder()
    captions = dict.fromkeys(["one", "a b c", "three", "four five"])
    assert data.text is not None
    data.text.fill(captions, encoder, "te-1", 2, ALONE, length_of=lambda caption: len(caption.split()))
    assert encoder.batches == [["a b c", "four five"], ["one", "three"]]


def test_entries_are_bf16_safetensors_named_by_their_digest(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    _latents_made(tmp_path)
    _texts_made(tmp_path)
    (latent,) = (tmp_path / "lumina_cache" / "latents").iterdir()
    (text,) = (tmp_path / "lumina_cache" / "text").iterdir()
    assert {name: (value.dtype, value.shape) for name, value in load_file(latent).items()} == {
        "latents": (torch.bfloat16, (4, 8, 8))
    }
    assert load_file(text)["text"].shape == (9, 2)
    index = json.loads((tmp_path / "lumina_cache" / "pictures.json").read_text(encoding="utf-8"))
    assert list(index["pictures"]) == ["a.png"]


def test_cache_dir_takes_everything_and_pictures_stay_untouched(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        make_pictures(tmp_path / name, {"a.png": (64, 64)})
        before = sorted((tmp_path / name).iterdir())
        assert _latents_made(tmp_path / name, cache_dir=cache) == (1 if name == "one" else 0)  # the same content
        _texts_made(tmp_path / name, cache_dir=cache)
        assert sorted((tmp_path / name).iterdir()) == before
    assert len(list(cache.glob("pictures-*.json"))) == 2


def test_a_folder_that_cannot_be_written_to_names_cache_dir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, SIZES)
    # A file where the cache folder would be fails for every user, root included.
    (tmp_path / "lumina_cache").write_bytes(b"")
    data = build(tmp_path, **DISK)
    encoder = FakeAutoencoder()
    with pytest.raises(DatasetError, match=r"lumina_cache cannot be written to \(.*\), .* --cache_dir"):
        data.fill_latents(encoder, "ae-1")
    assert caplog.text.count("pictures.json cannot be written") == 1
    with pytest.raises(DatasetError, match="--cache_dir"):
        data.fill_captions([1], FakeTextEncoder(), "te-1")
    assert encoder.encoded == 0


def _spoil(path: Path, how: str) -> None:
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"latents": torch.zeros(4, 8, 8, dtype=torch.bfloat16)}, path)
    else:
        save_file({"other": torch.zeros(1)}, path, {"digest": path.stem})


@pytest.mark.parametrize("how", ["torn", "empty", "foreign", "wrong name"])
def test_a_damaged_entry_is_named_removed_and_made_anew(tmp_path: Path, how: str) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    _latents_made(tmp_path)
    (path,) = (tmp_path / "lumina_cache" / "latents").iterdir()
    _spoil(path, how)
    data = build(tmp_path, **DISK)
    assert missing_latents(data, "ae-1") == 0
    with pytest.raises(DatasetError, match=rf"{path.name} is damaged .* It has been deleted; start again"):
        data.latents.get(data.items[0], False)
    assert _latents_made(tmp_path) == 1


def test_a_damaged_index_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, SIZES)
    _latents_made(tmp_path)
    for content in ("{", '{"version": 1, "pictures": {"a.png": [1, 2]}}', "[]"):
        (tmp_path / "lumina_cache" / "pictures.json").write_text(content, encoding="utf-8")
        caplog.clear()
        assert _latents_made(tmp_path) == 0
        assert "pictures.json cannot be understood" in caplog.text


def test_sd_scripts_files_are_left_alone(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    theirs = [tmp_path / "a_0064x0064_lumina.npz", tmp_path / "a_lumina_te.npz"]
    for path in theirs:
        path.write_bytes(b"theirs")
    assert _latents_made(tmp_path) == 1
    assert all(path.read_bytes() == b"theirs" for path in theirs)


def test_numbers_that_are_not_finite_name_the_picture(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    data = build(tmp_path, cache_latents=True, cache_text_encoder_outputs=True, vae_batch_size=2)

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        latents = FakeAutoencoder()(pixels)
        latents[1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(DatasetError, match=r"Encoding .*b\.png gave numbers that are not finite"):
        data.fill_latents(broken, "ae-1")
    with pytest.raises(DatasetError, match="Encoding the caption 'a a, tag' gave"):
        data.fill_captions([1], lambda captions: [torch.tensor([[float("inf")]]) for _ in captions], "te-1")


@pytest.mark.parametrize("to_disk", [False, True])
def test_pictures_that_cannot_be_decoded_are_left_out_while_caching(
    tmp_path: Path, to_disk: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make_pictures(tmp_path, SIZES)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    data = build(tmp_path, cache_latents=True, cache_latents_to_disk=to_disk)
    data.fill_latents(FakeAutoencoder(), "ae-1")
    assert [item.name for item in data.items] == ["a.png", "c.png", "d.png"]
    assert [item.index for item in data.items] == [0, 2, 3]
    assert caplog.text.count("b.png") == 1
    assert "1 picture cannot be read and is left out" in caplog.text
    drawn = [draw.item.name for batch in data.plan_epoch(1, 1).batches for draw in batch.draws]
    assert sorted(drawn) == ["a.png", "c.png", "d.png"]


def test_nothing_left_after_caching_is_an_error(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    data = build(tmp_path, cache_latents=True)
    with pytest.raises(DatasetError, match=r"No picture is left to train on: .*a\.png"):
        data.fill_latents(FakeAutoencoder(), "ae-1")


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_work_and_end_with_the_same(tmp_path: Path, count: int, to_disk: bool) -> None:
    make_pictures(tmp_path, SIZES | {f"{n}.png": (64, 64) for n in range(5)})
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    flags = DISK if to_disk else {"cache_latents": True, "cache_text_encoder_outputs": True}
    processes = FakeProcesses(count)
    encoders = [(FakeAutoencoder(), FakeTextEncoder()) for _ in range(count)]

    def run(rank: int) -> TrainingData:
        data = build(tmp_path, flip_aug=True, vae_batch_size=2, **BUCKETS, **flags)
        among = Sharing(rank, count, processes.gather(rank))
        assert missing_latents(data, "ae-1", among) == 9
        data.fill_latents(encoders[rank][0], "ae-1", among)
        data.fill_captions([1], encoders[rank][1], "te-1", among)
        assert missing_latents(data, "ae-1", among) == 0
        assert missing_text(data, captions_of(data, [1]), "te-1", among) == 0
        return data

    results = processes.run(run)
    assert all(autoencoder.encoded > 0 and text.encoded for autoencoder, text in encoders)
    assert sum(autoencoder.encoded for autoencoder, _ in encoders) == 8 * 2
    assert sorted(caption for _, text in encoders for caption in text.encoded) == sorted(captions_of(results[0], [1]))
    for data in results[1:]:
        assert [item.name for item in data.items] == [item.name for item in results[0].items]
        for item in data.items:
            for flip in (False, True):
                assert torch.equal(data.latents.get(item, flip), results[0].latents.get(item, flip))
            assert torch.equal(data.text.get(item.caption), results[0].text.get(item.caption))


def test_processes_that_do_not_share_a_folder_are_told(tmp_path: Path) -> None:
    for rank in range(2):
        make_pictures(tmp_path / str(rank), SIZES)
    processes = FakeProcesses(2)

    def run(rank: int) -> None:
        build(tmp_path / str(rank), **DISK).fill_latents(
            FakeAutoencoder(), "ae-1", Sharing(rank, 2, processes.gather(rank))
        )

    with pytest.raises(DatasetError, match="all processes need the same folder"):
        processes.run(run)


def test_captions_given_without_folders_go_to_the_first_one(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    data = build(tmp_path, **DISK)
    captions = dict.fromkeys(["", "a sample prompt"])
    assert data.text is not None
    data.text.fill(captions, FakeTextEncoder(), "te-1", 2, ALONE)
    assert missing_text(data, captions, "te-1") == 0
    assert len(list((tmp_path / "lumina_cache" / "text").iterdir())) == 2


@pytest.mark.parametrize("to_disk", [False, True])
def test_the_same_text_as_prompt_and_negative_prompt_has_two_encodings(tmp_path: Path, to_disk: bool) -> None:
    # defect 42
    make_pictures(tmp_path, {"a.png": (64, 64)})
    flags = DISK if to_disk else {"cache_text_encoder_outputs": True, "cache_latents": True}

    def with_system_prompt(texts: list[str]) -> list[torch.Tensor]:
        return FakeTextEncoder()([f"system {text}" for text in texts])

    for _ in range(2):
        data = build(tmp_path, **flags)
        data.fill_captions([1], with_system_prompt, "te-1 with")
        (positive,) = data.extra_text(["a a, tag"], with_system_prompt, "te-1 with")
        (negative,) = data.extra_text(["a a, tag"], FakeTextEncoder(), "te-1 without")
        assert (len(positive), len(negative)) == (1 + len("system a a, tag"), 1 + len("a a, tag"))
        assert data.text is not None
        assert torch.equal(data.text.get("a a, tag"), positive)


def test_prompts_are_encoded_as_many_at_a_time_as_captions(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    data = build(tmp_path, **DISK, text_encoder_batch_size=2)
    encoder = FakeTextEncoder()
    prompts = [f"prompt {number}" for number in range(5)]
    features = data.extra_text(prompts, encoder, "te-1")
    assert [len(batch) for batch in encoder.batches] == [2, 2, 1]
    assert [len(feature) for feature in features] == [1 + len(prompt) for prompt in prompts]
