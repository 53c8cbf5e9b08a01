import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_helpers import GOLDEN, cases, fill, metadata_of, small_next_dit, velocity
from safetensors.torch import load_file, save_file

from library.errors import SettingsError
from networks.lora_files import content_hashes
from networks.lora_lumina import create_network, create_network_from_weights
from networks.merge_lumina_lora import main

ROOT = Path(__file__).resolve().parents[3]
GOLDEN_LORA = GOLDEN / "lora.safetensors"
WEIGHTS = GOLDEN / "next_dit_weights.safetensors"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRA files of different ranks and modules."""
    folder = tmp_path_factory.mktemp("loras")
    for number, settings in enumerate(({}, {"mlp_dim": "0", "embedder_dims": "[2,2,2]"})):
        network = create_network(1.0, 4 + number, 2.0, None, None, small_next_dit(), **settings)
        fill(network, seed=number)
        metadata = {"ss_base_model_version": "lumina", "modelspec.title": str(number), "ss_output_name": "same"}
        network.save_weights(folder / f"lora{number}.safetensors", None, metadata)
    return [folder / "lora0.safetensors", folder / "lora1.safetensors"]


def drawn(*files, ratios=(), weights=WEIGHTS):
    """The model's output with LoRAs attached."""
    model = small_next_dit()
    model.load_state_dict(load_file(weights))
    for file, ratio in zip(files, ratios or [1.0] * len(files), strict=True):
        create_network_from_weights(ratio, file, None, None, model)[0].apply_to(None, model)
    with torch.no_grad():
        return velocity(model, cases())


def assert_close(found, expected):
    # The same sums in another order, in float32.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_file_that_is_overwritten_is_named(loras, tmp_path, caplog):
    target = tmp_path / "both.safetensors"
    for _ in range(2):
        with caplog.at_level("INFO"):
            main(["--models", *map(str, loras), f"--save_to={target}"])
    assert caplog.text.count("is overwritten") == 1
    assert f"{target} of 20" in caplog.text


def test_one_file_does_what_both_do(loras, tmp_path):
    target = tmp_path / "both.safetensors"
    main(["--models", *map(str, loras), "--ratios", "0.7", "-0.5", f"--save_to={target}"])
    expected = drawn(*loras, ratios=(0.7, -0.5))
    assert_close(drawn(target), expected)
    assert float((drawn() - expected).abs().max() / expected.abs().max()) > 1e-2  # they do something
    metadata = metadata_of(target)
    hashes = {name: metadata.pop(name) for name in ("sshs_model_hash", "sshs_legacy_hash")}
    assert metadata == {
        "ss_base_model_version": "lumina",
        "ss_output_name": "same",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "modelspec.title": "both",
        "modelspec.merged_from": "lora0, lora1",
    }
    assert hashes == content_hashes(load_file(target), metadata)


def test_the_model_with_the_loras_inside_draws_what_it_draws_with_them(loras, tmp_path):
    target = tmp_path / "model.safetensors"
    main(["--models", *map(str, loras), f"--pretrained_model_name_or_path={WEIGHTS}", f"--save_to={target}"])
    assert_close(drawn(weights=target), drawn(*loras))
    assert metadata_of(target) == metadata_of(WEIGHTS) | {"modelspec.merged_from": "next_dit_weights, lora0, lora1"}


def test_everything_else_in_a_model_file_stays_and_what_is_left_out_is_said(loras, tmp_path, caplog):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(WEIGHTS).items()}
    whole |= {"vae.x": torch.randn(3).half(), "text_encoders.spiece_model": torch.arange(9, dtype=torch.uint8)}
    save_file(whole, tmp_path / "all.safetensors", {"modelspec.hash_sha256": "0x1", "modelspec.title": "base"})
    with_te = load_file(loras[0]) | {
        "lora_te_layers_0_mlp_up_proj.lora_down.weight": torch.ones(1, 4),
        "lora_te_layers_0_mlp_up_proj.lora_up.weight": torch.ones(4, 1),
    }
    save_file(with_te, tmp_path / "te.safetensors")
    flags = [
        f"--models={tmp_path / 'te.safetensors'}",
        f"--pretrained_model_name_or_path={tmp_path / 'all.safetensors'}",
    ]
    main([*flags, f"--save_to={tmp_path / 'new.safetensors'}"])
    assert "1 LoRA modules are left out" in caplog.text
    new = load_file(tmp_path / "new.safetensors")
    assert list(new) == list(whole)
    changed = {name for name in whole if not torch.equal(new[name], whole[name])}
    linears = {key.removesuffix(".alpha") for key in load_file(loras[0]) if key.endswith(".alpha")}
    assert len(changed) == len(linears)
    assert all(new[name].dtype == tensor.dtype for name, tensor in whole.items())
    assert metadata_of(tmp_path / "new.safetensors") == {"modelspec.title": "base", "modelspec.merged_from": "all, te"}
    main([*flags, f"--save_to={tmp_path / 'half.safetensors'}", "--save_precision=fp16"])
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()}
    assert dtypes == {torch.float16, torch.uint8}


def test_a_smaller_rank_says_what_it_keeps_and_keeps_the_metadata(loras, tmp_path, caplog):
    caplog.set_level("INFO")
    target = tmp_path / "small.safetensors"
    main([f"--models={loras[0]}", "--new_rank=2", f"--save_to={target}", "--save_precision=bf16"])
    tensors = load_file(target)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name} == {2}
    assert {tensor.dtype for name, tensor in tensors.items() if "alpha" not in name} == {torch.bfloat16}
    assert metadata_of(target)["ss_network_dim"] == "2"
    assert metadata_of(target)["ss_output_name"] == "same"
    assert "rank 2 keeps" in caplog.text
    # A quarter of the ranks are left of random factors; what is left points the same way.
    whole, part, base = drawn(loras[0]), drawn(target), drawn()
    cosine = torch.nn.functional.cosine_similarity((whole - base).flatten(), (part - base).flatten(), dim=0)
    assert 0.5 < float(cosine) < 0.999


def test_a_file_in_another_form_is_merged_too(loras, tmp_path):
    from networks.convert_lumina_lora import main as convert

    convert([f"--src_path={loras[0]}", f"--dst_path={tmp_path / 'd.safetensors'}", "--dst=diffusers"])
    main([f"--models={tmp_path / 'd.safetensors'}", f"--save_to={tmp_path / 'k.safetensors'}"])
    assert_close(drawn(tmp_path / "k.safetensors"), drawn(loras[0]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--models is missing"),
        (["--models", "a", "b", "--ratios", "1"], r"--ratios: 1 numbers for 2 files"),
        (["--models=a"], "--save_to: it is missing"),
        (["--models=a", "--save_to=."], r"--save_to: \."),
        (["--models=a", "--save_to=b.ckpt"], r"must end in \.safetensors"),
        ([f"--models={GOLDEN_LORA}", f"--save_to={GOLDEN_LORA}"], "one of the files that are read"),
        (["--models=a", "--save_to=b.safetensors", "--new_rank=0"], "--new_rank: 0 must be above 0"),
        (
            ["--models=a", "--save_to=b.safetensors", "--new_rank=2", "--pretrained_model_name_or_path=c"],
            "--new_rank is for",
        ),
        ([f"--models={GOLDEN_LORA}", "--ratios=0", "--save_to=b.safetensors"], "--ratios: all are 0"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(SettingsError, match=message):
        main(flags)


def test_it_starts_as_a_script(loras, tmp_path):
    script = ROOT / "networks" / "merge_lumina_lora.py"
    flags = ["--models", *map(str, loras), f"--save_to={tmp_path / 'both.safetensors'}"]
    done = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.safetensors").is_file()
