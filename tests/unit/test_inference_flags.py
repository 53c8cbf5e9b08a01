"""Limits of the inference program's flags, the same as those of prompt lines, and of the device's memory."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import DrawingError, SettingsError
from library.inference.interactive import interact
from library.inference.loras import LoraFiles
from library.inference.models import DrawingModels, _device
from library.inference.settings import PictureFlags, split_lora
from library.lumina.prompt_template import PromptTemplate
from library.memory.settings import QuantisationSettings
from library.prompts import PromptError, parse_line


@pytest.mark.parametrize(
    ("name", "option", "most"), [("image_width", "w", 16384), ("image_height", "h", 16384), ("steps", "s", 1000)]
)
def test_sizes_and_steps_beyond_reach_end_at_once(name: str, option: str, most: int) -> None:
    assert getattr(PictureFlags(**{name: most}), name) == most  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=f"--{name}: 5000000 is too much; give {most} at most"):
        PictureFlags(**{name: 5_000_000})  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=f"--{option}"):
        parse_line(f"a --{option} {most + 1}", PictureFlags().to_prompt(), "prompt")


def test_home_folders_of_lora_files() -> None:
    assert split_lora("~/a.safetensors;0.5") == (Path.home() / "a.safetensors", 0.5)
    for multiplier in ("", ";0.5"):
        with pytest.raises(SettingsError, match="--lora_weights: '~no_such_user_here"):
            split_lora(f"~no_such_user_here/a.safetensors{multiplier}")


@pytest.mark.parametrize("text", ["", ";", ";0.5"])
def test_a_lora_without_a_file_is_told(text: str) -> None:
    """As where a script's variable is empty."""
    with pytest.raises(SettingsError, match=f"--lora_weights: '{text}' names no file; write path or path;0.8"):
        split_lora(text)


def test_a_lora_without_a_multiplier_has_one() -> None:
    assert split_lora("a.safetensors") == split_lora("a.safetensors;") == (Path("a.safetensors"), 1.0)


def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: torch.zeros(1))  # as if there were two
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert _device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "'gpu' is no name of a device; give one such as cuda"),
        ("", "'' is no name of a device"),
        ("cuda:-1", "'cuda:-1' is no name of a device"),
        (
            "meta",
            r"'meta' cannot be used here \(Tensor.item\(\) cannot be called on meta tensors\); leave the flag out",
        ),
        ("mkldnn", "'mkldnn' cannot be used here"),
        ("privateuseone", "'privateuseone' cannot be used here"),
        (
            "xla",
            r"'xla' cannot be used here \([^.]*aten::[^.]*\.memory_format' with arguments from the 'XLA' backend\);",
        ),
    ],
)
def test_a_device_that_does_not_compute_is_named(name: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^--device: {says}"):
        _device(name)
    assert _device("cpu") == torch.device("cpu")


def test_merging_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    files: Any = None  # nothing is read
    assert LoraFiles((), merged=True, read=lambda *_: None).check(files) == (None, None)
    assert "--merge_lora_weights: no effect without --lora_weights" in caplog.text
    caplog.clear()
    LoraFiles((), merged=False, read=lambda *_: None).check(files)
    assert not caplog.text


def loras_trained_with(tmp_path: Path, *system_prompts: str | None) -> LoraFiles:
    """Returns LoRA files whose metadata hold these system prompts (None: nothing of it)."""
    loras = LoraFiles((), merged=False, read=lambda *_: None)
    for number, system_prompt in enumerate(system_prompts):
        path = tmp_path / f"my{number}.safetensors"
        metadata = {} if system_prompt is None else {"ss_system_prompt": system_prompt}
        save_file({"a": torch.zeros(1)}, path, {"ss_network_dim": "4", **metadata})
        loras._remember(path)
    return loras


@pytest.mark.parametrize(
    ("trained_with", "text", "says"),
    [
        ("Draw.", "Draw. <Prompt Start> a cat", None),  # by --system_prompt, or inside --prompt
        ("Draw. <Prompt Start>", "Draw. <Prompt Start> a cat", None),
        (" Draw.\n", PromptTemplate(" Draw.\n").text("a cat"), None),
        ("Draw.", "", None),  # as dropped captions
        ("Draw.", "a cat", 'was trained with the system prompt "Draw."; draw with the same: --system_prompt "Draw."'),
        ("Draw.", "Paint. <Prompt Start> a cat", 'was trained with the system prompt "Draw."'),
        ("", "a cat", None),
        ("", "Paint. <Prompt Start> a cat", 'without a system prompt, and "Paint." is put before the prompt'),
        (None, "Paint. <Prompt Start> a cat", None),  # other programs do not say it
        ("None", "Paint. <Prompt Start> a cat", None),
    ],
)
def test_another_system_prompt_than_in_training_is_told_once(
    trained_with: str | None, text: str, says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loras = loras_trained_with(tmp_path, trained_with)
    for _ in range(2):
        loras.tell_system_prompts(text)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == (0 if says is None else 1)
    assert says is None or says in messages[0]


def test_files_of_one_run_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loras = loras_trained_with(tmp_path, "Draw.", "Draw.", "Paint.")
    caplog.clear()
    loras.tell_system_prompts("Draw. <Prompt Start> a cat")
    assert len(caplog.records) == 1
    loras.tell_system_prompts("a cat")
    loras.tell_system_prompts("a dog")
    assert len(caplog.records) == 2
    assert "my0" in caplog.text


@pytest.mark.parametrize(
    ("device", "flags", "names"),
    [
        ("cuda", {}, ["--offload", "--blocks_to_swap", "--fp8_base"]),
        ("cuda", {"offload": True, "blocks_to_swap": 26, "dtype": "fp32"}, ["--fp8_base", "--dtype bf16"]),
        ("mps", {"nf4_base": True}, ["--offload"]),
        ("cpu", {"nf4_base": True}, []),
    ],
)
def test_too_little_memory_names_what_helps(device: str, flags: dict, names: list[str]) -> None:
    values = {"offload": False, "blocks_to_swap": None, "dtype": "bf16", **flags}
    quantisation = QuantisationSettings(nf4_base=flags.get("nf4_base", False))
    models: Any = SimpleNamespace(_flags=SimpleNamespace(**values), _quantisation=quantisation)
    models.device, models._remedies = torch.device(device), lambda: DrawingModels._remedies(models)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")):
        with (
            pytest.raises(
                DrawingError, match=f"^the memory of {device} is too small for a picture of 64x96; "
            ) as caught,
            DrawingModels.enough_memory(models, "a picture of 64x96", "a smaller one needs less"),
        ):
            raise error
        assert re.findall(r"--\w+(?: bf16)?", str(caught.value)) == names
        assert str(caught.value).endswith("a smaller one needs less")
    with pytest.raises(RuntimeError, match="a defect"), DrawingModels.enough_memory(models, "x"):
        raise RuntimeError("a defect")


@pytest.mark.parametrize("offload", [True, False])
def test_a_model_leaves_the_device_also_where_it_fails_there(offload: bool) -> None:
    """Or the next prompt that is typed would find the Next-DiT beside Gemma2, and no memory for both."""
    moves: list[str] = []
    models: Any = SimpleNamespace(
        _offload=offload,
        _move=lambda model, device: moves.append(device.type),
        _stream=SimpleNamespace(free=lambda: moves.append("ring freed")),
        _free=lambda: moves.append("freed"),
        dit=torch.nn.Identity(),
        device=torch.device("cuda"),
    )
    with pytest.raises(torch.OutOfMemoryError), DrawingModels.on_device(models, models.dit):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert moves == (["cuda", "cpu", "ring freed", "freed"] if offload else [])


def test_an_error_without_words_does_not_end_the_interactive_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(prompt: object) -> None:
        raise RuntimeError

    lines = iter(["a disc", "exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    painter: Any = SimpleNamespace(draw=draw)
    interact(painter, PictureFlags().to_prompt())
    assert "This prompt could not be drawn: RuntimeError" in caplog.text
