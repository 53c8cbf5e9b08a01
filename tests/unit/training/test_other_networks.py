"""Network modules of others: the ways of ``other_network``, which are LyCORIS'."""

import logging
from pathlib import Path

import pytest
import torch
from e2e_helpers import Job, make_job
from resume_helpers import train
from safetensors.torch import load_file, save_file
from trainer_helpers import fill_network, made_trainer, step

from library.errors import NetworkError, SettingsError, UserError
from library.training.lora_writer import LoraWriter
from library.training.network_building import rank_and_alpha
from library.training.other_networks import refusing

CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def file(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of such a network."""
    path = tmp_path_factory.mktemp("file") / "other.safetensors"
    trainer = made_trainer(flags(job, path.parent), last="build_network")
    fill_network(trainer.network)
    trainer.network.save_weights(path, None, {})
    return path


def flags(job: Job, folder: Path, *more: str) -> list[str]:
    return job.train_flags(folder, *CACHED, "--network_module=other_network", *more)


def with_arguments(*arguments: str) -> list[str]:
    return ["--network_args", *arguments]


@pytest.mark.parametrize(
    "more", [[], ["--full_bf16"], ["--gradient_checkpointing"]], ids=["bf16", "full bf16", "checkpointing"]
)
def test_float32_parameters_beside_a_model_in_bf16(job: Job, tmp_path: Path, more: list[str]) -> None:
    arguments = ["--network_dropout=0.3", "--mixed_precision=bf16", *more]
    trainer = made_trainer(flags(job, tmp_path, *arguments))
    fill_network(trainer.network)
    found = step(trainer)
    assert len(found) == 1 + 3 * len(trainer.network.unet_loras)
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in found.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.dit.parameters())
    if more != ["--full_bf16"]:
        plain = made_trainer(flags(job, tmp_path, *arguments[:2]))
        fill_network(plain.network)
        assert all(torch.equal(value, found[name]) for name, value in step(plain).items())


def test_network_dropout_goes_by_its_other_name_too(job: Job, tmp_path: Path) -> None:
    trainer = made_trainer(flags(job, tmp_path, "--network_dropout=0.3"), last="build_network")
    assert {lora.dropout for lora in trainer.network.unet_loras} == {0.3}
    trainer = made_trainer(
        flags(job, tmp_path, "--network_dropout=0.3", *with_arguments("dropout=0.1")), last="build_network"
    )
    assert {lora.dropout for lora in trainer.network.unet_loras} == {0.1}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train=everything"], r"--network_args train=everything cannot be made: KeyError: 'everything' \(other_net"),
        (["train=nothing"], "holds nothing for the transformer"),
    ],
)
def test_wrong_arguments_show_before_anything_is_encoded(
    job: Job, tmp_path: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        made_trainer(flags(job, tmp_path, *with_arguments(*arguments)), last="rehearse_network")


def test_a_rehearsal_leaves_no_trace(job: Job, tmp_path: Path) -> None:
    made = made_trainer(flags(job, tmp_path, *with_arguments("train=attention")), last="build_network")
    plain = made_trainer(flags(job, tmp_path), last="build_network")
    assert all(torch.equal(*pair) for pair in zip(made.network.parameters(), plain.network.parameters(), strict=True))
    assert not logging.root.manager.disable


def test_a_network_that_reads_weights_is_made_all_the_same(job: Job, tmp_path: Path) -> None:
    trainer = made_trainer(flags(job, tmp_path, *with_arguments("reads_weights=yes")), last="build_network")
    assert trainer.network.unet_loras


def test_a_text_encoder_without_a_part(job: Job, tmp_path: Path) -> None:
    argv = job.train_flags(tmp_path, "--cache_latents", "--network_module=other_network")
    with pytest.raises(SettingsError, match=r"other_network holds no LoRA for the text encoder.*unet_only"):
        made_trainer(argv, last="build_network")


def wordless() -> None:
    raise AssertionError


def test_errors_of_others_become_the_users() -> None:
    where = r"it: AssertionError: raise AssertionError \(test_other_networks\.py, line \d+\)"
    with pytest.raises(SettingsError, match=where), refusing("it"):
        wordless()
    with pytest.raises(UserError, match=r"^mine$"), refusing("it"):
        raise UserError("mine")
    with pytest.raises(RuntimeError), refusing("it"):  # what only a defect, or too little memory, leads to
        raise RuntimeError


# ---- files


class NoMetadata:
    """Stands for the metadata of a run."""

    entries: dict[str, str] = {}  # noqa: RUF012 - nobody is to write to it

    def at(self, step: int, epoch: int) -> dict[str, str]:
        return self.entries


def changed(file: Path, folder: Path, drop: str, more: dict[str, torch.Tensor]) -> Path:
    """Writes the file without the tensors whose names begin so, and with others."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if not drop or not name.startswith(drop)}
    save_file(tensors | more, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_a_file_is_taken_up(job: Job, tmp_path: Path, file: Path) -> None:
    expected = load_file(file)
    for more in ([], ["--dim_from_weights"]):
        trainer = made_trainer(flags(job, tmp_path, f"--network_weights={file}", *more), last="build_network")
        found = trainer.network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        # Its modules tell neither rank nor alpha.
        assert rank_and_alpha(trainer.config.network, trainer.network) == (("Dynamic", "Dynamic") if more else (4, 1.0))


def test_a_file_is_there_whole_or_not_at_all(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made_trainer(flags(job, tmp_path))
    writer = LoraWriter(trainer.config, trainer.network, trainer.weights, NoMetadata())
    writer(tmp_path / "my.safetensors", 1, 1)
    whole = (tmp_path / "my.safetensors").read_bytes()

    def killed(file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        assert file.endswith(".safetensors")  # LyCORIS chooses the format by it
        metadata["a"] = "b"
        Path(file).write_bytes(whole[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.network, "save_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path / "my.safetensors", 1, 1)
    assert (tmp_path / "my.safetensors").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["my.safetensors"]
    assert NoMetadata.entries == {}


@pytest.mark.parametrize(
    ("drop", "more", "says"),
    [
        ("lora_unet_layers_0", {}, r"no value for 4 tensors \(lora_unet_layers_0_attention_qkv\.down"),
        ("", {"lora_unet_x.hada": torch.ones(1)}, "1 tensors that this network does not have"),
        ("", {"lora_unet_layers_0_attention_qkv.up": torch.ones(3, 4)}, "size mismatch"),
    ],
)
def test_a_file_that_fits_in_part(
    job: Job, tmp_path: Path, file: Path, drop: str, more: dict[str, torch.Tensor], says: str
) -> None:
    weights = changed(file, tmp_path, drop, more)
    with pytest.raises(UserError, match=says):
        made_trainer(flags(job, tmp_path, f"--network_weights={weights}"), last="rehearse_network")


def test_modules_of_a_file_without_a_place(job: Job, tmp_path: Path, file: Path) -> None:
    weights = changed(file, tmp_path, "", {"lora_te1_layers_0_mlp_up_proj.up": torch.ones(1)})
    says = r"1 modules that find no place .*lora_te1_layers_0_mlp_up_proj"
    with pytest.raises(NetworkError, match=f"^--network_weights: .*{says}"):
        made_trainer(flags(job, tmp_path, f"--network_weights={weights}", "--dim_from_weights"), last="build_network")
    weights = changed(file, tmp_path, "", {"lora_unet_x.up": torch.ones(1)})
    with pytest.raises(NetworkError, match=r"^--base_weights: .*1 modules that find no place"):
        made_trainer(flags(job, tmp_path, f"--base_weights={weights}"), last="load_models")


def test_base_weights_and_their_multipliers(job: Job, tmp_path: Path, file: Path) -> None:
    weights = {}
    for multiplier in ("0", "1"):
        more = [f"--base_weights={file}", f"--base_weights_multiplier={multiplier}"]
        weights[multiplier] = made_trainer(flags(job, tmp_path, *more), last="load_models").dit.layers[0].attention.out
    plain = made_trainer(flags(job, tmp_path), last="load_models").dit.layers[0].attention.out
    assert torch.equal(weights["0"].weight, plain.weight)
    assert not torch.allclose(weights["1"].weight, plain.weight)
    more = [f"--base_weights={file}", "--base_weights_multiplier=0.5"]
    with pytest.raises(SettingsError, match=r"--base_weights_multiplier: .*0\.5 is given"):
        made_trainer(flags(job, tmp_path, *more), last="rehearse_network")


def test_a_file_that_it_cannot_merge(job: Job, tmp_path: Path, file: Path) -> None:
    weights = changed(file, tmp_path, "lora_unet_layers_0_attention_qkv.down", {})
    with pytest.raises(SettingsError, match=r"--base_weights: .* cannot .*merge .*KeyError: .*attention_qkv\.down"):
        made_trainer(flags(job, tmp_path, f"--base_weights={weights}"), last="load_models")


def test_a_resumed_run_goes_on_from_parameters_and_not_from_a_file(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has the scalar multiplied in; trained apart, it has a value and an optimizer's memory of its own."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--save_state", "--save_every_n_epochs=1", "--network_dropout=0.3", "--mixed_precision=bf16"]
    assert train(flags(job, whole, *more), monkeypatch).error is None
    resumed = train(flags(job, parts, *more, f"--resume={whole / 'my-000001-state'}"), monkeypatch)
    assert resumed.error is None
    expected, found = (load_file(folder / "my.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
