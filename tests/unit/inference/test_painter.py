"""Which texts are encoded, with which multipliers in place."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.inference.loras import LoraFiles
from library.inference.painter import Painter
from library.inference.settings import PictureFlags
from library.prompts import Prompt, PromptError


class Encoding:
    """Stands in for the models, and notes what is encoded."""

    def __init__(self) -> None:
        self.seen: list[Sequence[str]] = []
        template = SimpleNamespace(text=str)
        self.encoder = SimpleNamespace(tokenizer=SimpleNamespace(count=len), template=template)

    @contextlib.contextmanager
    def enough_memory(self, what: str, remedy: str) -> Any:
        yield

    def encode(self, prompts: Sequence[str], negatives: Sequence[str], template: Any) -> Any:
        self.seen.append(prompts)
        return [f"{text} {len(self.seen)}" for text in prompts], negatives


@pytest.mark.parametrize("reaching_text", [False, True])
def test_texts_are_encoded_again_only_where_a_lora_changes_them(tmp_path: Path, reaching_text: bool) -> None:
    def read(path: Path, multiplier: float, *_: Any) -> Any:
        network = SimpleNamespace(multiplier=multiplier, text_encoder_loras=["one"] * reaching_text)
        network.set_multiplier = lambda value: setattr(network, "multiplier", value)
        network.apply_to = lambda *_: None
        network.to = lambda _: SimpleNamespace(eval=lambda: network)
        return network

    loras, models = LoraFiles(["a.safetensors;0.7"], False, read), Encoding()
    anything: Any = None
    loras.attach(anything, anything, anything)
    stands_in: Any = models
    painter = Painter(stands_in, loras, PictureFlags())
    features = painter.encode([Prompt("a"), Prompt("b", multipliers=(0.5,)), Prompt("a", multipliers=(0.5,))])
    assert models.seen == ([["a"], ["b", "a"]] if reaching_text else [["a", "b"]])
    assert features[(0.5,), "a", False] == ("a 2" if reaching_text else "a 1")
    assert features.keys() >= {((), "a", False), ((), "", True), ((0.5,), "b", False), ((0.5,), "", True)}


def test_multipliers_that_cannot_be_had() -> None:
    read: Any = None
    with pytest.raises(PromptError, match="2 multipliers; the number of LoRAs is 1"):
        LoraFiles(["a.safetensors"], False, read).check_multipliers((1.0, 2.0))
    with pytest.raises(PromptError, match="no effect on merged LoRAs"):
        LoraFiles(["a.safetensors"], True, read).check_multipliers((1.0,))
    LoraFiles(["a.safetensors"], True, read).check_multipliers(())
