"""Nested dicts and lists of tensors and plain values <-> a dict of tensors and a value that JSON can hold.

Optimizers, schedulers and averages keep what they remember in such structures. JSON alone would turn tuples into lists,
number keys into texts, and could not hold infinity; these are marked, so that what is read back equals what was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MARK = "$"
_TENSOR, _TUPLE, _DICT, _NUMBER = "$tensor", "$tuple", "$dict", "$number"


class CannotBeKept(TypeError):
    """A value is of a kind that a file cannot hold; the message says where it stands."""


def flatten(value: Any, name: str) -> tuple[dict[str, Tensor], Any]:
    """Returns the tensors of a nested value by name, and the value in JSON's terms with names where tensors were.

    Tensors are not copied.

    Args:
        value: dicts, lists and tuples of tensors, numbers, texts, booleans and None.
        name: begin of all the tensors' names.

    Raises:
        CannotBeKept: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _to_json(value, name, tensors)


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        unique, number = name, 1
        while unique in tensors:  # keys 1 and "1" of one dict would give the same name
            number += 1
            unique = f"{name}#{number}"
        tensors[unique] = value
        return {_TENSOR: unique}
    if isinstance(value, Mapping):
        return _dict_to_json(value, name, tensors)
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]}
    if isinstance(value, list):
        return [_to_json(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
    return _plain_to_json(value, name)


def _dict_to_json(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    pairs = [(_plain_to_json(key, name), _to_json(one, f"{name}.{key}", tensors)) for key, one in value.items()]
    if all(isinstance(key, str) and not key.startswith(_MARK) for key, _ in pairs):
        return dict(pairs)
    return {_DICT: [[key, one] for key, one in pairs]}


def _plain_to_json(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy's
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_NUMBER: repr(float(value))}
    raise CannotBeKept(f"{name} is a {type(value).__name__}, which cannot be written to a file")


def unflatten(json_value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the value that :func:`flatten` was given.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(json_value, list):
        return [unflatten(one, tensors) for one in json_value]
    if not isinstance(json_value, dict):
        return json_value
    if len(json_value) == 1:
        ((mark, content),) = json_value.items()
        if mark == _TENSOR:
            return tensors[content]
        if mark == _TUPLE:
            return tuple(unflatten(one, tensors) for one in content)
        if mark == _NUMBER:
            return float(content)
        if mark == _DICT:
            return {_key(key): unflatten(one, tensors) for key, one in content}
    return {key: unflatten(one, tensors) for key, one in json_value.items()}


def _key(key: Any) -> Any:
    return float(key[_NUMBER]) if isinstance(key, dict) else key


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors on the CPU, each with memory of its own: a file's format takes no two names for one memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.numel() * plain.element_size() or storage.data_ptr() in seen:
            plain = plain.clone(memory_format=torch.contiguous_format)
            storage = plain.untyped_storage()
        seen.add(storage.data_ptr())
        result[name] = plain
    return result
