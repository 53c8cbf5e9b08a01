"""Switches for speed and memory, alone and in every two together: what a run trains is what it trains without them.

Each run is the program's own: a command line, two optimizer steps, a LoRA file. Compared are the losses, every gradient of
both steps (so that the second one shows what the first did to the parameters) and the file.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from switch_helpers import (
    NUM_LAYERS,
    Row,
    Setting,
    covering,
    differing,
    flags_of,
    make_the_cpu_a_device,
    named,
    pairs_of,
    plain,
    possible_pairs,
    skip_where_the_cpu_cannot,
    tolerance,
    without,
    write_models,
)
from torch import Tensor
from trainer_helpers import fill_network, fresh_accelerate
from transport_helpers import LateTransport

from library.errors import SettingsError
from library.memory.quantised import QuantisedLinear
from library.memory.transport import Lane
from library.training.arguments import parse_arguments
from lumina_train_network import LuminaNetworkTrainer

# How far rounding elsewhere moves losses and gradients, by the run's arithmetic; about twice what was measured. Float32
# rounds by 6e-8, bf16 by 4e-3 and fp16 by 5e-4 at a time. A product in fp8 rounds a value at the edge between two codes to
# the other one, which is a step of up to 12 %.
ROUNDED_ONCE = {
    "float32": 2.5e-3,
    "fp16": 6e-3,
    "bf16": 0.04,
    "fp8 products": 0.25,
}  # to bf16, on its way into the model
OTHER_SUMS = {
    "float32": 2e-5,
    "fp16": 4e-3,
    "bf16": 0.03,
    "fp8 products": 0.25,
}  # the same numbers, added in another order

TABLE: dict[str, dict[str, Setting]] = {
    "precision": {
        "float32": Setting(),
        "bf16": Setting(("--mixed_precision=bf16",), changes=True),
        "fp16": Setting(("--mixed_precision=fp16",), changes=True),
        "full bf16": Setting(("--mixed_precision=bf16", "--full_bf16"), changes=True),
    },
    "weights": {
        "whole": Setting(),
        "fp8": Setting(("--fp8_base",), changes=True),
        "fp8 next-dit": Setting(("--fp8_base_unet",), changes=True),
        "fp8 products": Setting(("--fp8_base", "--fp8_fast"), changes=True),
        "nf4": Setting(("--nf4_base",), changes=True),
    },
    "trained": {
        "both": Setting(),
        "next-dit": Setting(("--network_train_unet_only",), changes=True),
        "gemma2": Setting(("--network_train_text_encoder_only",), changes=True),
    },
    "dropout": {
        "none": Setting(),
        "all": Setting(
            ("--network_dropout=0.2", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"), changes=True
        ),
    },
    # A second forward pass in some steps, without gradients and with another batch size.
    "output": {"learned": Setting(), "preserved": Setting(("--dataset_config={folder}/preserved.toml",), changes=True)},
    "accumulation": {"1": Setting(), "2": Setting(("--gradient_accumulation_steps=2",), changes=True)},
    "autoencoder": {"as the run": Setting(), "float32": Setting(("--no_half_vae",), changes=True)},
    "attention": {"auto": Setting(), "sdpa": Setting(("--attn_mode=sdpa",), changes=True)},
    "checkpointing": {
        "none": Setting(),
        "full": Setting(("--gradient_checkpointing",)),
        # The LoRA's part is added in an operation of its own where operations are observed: one rounding.
        "selective": Setting(("--gradient_checkpointing", "--gradient_checkpointing_level=selective"), OTHER_SUMS),
    },
    "offload": {"none": Setting(), "activations": Setting(("--cpu_offload_checkpointing",))},
    "swap": {"none": Setting(), "3 blocks": Setting(("--blocks_to_swap=3",)), "all": Setting(("--blocks_to_swap=4",))},
    "compile": {
        "none": Setting(),
        # Only traced: what is done with the trace takes too long for every row; see test_compilers.
        "compiled": Setting(("--torch_compile", "--dynamo_backend=eager"), OTHER_SUMS, is_dear=True),
    },
    "latents": {"each step": Setting(), "cached": Setting(("--cache_latents",), ROUNDED_ONCE)},
    "latents on disk": {"no": Setting(), "yes": Setting(("--cache_latents_to_disk",))},
    "vae batch": {"auto": Setting(), "1": Setting(("--vae_batch_size=1",), ROUNDED_ONCE)},
    "vae tiling": {"no": Setting(), "tiled": Setting(("--vae_tiling",))},
    "text": {"each step": Setting(), "cached": Setting(("--cache_text_encoder_outputs",), ROUNDED_ONCE)},
    "text on disk": {"no": Setting(), "yes": Setting(("--cache_text_encoder_outputs_to_disk",))},
    "text batch": {"auto": Setting(), "1": Setting(("--text_encoder_batch_size=1",), ROUNDED_ONCE)},
    "readers": {"8": Setting(), "none": Setting(("--max_data_loader_n_workers=0",))},
    "files": {"mapped": Setting(), "read": Setting(("--disable_mmap_load_safetensors",))},
}
IMPOSSIBLE: dict[frozenset[tuple[str, str]], str] = {
    frozenset({("weights", "fp8 products"), ("precision", "float32")}): "--fp8_fast multiplies in fp8 and gives bf16",
    frozenset({("weights", "fp8 products"), ("precision", "fp16")}): "--fp8_fast multiplies in fp8 and gives bf16",
    frozenset({("text", "cached"), ("trained", "gemma2")}): "--cache_text_encoder_outputs freezes Gemma2",
    frozenset({("text on disk", "yes"), ("trained", "gemma2")}): "--cache_text_encoder_outputs freezes Gemma2",
}
"""Pairs that the program refuses, and what it says."""
POINTLESS = {
    frozenset({("text", "cached"), ("trained", "both")}),
    frozenset({("text on disk", "yes"), ("trained", "both")}),
    frozenset({("latents on disk", "yes"), ("latents", "each step")}),
    frozenset({("text on disk", "yes"), ("text", "each step")}),
}
"""Pairs of which the second switch decides what the first one says."""

ROWS = covering(TABLE, {*IMPOSSIBLE, *POINTLESS})


class Recorded(LuminaNetworkTrainer):
    """A run that notes losses and gradients."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.found: dict[str, Tensor] = {}

    def build_optimizer(self) -> None:
        super().build_optimizer()
        # A new network adds nothing, and would have no gradients for half of its parameters.
        fill_network(self.network)
        clip = self.updater.clip

        def noted() -> Tensor:
            number = sum(name.startswith("loss") for name in self.found)
            for name, parameter in self.network.named_parameters():
                if parameter.grad is not None:
                    self.found[f"gradient {number} {name}"] = parameter.grad.clone()
            return clip()

        self.updater.clip = noted

    def build_loop(self) -> None:
        super().build_loop()
        report = self.events.report

        def noted(step: int, values: Any) -> None:
            self.found[f"loss {step}"] = torch.tensor(values["loss/current"])
            report(step, values)

        self.events.report = noted


@dataclasses.dataclass
class Device:
    """Where runs take place, and what they gave."""

    folder: Path
    models: dict[str, Path]
    transports: list[LateTransport]
    results: dict[tuple[tuple[str, str], ...], dict[str, Tensor]]
    count: int = 0

    def trainer(self, *flags: str) -> Recorded:
        fresh_accelerate()
        self.count += 1
        config = parse_arguments(
            [
                f"--pretrained_model_name_or_path={self.models['dit']}",
                f"--gemma2={self.models['gemma2']}",
                f"--ae={self.models['ae']}",
                f"--dataset_config={self.folder / 'learned.toml'}",
                f"--output_dir={self.folder / str(self.count)}",
                "--output_name=my",
                "--network_module=networks.lora_lumina",
                "--network_dim=4",
                "--learning_rate=1e-3",
                "--max_train_steps=2",
                "--seed=2",
                f"--cache_dir={self.folder / str(self.count) / 'cache'}",
                *(flag.format(folder=self.folder) for flag in flags),
            ]
        )
        assert config is not None
        return Recorded(config)

    def train(self, row: Row, *more: str) -> dict[str, Tensor]:
        """Returns what a run with the row's flags, and more of them, gives; it runs once."""
        key = (*row.items(), ("more", " ".join(more)))
        if key not in self.results:
            self.transports.clear()
            trainer = self.trainer(*flags_of(TABLE, row), *more)
            trainer.train()
            for transport in self.transports:
                transport.finish()
            _check_that_it_acted(row, trainer, self.transports)
            file = load_file(trainer.output_dir() / "my.safetensors")
            self.results[key] = {**trainer.found, **{f"file {name}": value for name, value in file.items()}}
        return self.results[key]


def _check_that_it_acted(row: Row, trainer: Recorded, transports: list[LateTransport]) -> None:
    copies = {lane: sum(transport.num_copies[lane] for transport in transports) for lane in Lane}
    assert (copies[Lane.WEIGHTS] > 5) == (row["swap"] != "none")
    assert (copies[Lane.BACK] > 5) == (row["offload"] != "none")
    of_gemma2 = row["swap"] != "none" and row["trained"] == "next-dit"
    of_next_dit = row["swap"] != "none" or row["offload"] != "none"
    assert len(transports) == of_gemma2 + of_next_dit
    quantised = sum(isinstance(module, QuantisedLinear) for module in trainer.dit.modules())
    in_halves = row["precision"] == "fp16"
    assert quantised == (0 if row["weights"] == "whole" and not in_halves else 5 * (NUM_LAYERS + 2))
    folders = {path.name for path in (trainer.output_dir() / "cache").glob("*")}
    assert ("latents" in folders) == (row["latents on disk"] == "yes")
    assert ("text" in folders) == (row["text on disk"] == "yes")
    parts = {name.split()[2][:7] for name in trainer.found if name.startswith("gradient")}
    trained = "next-dit" if row["trained"] == "both" and row["text"] == "cached" else row["trained"]
    assert parts == {"both": {"lora_te", "lora_un"}, "next-dit": {"lora_un"}, "gemma2": {"lora_te"}}[trained]


DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = '{folder}/0'
[[datasets.subsets]]
image_dir = '{folder}/1'
custom_attributes = {{ diff_output_preservation = {preserved} }}
"""
# With the seed below, every batch has one of the long ones, so that all have the same sizes and code is compiled once.
CAPTIONS = ("a disc", "a red disc", "a red disc on a blue background", "a blue disc on a red background")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("switches")
    for number, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", (80, 70), (45 * number, 220 - 45 * number, 128))
        ImageDraw.Draw(picture).ellipse((20, 10, 40 + 5 * number, 50), fill=(255, 20 * number, 0))
        path = folder / str(number // 3) / f"p{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    for name, preserved in (("learned", "false"), ("preserved", "true")):
        (folder / f"{name}.toml").write_text(DATASET.format(folder=folder, preserved=preserved), encoding="utf-8")
    handlers = list(logging.getLogger().handlers)
    with pytest.MonkeyPatch.context() as patch:
        torch._dynamo.reset()
        yield Device(folder, write_models(folder), make_the_cpu_a_device(patch), {})
    torch._dynamo.reset()
    logging.getLogger().handlers[:] = handlers
    fresh_accelerate()


def allowed(row: Row) -> float:
    """Returns how far a run may be from the one with the same arithmetic and nothing else."""
    arithmetic = row["precision"].removeprefix("full ")
    return tolerance(TABLE, row, "fp8 products" if row["weights"] == "fp8 products" else arithmetic)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns how far losses and gradients are apart (L2, relative), the one that is furthest."""
    assert found.keys() == expected.keys()
    kinds = sorted({" ".join(name.split()[:2]) for name in expected if not name.startswith("file")})
    assert kinds == ["gradient 0", "gradient 1", "loss 1", "loss 2"]
    return max(_relative(found, expected, kind) for kind in kinds)


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> float:
    names = [name for name in expected if name.startswith(kind)]
    ours, theirs = (torch.cat([one[name].float().flatten() for name in names]) for one in (found, expected))
    assert theirs.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("row", ROWS, ids=named(ROWS, TABLE))
def test_switches_together(device: Device, row: dict[str, str]) -> None:
    skip_where_the_cpu_cannot(row)
    _check(device, row)


COMPILED = [row for row in ROWS if row["compile"] == "compiled"]
QUICK = plain(TABLE) | {
    "compile": "compiled",
    "trained": "next-dit",
    "checkpointing": "full",
    "offload": "activations",
    "swap": "3 blocks",
}
SLOW = [pytest.param(row, backend, marks=pytest.mark.slow) for row in COMPILED for backend in ("aot_eager", "inductor")]


@pytest.mark.parametrize(("row", "backend"), [(QUICK, "aot_eager"), *SLOW])
def test_compilers(device: Device, row: dict[str, str], backend: str) -> None:
    """The compiled backward pass takes weights and activations as saved tensors, and selects what is computed again."""
    _check(device, row, f"--dynamo_backend={backend}")


def _check(device: Device, row: Row, *more: str) -> None:
    found = device.train(row, *more)
    exact = device.train(without(TABLE, row, lambda setting: setting.is_exact), *more)
    whole = device.train(without(TABLE, row, lambda setting: not setting.changes))
    assert differing(found, exact) == []
    assert distance(found, whole) <= allowed(row)


# What a switch needs to act at all.
NEEDS = {
    "latents on disk": {"latents": "cached"},
    "vae batch": {"latents": "cached"},
    "text": {"trained": "next-dit"},
    "text on disk": {"trained": "next-dit", "text": "cached"},
    "text batch": {"trained": "next-dit", "text": "cached"},
}
ALONE = [
    (switch, value)
    for switch, values in TABLE.items()
    for value, setting in values.items()
    if value != plain(TABLE)[switch] and not setting.changes and not setting.is_dear
]


@pytest.mark.parametrize(("switch", "value"), ALONE)
def test_a_switch_alone(device: Device, switch: str, value: str) -> None:
    base = plain(TABLE) | NEEDS.get(switch, {})
    found, whole = device.train(base | {switch: value}), device.train(base)
    setting = TABLE[switch][value]
    if setting.rounding is None:
        assert differing(found, whole) == []
    else:
        assert distance(found, whole) <= setting.rounding["float32"]


# How far a switch that changes the arithmetic moves losses and gradients of this model, whose weights are random and whose
# rows are short: 1.5 times what was measured. What it does to a larger one is in tests/numerics/test_quantised_model.py.
CHANGED = [
    ({"precision": "bf16"}, 0.05),
    ({"precision": "full bf16"}, 0.05),
    ({"precision": "fp16"}, 0.005),
    ({"weights": "fp8"}, 0.22),
    ({"weights": "fp8 next-dit"}, 0.11),
    ({"precision": "bf16", "weights": "fp8 products"}, 0.22),
    ({"weights": "nf4"}, 0.7),
    ({"precision": "bf16", "autoencoder": "float32"}, 0.03),
    ({"precision": "bf16", "attention": "sdpa"}, 0.025),
]


@pytest.mark.parametrize(("values", "bound"), CHANGED, ids=str)
def test_a_switch_that_changes_the_arithmetic(device: Device, values: dict[str, str], bound: float) -> None:
    skip_where_the_cpu_cannot(values)
    base = plain(TABLE) | ({"precision": "bf16"} if len(values) > 1 else {})
    moved = distance(device.train(base | values), device.train(base))
    assert bound / 20 < moved < bound  # less would be nothing done at all


def test_every_two_values_meet() -> None:
    met = set().union(*(pairs_of(row) for row in ROWS))
    assert met == set(possible_pairs(TABLE, {*IMPOSSIBLE, *POINTLESS}))
    assert len(ROWS) < 40


@pytest.mark.parametrize("pair", IMPOSSIBLE, ids=lambda pair: " and ".join(value for _, value in sorted(pair)))
def test_what_cannot_meet_is_refused(device: Device, pair: frozenset[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError, match=IMPOSSIBLE[pair]):
        device.trainer(*flags_of(TABLE, plain(TABLE) | dict(pair)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nf4_base", "--fp8_base"], "quantise the same weights"),
        (["--nf4_base", "--fp8_base_unet"], "quantise the same weights"),
        (["--fp8_fast", "--mixed_precision=bf16"], "--fp8_fast multiplies fp8 weights, and there are none"),
        (["--full_bf16"], "--full_bf16 needs --mixed_precision bf16"),
        (["--full_fp16"], "fp16 overflows in this model"),
    ],
)
def test_values_of_one_switch_that_exclude_each_other_are_refused(device: Device, flags: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        device.trainer(*flags)


def test_cached_captions_freeze_gemma2(device: Device) -> None:
    row = plain(TABLE) | {"text": "cached"}
    assert differing(device.train(row), device.train(row | {"trained": "next-dit"})) == []
