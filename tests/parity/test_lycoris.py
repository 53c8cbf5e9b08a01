"""LyCORIS as a network module: it reaches what ``networks.lora_lumina`` reaches, and its gradients come through."""

from pathlib import Path

import pytest
import torch
from e2e_helpers import Job, make_job
from trainer_helpers import fill_network, made_trainer, step

pytest.importorskip("lycoris")
CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]
LYCORIS = "--network_module=lycoris.kohya"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("arguments", [[], ["bypass_mode=True"]], ids=["rebuilt weights", "beside the weights"])
def test_its_lora_is_ours(job: Job, tmp_path: Path, arguments: list[str]) -> None:
    flags = job.train_flags(tmp_path, *CACHED, "--network_alpha=2")
    ours = made_trainer(flags)
    theirs = made_trainer([*flags, LYCORIS, "--network_args", "algo=lora", *arguments])
    fill_network(ours.network)
    assert {lora.lora_name for lora in theirs.network.loras} == {lora.lora_name for lora in ours.network.loras}
    theirs.network.load_state_dict(ours.network.state_dict(), strict=False)
    expected, found = step(ours), step(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # (W + s up down) - W keeps of a change what float32 keeps of W, which here is about ten times as large.
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["algo=lora", "bypass_mode=True", "module_dropout=0.3"],
        ["algo=lora", "dora_wd=True", "rank_dropout=0.3"],
        ["algo=loha"],
        ["algo=loha", "dora_wd=True"],
        ["algo=lokr", "factor=4"],
        ["algo=full"],
        ["algo=ia3"],
        ["algo=diag-oft"],
        ["algo=glora"],
    ],
    ids=" ".join,
)
def test_a_step_in_bf16_with_every_algorithm(job: Job, tmp_path: Path, arguments: list[str]) -> None:
    flags = [LYCORIS, "--mixed_precision=bf16", "--network_args", *arguments]
    found = []
    for more in (
        [],
        ["--gradient_checkpointing"],
        ["--gradient_checkpointing", "--gradient_checkpointing_level=selective"],
    ):
        trainer = made_trainer(job.train_flags(tmp_path, *CACHED, *more, *flags))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in trainer.network.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
        found.append(step(trainer))
        assert all(parameter.grad is None for parameter in trainer.dit.parameters())
        dropped = sum(name.startswith("module_dropout") for name in arguments)
        assert dropped or len(found[-1]) == 1 + len(list(trainer.network.parameters()))
        assert all(bool(value.isfinite().all()) and bool(value.any()) for value in found[-1].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
