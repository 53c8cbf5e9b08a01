"""A compiler is tried before a model is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from library.errors import SettingsError
from library.memory.compilation import check_backend


def test_it_is_tried_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU needs triton and no C++ compiler, a CPU the other way round."""

    def compile_for_meta_alone(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "meta":
                raise RuntimeError(f"no compiler for {x.device}")
            return function(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_for_meta_alone)
    check_backend("inductor", torch.device("meta"))
    with pytest.raises(SettingsError, match="no compiler for cpu"):
        check_backend("inductor", torch.device("cpu"))
