import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import ModelFileError
from networks.lora_checkpoint import Entry, places_of, read_entries, write_merged
from networks.lora_files import Factors

OUT, W1, TE = "lora_unet_layers_0_attention_out", "lora_unet_layers_0_feed_forward_w1", "lora_te_layers_0_mlp_up_proj"
KEYS = {OUT: "layers.0.attention.out.weight", W1: "layers.0.feed_forward.w1.weight", TE: "layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_the_transformer_is_found_behind_its_prefixes(prefix, tmp_path):
    keys = [prefix + KEYS[OUT], prefix + KEYS[W1], "vae.decoder.conv_in.weight"]
    assert places_of([OUT, W1, TE], keys, tmp_path) == {OUT: prefix + KEYS[OUT], W1: prefix + KEYS[W1]}


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.gemma2_2b.transformer.model."])
def test_gemma2_is_found_behind_its_prefixes(prefix, tmp_path):
    assert places_of([OUT, TE], [prefix + KEYS[TE], "logit_scale"], tmp_path) == {TE: prefix + KEYS[TE]}


def test_both_are_found_in_an_all_in_one_file(tmp_path):
    keys = [f"model.diffusion_model.{KEYS[OUT]}", f"text_encoders.gemma2_2b.transformer.model.{KEYS[TE]}"]
    assert list(places_of([OUT, TE], keys, tmp_path)) == [OUT, TE]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["layers.0.attn.to_q.weight", "layers.0.attn.to_out.0.weight"], "diffusers' layout"),
        (["double_blocks.0.img_attn.qkv.weight"], "no LoRA module has a place"),
        ([KEYS[OUT]], r"1 of 2 LoRA modules have no place in it \(lora_unet_layers_0_feed_forward_w1\)"),
    ],
)
def test_other_files_are_refused(keys, message, tmp_path):
    with pytest.raises(ModelFileError, match=message):
        places_of([OUT, W1], keys, tmp_path)


def factors(rank=1, alpha=4.0, value=1 / 64):
    return {OUT: Factors(torch.full((rank, 6), value), torch.full((8, rank), 1.0), alpha)}


def merged(tensors, lora, tmp_path, precision=None, metadata=None):
    """Writes tensors, merges the LoRA into the one called "a", and reads the result."""
    save_file(tensors, tmp_path / "old.safetensors")
    write_merged(
        tmp_path / "old.safetensors", tmp_path / "new.safetensors", lora, {OUT: "a"}, precision, metadata or {}
    )
    return load_file(tmp_path / "new.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_change_is_added_in_float32_and_rounded_once(dtype, tmp_path):
    weight = torch.randn(8, 6).to(dtype)
    # One rank, so that the sum has one rounding: 1/64 at strength 4.
    assert torch.equal(merged({"a": weight}, factors(), tmp_path)["a"], (weight.float() + 1 / 16).to(dtype))


def test_other_tensors_stay_bit_for_bit_whatever_they_are(tmp_path):
    others = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(2, 3).half(),
        "long": torch.arange(3),
    }
    found = merged(others | {"a": torch.zeros(8, 6)}, factors(), tmp_path)
    assert set(found) == {*others, "a"}
    for name, tensor in others.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_a_precision_is_that_of_all_weights_and_of_nothing_else(tmp_path):
    others = {"half": torch.randn(3).half(), "bytes": torch.arange(7, dtype=torch.uint8)}
    found = merged(others | {"a": torch.zeros(8, 6)}, factors(), tmp_path, "BF16")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.bfloat16,
        "half": torch.bfloat16,
        "bytes": torch.uint8,
    }


@pytest.mark.parametrize(
    ("weight", "lora", "message"),
    [
        (torch.zeros(8, 6).to(torch.float8_e4m3fn), factors(), "F8_E4M3"),
        (torch.zeros(8, 6, dtype=torch.uint8), factors(), "U8"),
        (torch.zeros(8, 7), factors(), "8 x 7 and its LoRA 8 x 6"),
        (torch.full((8, 6), 60000.0, dtype=torch.float16), factors(value=9000.0), "not finite"),
    ],
)
def test_weights_that_cannot_take_it_are_named_and_nothing_is_left(weight, lora, message, tmp_path):
    with pytest.raises(ModelFileError, match=message):
        merged({"a": weight}, lora, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]


def test_a_precision_whose_range_is_too_small_is_told(tmp_path):
    with pytest.raises(ModelFileError, match=r"wide would hold numbers that are not finite.* --save_precision"):
        merged({"a": torch.zeros(8, 6), "wide": torch.tensor([1e5])}, factors(), tmp_path, "F16")
    merged({"a": torch.zeros(8, 6), "mask": torch.tensor([-torch.inf])}, factors(), tmp_path)  # stays as it is


def test_headers_are_read_with_metadata_or_refused(tmp_path):
    save_file({"a": torch.ones(2, 3).half()}, tmp_path / "m.safetensors", {"x": "y"})
    assert read_entries(tmp_path / "m.safetensors") == ({"a": Entry("F16", (2, 3), 12)}, {"x": "y"})
    save_file({"a": torch.ones(2)}, tmp_path / "bare.safetensors")
    assert read_entries(tmp_path / "bare.safetensors")[1] == {}
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-3])
    for name, message in (("", "is a folder"), ("no", "does not exist"), ("torn.safetensors", "is it complete")):
        with pytest.raises(ModelFileError, match=message):
            read_entries(tmp_path / name)
