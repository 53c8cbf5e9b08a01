"""Switches of the drawing program for speed and memory, alone and in every two together: the same latents and picture."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from switch_helpers import (
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
    without,
    write_models,
)
from torch import Tensor
from trainer_helpers import fill_network, fresh_accelerate
from transport_helpers import LateTransport

import lumina_minimal_inference
from library.errors import SettingsError
from library.lumina import drawing
from library.lumina.gemma2 import empty_gemma2
from library.lumina.loading import ModelPaths, inspect_models
from library.lumina.next_dit import NextDiT
from library.memory.transport import Lane
from networks import lora_lumina

TABLE: dict[str, dict[str, Setting]] = {
    "precision": {
        "bf16": Setting(),
        "float32": Setting(("--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32"), changes=True),
        "fp16": Setting(("--dtype=fp16", "--gemma2_dtype=fp16", "--ae_dtype=fp32"), changes=True),
    },
    "weights": {
        "whole": Setting(),
        "fp8": Setting(("--fp8_base",), changes=True),
        "fp8 next-dit": Setting(("--fp8_base_unet",), changes=True),
        "fp8 products": Setting(("--fp8_base", "--fp8_fast"), changes=True),
        "nf4": Setting(("--nf4_base",), changes=True),
    },
    "lora": {
        "none": Setting(),
        "attached": Setting(("--lora_weights", "{lora};0.7"), changes=True),
        "merged": Setting(("--lora_weights", "{lora};0.7", "--merge_lora_weights"), changes=True),
    },
    "attention": {
        "auto": Setting(),
        "sdpa": Setting(("--attn_mode=sdpa",), changes=True),
        "flex": Setting(("--attn_mode=flex",), changes=True),
    },
    "swap": {"none": Setting(), "3 blocks": Setting(("--blocks_to_swap=3",)), "all": Setting(("--blocks_to_swap=4",))},
    "offload": {"none": Setting(), "models": Setting(("--offload",))},
}
IMPOSSIBLE = {
    frozenset({("weights", "fp8 products"), ("precision", other)}): "--fp8_fast multiplies in fp8 and gives bf16"
    for other in ("float32", "fp16")
}
"""Pairs that the program refuses, and what it says."""
ROWS = covering(TABLE, {*IMPOSSIBLE})
ALONE = [
    {**plain(TABLE), switch: value}
    for switch, values in TABLE.items()
    for value, setting in values.items()
    if value != plain(TABLE)[switch] and setting.is_exact
]


@dataclasses.dataclass
class Device:
    """Where pictures are drawn, and what came out."""

    folder: Path
    models: dict[str, Path]
    lora: Path
    transports: list[LateTransport]
    results: dict[tuple[tuple[str, str], ...], dict[str, Tensor]]
    latents: list[Tensor]
    copies: dict[tuple[tuple[str, str], ...], tuple[int, int]] = dataclasses.field(default_factory=dict)

    def run(self, output: Path, row: Row, *more: str) -> None:
        """Runs the program with a row's flags and more of them."""
        fresh_accelerate()
        self.transports.clear()
        self.latents.clear()
        lumina_minimal_inference.main(
            [
                f"--pretrained_model_name_or_path={self.models['dit']}",
                f"--gemma2_path={self.models['gemma2']}",
                f"--ae_path={self.models['ae']}",
                "--prompt=a red disc on a blue background",
                "--negative_prompt=soft",  # of another length, so that attention gets a mask
                "--image_width=64",
                "--image_height=96",
                "--steps=3",
                "--seed=0",
                f"--output_dir={output}",
                *(flag.format(lora=self.lora) for flag in flags_of(TABLE, row)),
                *more,
            ]
        )
        for transport in self.transports:
            transport.finish()

    def draw(self, row: Row) -> dict[str, Tensor]:
        """Returns latents and picture of a row's flags; they are drawn once."""
        key = tuple(row.items())
        if key not in self.results:
            output = Path(tempfile.mkdtemp(dir=self.folder))
            self.run(output, row)
            copies = [transport.num_copies[Lane.WEIGHTS] for transport in self.transports]
            self.copies[key] = (len(copies), sum(copies))
            (path,) = output.iterdir()
            picture = torch.from_numpy(numpy.asarray(Image.open(path)).copy())
            self.results[key] = {"latents": self.latents.pop(), "picture": picture}
        return self.results[key]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("switches")
    models, lora, latents = write_models(folder), folder / "lora.safetensors", []
    write_lora(models, lora)
    handlers = list(logging.getLogger().handlers)
    draw = drawing.draw_latents

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        latents.append(draw(*args, **kwargs))
        return latents[-1]

    with pytest.MonkeyPatch.context() as patch:
        transports = make_the_cpu_a_device(patch)
        patch.setattr(drawing, "draw_latents", noted)
        # flex_attention as it is defined; compiled, it is tried by tests/e2e/test_attention_modes.py.
        patch.setattr(torch, "compile", lambda function, **_: function)
        yield Device(folder, models, lora, transports, {}, latents)
    logging.getLogger().handlers[:] = handlers
    fresh_accelerate()


def write_lora(models: dict[str, Path], path: Path) -> None:
    """Writes a LoRA for all of Next-DiT and Gemma2 that visibly does something."""
    files = inspect_models(ModelPaths(models["dit"], models["gemma2"], models["ae"]))
    with torch.device("meta"):
        dit, encoder = NextDiT(files.dit.config), empty_gemma2(files.gemma2.config)
    network = lora_lumina.create_network(1.0, 4, 4, None, [encoder], dit)
    fill_network(network, size=0.2)
    network.save_weights(path, None, {})


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns how far latents are apart (L2, relative)."""
    ours, theirs = found["latents"], expected["latents"]
    assert theirs.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("row", [*ROWS, *ALONE], ids=named([*ROWS, *ALONE], TABLE))
def test_switches_together_and_alone(device: Device, row: dict[str, str]) -> None:
    skip_where_the_cpu_cannot(row)
    whole = device.draw(without(TABLE, row, lambda setting: setting.is_exact))
    assert differing(device.draw(row), whole) == []
    num_streamed, num_copies = device.copies[tuple(row.items())]
    assert num_streamed == (0 if row["swap"] == "none" else 2)  # of the Next-DiT and of Gemma2
    assert num_copies >= 5 * num_streamed


def test_every_two_values_meet() -> None:
    met = set().union(*(pairs_of(row) for row in ROWS))
    assert met == set(possible_pairs(TABLE, {*IMPOSSIBLE}))
    assert len(ROWS) < 25


# How far a switch that changes the arithmetic moves the latents of this model, of random weights, in three steps: at most
# 1.5 times what was measured, and at least a tenth of that, or nothing was done.
CHANGED = [
    ({"precision": "float32"}, 0.011),
    ({"weights": "fp8"}, 0.055),
    ({"weights": "fp8 next-dit"}, 0.04),
    ({"weights": "fp8 products"}, 0.07),
    ({"weights": "nf4"}, 0.22),
    ({"attention": "sdpa"}, 0.011),
]


@pytest.mark.parametrize(("values", "bound"), CHANGED, ids=str)
def test_a_switch_that_changes_the_arithmetic(device: Device, values: dict[str, str], bound: float) -> None:
    skip_where_the_cpu_cannot(values)
    moved = distance(device.draw(plain(TABLE) | values), device.draw(plain(TABLE)))
    assert bound / 15 < moved < bound


def test_fp16_draws_nearer_to_float32_than_bf16(device: Device) -> None:
    whole, fp16, bf16 = (device.draw(plain(TABLE) | {"precision": name}) for name in ("float32", "fp16", "bf16"))
    # 11 bits instead of 8; but text features are kept in the models' precision, so that there is no other difference.
    assert 0 < distance(fp16, whole) < distance(bf16, whole) / 4


def test_attention_in_float32(device: Device) -> None:
    base = plain(TABLE) | {"precision": "float32"}
    auto, sdpa, flex = (device.draw(base | {"attention": kernel}) for kernel in TABLE["attention"])
    assert differing(sdpa, auto) == []  # one kernel: that for bf16 is no choice here
    assert distance(flex, auto) < 1e-5  # sums in another order


def test_a_merged_lora_draws_what_an_attached_one_draws(device: Device) -> None:
    base = plain(TABLE) | {"precision": "float32"}
    without_lora, attached, merged = (device.draw(base | {"lora": value}) for value in TABLE["lora"])
    assert distance(merged, attached) < 1e-5  # float32 sums in another order
    assert distance(attached, without_lora) > 0.1


@pytest.mark.parametrize(
    "values",
    [{}, {"swap": "3 blocks"}, {"offload": "models"}, {"weights": "fp8", "swap": "all", "offload": "models"}],
    ids=str,
)
def test_a_lora_that_is_attached_for_a_while(device: Device, tmp_path: Path, values: dict[str, str]) -> None:
    """Comparing attaches files one after the other, to blocks that are streamed already."""
    skip_where_the_cpu_cannot(plain(TABLE) | values)
    more = ["--compare_lora_weights", str(device.lora), "--compare_multipliers", "0.7", "0"]
    device.run(tmp_path, plain(TABLE) | values, *more)
    without_lora, attached = device.latents
    assert torch.equal(without_lora, device.draw(plain(TABLE) | values)["latents"])
    assert torch.equal(attached, device.draw(plain(TABLE) | values | {"lora": "attached"})["latents"])


@pytest.mark.parametrize("pair", IMPOSSIBLE, ids=lambda pair: " and ".join(value for _, value in sorted(pair)))
def test_what_cannot_meet_is_refused(device: Device, pair: frozenset[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError, match=IMPOSSIBLE[pair]):
        device.draw(plain(TABLE) | dict(pair))
