"""The text of a PNG file, read back as the AUTOMATIC1111 web interface reads it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from library.picture_text import DrawnWith, LoraInUse, name_of_model, picture_text, save_png
from library.prompts import Prompt

HOW = DrawnWith(
    "lumina_2_model_bf16",
    6.0,
    "You are an assistant, a good one.",
    (LoraInUse("my-000002", 0.8), LoraInUse("other", 1.0, "0123456789abcdef")),
)


def read(text: str) -> dict[str, str]:
    """Returns the parts of a text by the rules of that program's ``parse_generation_parameters``."""
    entry = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(entry.findall(last)) < 3:
        lines.append(last)
        last = ""
    found = {"Prompt": "", "Negative prompt": ""}
    part = "Prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line[16:].strip()
        found[part] += ("\n" if found[part] else "") + line
    return found | {name: json.loads(value) if value[:1] == '"' else value for name, value in entry.findall(last)}


def test_all_entries() -> None:
    prompt = Prompt("a zorp", "blurry, dark", 768, 1024, None, 20, 4.5, 0.25, 0)
    text = picture_text(prompt, 7, HOW)
    assert text.splitlines()[0] == "a zorp"
    assert text.splitlines()[1] == "Negative prompt: blurry, dark"
    assert text.splitlines()[2].startswith(
        "Steps: 20, Sampler: Euler, CFG scale: 4.5, Seed: 7, Size: 768x1024, Model: "
    )
    assert read(text) == {
        "Prompt": "a zorp",
        "Negative prompt": "blurry, dark",
        "Steps": "20",
        "Sampler": "Euler",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "768x1024",
        "Model": "lumina_2_model_bf16",
        "Lora": "my-000002: 0.8, other: 1",
        "Lora hashes": "other: 0123456789ab",
        "Shift": "6",
        "CFG truncation": "0.25",
        "CFG renormalization": "0",
        "System prompt": "You are an assistant, a good one.",
    }


@pytest.mark.parametrize(
    "text",
    ["", "a, b: c", "two\nlines", 'with "quotes" and \\', "Steps: 3, Seed: 4, Size: 5x5", "花と猫", "fünf"],
)
def test_texts_come_back_as_they_were(text: str) -> None:
    found = read(picture_text(Prompt(text, text), 1, DrawnWith("m", 6.0, text, (LoraInUse(text or "x", 1.0),))))
    assert (found["Prompt"], found["Negative prompt"]) == (text, text)
    assert found.get("System prompt", "") == text
    assert found["Lora"] == f"{text or 'x'}: 1"
    assert found["Seed"] == "1"


def test_a_prompt_does_not_begin_another_part() -> None:
    found = read(picture_text(Prompt("a\n Negative prompt: b\r\nSteps: 1, Seed: 2, Size: 3x3"), 9, HOW))
    assert found["Prompt"] == "a Negative prompt: b Steps: 1, Seed: 2, Size: 3x3"
    assert (found["Negative prompt"], found["Seed"]) == ("", "9")


@pytest.mark.parametrize("prompt", ["a zorp", "fünf", "花", "a \udcff b"])
def test_the_file_holds_text_and_the_very_pixels(tmp_path: Path, prompt: str) -> None:
    """The last one is what a command line gives that is no valid UTF-8."""
    picture = Image.effect_noise((32, 48), 80).convert("RGB")
    save_png(tmp_path / "a.png", picture, picture_text(Prompt(prompt), 1, HOW))
    save_png(tmp_path / "b.png", picture, picture_text(Prompt(prompt), 1, HOW))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as found:
        assert found.text["parameters"].splitlines()[0] == prompt.replace("\udcff", "?")
        assert list(found.text) == ["parameters"]
        assert found.tobytes() == picture.tobytes()


def test_models_are_named_without_their_folders(tmp_path: Path) -> None:
    (tmp_path / "Lumina-Image-2.0").mkdir()
    assert name_of_model(tmp_path / "Lumina-Image-2.0") == "Lumina-Image-2.0"
    assert name_of_model(tmp_path / "secret" / "lumina.v2.safetensors") == "lumina.v2"
    assert name_of_model(None) == ""
