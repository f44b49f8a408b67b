"""The functions of transformers that a patched model replaces, wraps or computes by itself, release by release.

What they do may change with any release, so `KNOWN` holds a digest of the source of each in the releases that the tests
pass under. Run as a program, this prints the table with the installed release in it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache

from ..methods import HiPrune
from .call import Patch
from .generate import overrides
from .language import CACHE_METHODS


def functions(patch: Patch, model: nn.Module) -> dict[str, str]:
    """What a patch of `model` relies on: name -> digest of the installed source."""
    return {_name(function): digest(function) for function in _functions(patch, model)}


def unknown(patch: Patch, model: nn.Module) -> list[str]:
    """Names of those `functions` whose installed source none of `RELEASES` has."""
    installed = functions(patch, model)
    return [name for name in installed if installed[name] not in dict(map(str.split, KNOWN.get(name, ())))]


def _functions(patch: Patch, model: nn.Module) -> Iterator[Callable[..., Any]]:
    host, family = patch.host, patch.family
    connector, language_model = family.connector(host), family.language_model(host)
    called = [(module, "forward") for module in (*(encoder.module for encoder in patch.encoders), host, connector)]
    for encoder in patch.encoders:
        for path in ("", encoder.family.attention, *encoder.family.computed):
            yield type(encoder.feature_layer.get_submodule(path)).forward
    if language_model is not None:
        yield from (getattr(Cache, name) for name in CACHE_METHODS)
        yield masking_utils.create_masks_for_generate
        called += [(host, "get_placeholder_mask"), (language_model, "forward"), (model, "forward")]
        called += [(module, function.__name__) for module, function, _ in overrides(model, host, family)]
    for module, name in called:
        function = getattr(type(module), name, None)  # where it must not be missing, installing ours raises
        if function is not None and (_is_stock(type(module)) or _is_stock(function)):  # or else a wrapper's own
            yield function


def _is_stock(thing: type | Callable[..., Any]) -> bool:
    return thing.__module__.partition(".")[0] == "transformers"


def _name(function: Callable[..., Any]) -> str:
    module = function.__module__.rpartition(".")[2].removeprefix("modeling_")
    return f"{module}.{function.__qualname__}"


@functools.cache
def digest(function: Callable[..., Any]) -> str:
    """A short digest of a function's source text; "?" where there is no source to read.

    Of decorators only those count that are somebody else's, laid around the stock function.
    """
    sources = []
    layer: Any = function
    try:
        while layer is not None:
            wrapped = getattr(layer, "__wrapped__", None)
            if wrapped is None or layer.__globals__["__name__"].partition(".")[0] not in ("transformers", "torch"):
                sources.append(inspect.getsource(layer.__code__))
            layer = wrapped
    except (AttributeError, OSError, TypeError):
        return "?"
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:8]


def _release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _table() -> Iterator[str]:
    """The lines of `RELEASES` and `KNOWN`, with the installed release in them."""
    from . import FAMILIES, _prepare, tiny

    version, known = transformers.__version__, {name: dict(map(str.split, KNOWN[name])) for name in KNOWN}
    for variant in itertools.chain.from_iterable(map(tiny.variants, FAMILIES)):
        model, _ = tiny.build(*variant)
        patch = _prepare(model, FAMILIES[model.config.model_type], HiPrune(retention=0.5), None)
        for name, found in functions(patch, model).items():
            first = known.setdefault(name, {}).get(found, version)
            known[name][found] = min(first, version, key=_release)
    yield "RELEASES = ("
    yield from (f'    "{release}",' for release in sorted({*RELEASES, version}, key=_release))
    yield ")"
    yield ""
    yield "# function -> each digest of its source, and the first of the releases that has it"
    yield "KNOWN = {"
    for name in sorted(known):
        entries = [
            f'"{found} {first}"' for found, first in sorted(known[name].items(), key=lambda item: _release(item[1]))
        ]
        row = f'    "{name}": ({", ".join(entries)}{"," * (len(entries) == 1)}),'
        yield from (
            [row] if len(row) <= 120 else [f'    "{name}": (', *(f"        {entry}," for entry in entries), "    ),"]
        )
    yield "}"


RELEASES = (
    "5.16.0",
    "5.16.1",
    "5.17.0",
    "5.18.0",
    "5.19.0",
    "5.20.0",
    "5.20.1",
    "5.20.2",
    "5.21.0",
    "5.21.1",
    "5.22.0",
    "5.22.1",
    "5.22.2",
    "5.23.0",
    "5.24.0",
)

# function -> each digest of its source, and the first of the releases that has it
KNOWN = {
    "cache_utils.Cache.batch_repeat_interleave": ("815eeac5 5.16.0",),
    "cache_utils.Cache.batch_select_indices": ("139d9748 5.16.0",),
    "cache_utils.Cache.get_seq_length": ("71da90bb 5.16.0", "cc9f5b48 5.23.0"),
    "cache_utils.Cache.reorder_cache": ("1539ddde 5.16.0",),
    "clip.CLIPAttention.forward": ("45fb45ce 5.16.0",),
    "clip.CLIPEncoderLayer.forward": ("9c77f9ba 5.16.0", "75b63a9d 5.23.0"),
    "clip.CLIPVisionModel.forward": ("1d64c16b 5.16.0", "e7dfac36 5.18.0", "6b056d10 5.23.0"),
    "deit.DeiTAttention.forward": ("54ffa426 5.16.0",),
    "deit.DeiTLayer.forward": ("33a0d8fe 5.16.0",),
    "deit.DeiTModel.forward": ("212d5a8f 5.16.0",),
    "dinov2.Dinov2Attention.forward": ("5e55886b 5.16.0", "54ffa426 5.18.0"),
    "dinov2.Dinov2Layer.forward": ("d16dd36a 5.16.0", "8bc44649 5.18.0"),
    "dinov2.Dinov2Model.forward": ("5b12ce64 5.16.0", "2ec69b95 5.18.0"),
    "dinov2.Dinov2SelfAttention.forward": ("3b4843d4 5.16.0",),
    "dinov2.Dinov2SelfOutput.forward": ("c70c646c 5.16.0",),
    "dinov2_with_registers.Dinov2WithRegistersAttention.forward": ("5e55886b 5.16.0", "54ffa426 5.18.0"),
    "dinov2_with_registers.Dinov2WithRegistersLayer.forward": ("07ab6acd 5.16.0", "8bc44649 5.18.0"),
    "dinov2_with_registers.Dinov2WithRegistersModel.forward": ("5b12ce64 5.16.0", "2ec69b95 5.18.0"),
    "dinov2_with_registers.Dinov2WithRegistersSelfAttention.forward": ("3b4843d4 5.16.0",),
    "dinov2_with_registers.Dinov2WithRegistersSelfOutput.forward": ("c70c646c 5.16.0",),
    "glm46v.Glm46VForConditionalGeneration._expand_multimodal_outputs": ("6af921ec 5.18.0",),
    "glm46v.Glm46VForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "glm46v.Glm46VForConditionalGeneration.forward": (
        "66887a87 5.16.0",
        "060bc949 5.17.0",
        "d86e9766 5.18.0",
        "27be6954 5.21.0",
        "12e53ca2 5.23.0",
        "cf4d6d3f 5.24.0",
    ),
    "glm46v.Glm46VModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "glm46v.Glm46VModel.forward": ("dc9275fe 5.16.0", "147c8fd4 5.18.0", "df57c981 5.23.0", "7b413df1 5.24.0"),
    "glm46v.Glm46VModel.get_placeholder_mask": ("bd56ad5c 5.16.0", "517e7c45 5.23.0"),
    "glm4v.Glm4vForConditionalGeneration._expand_multimodal_outputs": ("6af921ec 5.18.0",),
    "glm4v.Glm4vForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "glm4v.Glm4vForConditionalGeneration.forward": (
        "8684da51 5.16.0",
        "3a479ba2 5.17.0",
        "aa4e8659 5.18.0",
        "39d033f0 5.21.0",
        "b0db7191 5.23.0",
        "d8efe998 5.24.0",
    ),
    "glm4v.Glm4vModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "glm4v.Glm4vModel.forward": ("a56b3974 5.16.0", "c28ffc4d 5.18.0", "df57c981 5.23.0", "7b413df1 5.24.0"),
    "glm4v.Glm4vModel.get_placeholder_mask": ("bd56ad5c 5.16.0", "517e7c45 5.23.0"),
    "glm4v.Glm4vTextModel.forward": ("09d2f636 5.16.0", "db657310 5.22.0", "a7ee0235 5.23.0", "d4921a7d 5.24.0"),
    "glm4v.Glm4vVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "glm4v.Glm4vVisionBlock.forward": ("681e62f9 5.16.0",),
    "glm4v.Glm4vVisionModel.forward": ("7d8d7160 5.16.0", "7f8c214f 5.17.0"),
    "glm4v.Glm4vVisionPatchMerger.forward": ("a4a51c1f 5.16.0",),
    "glm4v_moe.Glm4vMoeForConditionalGeneration._expand_multimodal_outputs": ("6af921ec 5.18.0",),
    "glm4v_moe.Glm4vMoeForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "glm4v_moe.Glm4vMoeForConditionalGeneration.forward": (
        "bb310c1d 5.16.0",
        "ca127554 5.17.0",
        "522487f6 5.18.0",
        "ce2ced6a 5.21.0",
        "216ebdd9 5.23.0",
        "c22325a3 5.24.0",
    ),
    "glm4v_moe.Glm4vMoeModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "glm4v_moe.Glm4vMoeModel.forward": ("8ed3339a 5.16.0", "0fd7c0a6 5.18.0", "df57c981 5.23.0", "cc3c1291 5.24.0"),
    "glm4v_moe.Glm4vMoeModel.get_placeholder_mask": ("bd56ad5c 5.16.0", "517e7c45 5.23.0"),
    "glm4v_moe.Glm4vMoeTextModel.forward": ("94fbe887 5.16.0", "c2417a67 5.22.0", "a9c5b88f 5.23.0", "5ade3b1d 5.24.0"),
    "glm4v_moe.Glm4vMoeVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "glm4v_moe.Glm4vMoeVisionBlock.forward": ("681e62f9 5.16.0",),
    "glm4v_moe.Glm4vMoeVisionModel.forward": ("7d8d7160 5.16.0", "7f8c214f 5.17.0"),
    "glm4v_moe.Glm4vMoeVisionPatchMerger.forward": ("a4a51c1f 5.16.0",),
    "internvl.InternVLForConditionalGeneration.forward": (
        "9e7b845c 5.16.0",
        "9e95575f 5.18.0",
        "d045d5ae 5.21.0",
        "1c271076 5.23.0",
        "d8657490 5.24.0",
    ),
    "internvl.InternVLModel.forward": ("cb631326 5.16.0", "03e42b62 5.18.0", "e1e13754 5.23.0", "4de379cb 5.24.0"),
    "internvl.InternVLModel.get_placeholder_mask": ("46b9a88f 5.16.0", "3156f8da 5.23.0"),
    "internvl.InternVLMultiModalProjector.forward": ("ca57ed97 5.16.0",),
    "internvl.InternVLVisionAttention.forward": ("5660dd73 5.16.0",),
    "internvl.InternVLVisionLayer.forward": ("669cf6d0 5.16.0", "89b20d4d 5.17.0"),
    "internvl.InternVLVisionModel.forward": ("e741c66f 5.16.0",),
    "llama.LlamaModel.forward": ("700c9dab 5.16.0", "47acaf96 5.23.0", "277f540e 5.24.0"),
    "llava.LlavaForConditionalGeneration.forward": (
        "43abb746 5.16.0",
        "91f5a320 5.18.0",
        "d1dcb20b 5.21.0",
        "637df34c 5.23.0",
        "53acd5c6 5.24.0",
    ),
    "llava.LlavaModel.forward": ("c1fce981 5.16.0", "7d9663ae 5.18.0", "caa9141d 5.23.0", "464dbe6e 5.24.0"),
    "llava.LlavaModel.get_placeholder_mask": ("46b9a88f 5.16.0", "3156f8da 5.23.0"),
    "llava.LlavaMultiModalProjector.forward": ("d2988043 5.16.0",),
    "llava_next.LlavaNextForConditionalGeneration.forward": (
        "cb2fcac3 5.16.0",
        "1f5be180 5.18.0",
        "329a802e 5.21.0",
        "d37ce3c2 5.23.0",
        "9ed09de5 5.24.0",
    ),
    "llava_next.LlavaNextModel.forward": ("4b3bea90 5.16.0", "1c84174a 5.18.0", "bf7f0dc0 5.23.0", "7dc2feed 5.24.0"),
    "llava_next.LlavaNextModel.get_placeholder_mask": ("4778af43 5.16.0", "f8ecd50f 5.23.0"),
    "llava_next.LlavaNextMultiModalProjector.forward": ("d2988043 5.16.0",),
    "llava_onevision.LlavaOnevisionForConditionalGeneration.forward": (
        "73c591d0 5.16.0",
        "b328c02c 5.18.0",
        "9fabfe31 5.21.0",
        "540f9c5f 5.23.0",
        "fe878a70 5.24.0",
    ),
    "llava_onevision.LlavaOnevisionModel.forward": (
        "2c2b8c09 5.16.0",
        "afe82f62 5.18.0",
        "2258860d 5.23.0",
        "1da04c55 5.24.0",
    ),
    "llava_onevision.LlavaOnevisionModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "llava_onevision.LlavaOnevisionMultiModalProjector.forward": ("d2988043 5.16.0",),
    "masking_utils.create_masks_for_generate": ("89a12bcb 5.16.0", "e82179b6 5.24.0"),
    "mistral.MistralModel.forward": ("3ee496d6 5.16.0", "a42aa819 5.23.0", "8a465d4b 5.24.0"),
    "qwen2.Qwen2Model.forward": ("523115d5 5.16.0", "7fb64c79 5.23.0", "c202eeb4 5.24.0"),
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.forward": (
        "33edf248 5.16.0",
        "9205de54 5.18.0",
        "3dcb7b9a 5.21.0",
        "41c19043 5.23.0",
        "bec64571 5.24.0",
    ),
    "qwen2_5_vl.Qwen2_5_VLModel.compute_3d_position_ids": ("0387dbda 5.16.0", "dd86466f 5.24.0"),
    "qwen2_5_vl.Qwen2_5_VLModel.forward": ("3b49141b 5.16.0", "63cc6f33 5.18.0", "f9e0a4ef 5.23.0", "ef5c19d7 5.24.0"),
    "qwen2_5_vl.Qwen2_5_VLModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen2_5_vl.Qwen2_5_VLPatchMerger.forward": ("8f6735fc 5.16.0",),
    "qwen2_5_vl.Qwen2_5_VLTextModel.forward": ("a8660fb5 5.16.0", "93069a08 5.23.0", "a5d0d760 5.24.0"),
    "qwen2_5_vl.Qwen2_5_VLVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen2_5_vl.Qwen2_5_VLVisionBlock.forward": ("681e62f9 5.16.0",),
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel.forward": ("15fb56e4 5.16.0", "76f11f57 5.17.0"),
    "qwen2_vl.PatchMerger.forward": ("8f6735fc 5.16.0",),
    "qwen2_vl.Qwen2VLForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen2_vl.Qwen2VLForConditionalGeneration.forward": (
        "f1c6b787 5.16.0",
        "f3c6e886 5.18.0",
        "3d5154a0 5.21.0",
        "7a919c6d 5.23.0",
        "49cfcd8d 5.24.0",
    ),
    "qwen2_vl.Qwen2VLModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "qwen2_vl.Qwen2VLModel.forward": ("bc5d3b6e 5.16.0", "3d4a9d1d 5.18.0", "e8db3fde 5.23.0", "10ec52df 5.24.0"),
    "qwen2_vl.Qwen2VLModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen2_vl.Qwen2VLTextModel.forward": ("a8660fb5 5.16.0", "93069a08 5.23.0", "a5d0d760 5.24.0"),
    "qwen2_vl.Qwen2VLVisionBlock.forward": ("c68a8532 5.16.0",),
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel.forward": ("8cab89cd 5.16.0", "4e3008c9 5.17.0"),
    "qwen2_vl.VisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen3.Qwen3Model.forward": ("523115d5 5.16.0", "7fb64c79 5.23.0", "c202eeb4 5.24.0"),
    "qwen3_5.Qwen3_5ForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen3_5.Qwen3_5ForConditionalGeneration.forward": (
        "3e1b4aa5 5.16.0",
        "4f04be5c 5.17.0",
        "da47b000 5.18.0",
        "827db1ce 5.21.0",
        "3b8a2ac8 5.23.0",
        "466e3f52 5.24.0",
    ),
    "qwen3_5.Qwen3_5Model.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "qwen3_5.Qwen3_5Model.forward": ("4f962746 5.16.0", "e15bc70b 5.18.0", "e8db3fde 5.23.0", "10ec52df 5.24.0"),
    "qwen3_5.Qwen3_5Model.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen3_5.Qwen3_5TextModel.forward": ("8059c2ff 5.16.0", "42086b76 5.23.0", "20ac3657 5.24.0"),
    "qwen3_5.Qwen3_5VisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen3_5.Qwen3_5VisionBlock.forward": ("681e62f9 5.16.0",),
    "qwen3_5.Qwen3_5VisionModel.forward": ("ce79fb63 5.16.0", "3248428a 5.17.0"),
    "qwen3_5.Qwen3_5VisionPatchMerger.forward": ("b444c427 5.16.0",),
    "qwen3_5_moe.Qwen3_5MoeForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen3_5_moe.Qwen3_5MoeForConditionalGeneration.forward": (
        "194390fd 5.16.0",
        "b84bffe0 5.17.0",
        "792b3dd9 5.18.0",
        "db44a0a1 5.21.0",
        "307e2c34 5.23.0",
        "ac713e42 5.24.0",
    ),
    "qwen3_5_moe.Qwen3_5MoeModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "qwen3_5_moe.Qwen3_5MoeModel.forward": ("03b629c5 5.16.0", "52b383ca 5.18.0", "d5b42797 5.23.0", "5a468941 5.24.0"),
    "qwen3_5_moe.Qwen3_5MoeModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen3_5_moe.Qwen3_5MoeTextModel.forward": ("27f0c97a 5.16.0", "b7c4cb77 5.23.0", "4ecdee6c 5.24.0"),
    "qwen3_5_moe.Qwen3_5MoeVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen3_5_moe.Qwen3_5MoeVisionBlock.forward": ("681e62f9 5.16.0",),
    "qwen3_5_moe.Qwen3_5MoeVisionModel.forward": ("ce79fb63 5.16.0", "3248428a 5.17.0"),
    "qwen3_5_moe.Qwen3_5MoeVisionPatchMerger.forward": ("b444c427 5.16.0",),
    "qwen3_vl.Qwen3VLForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen3_vl.Qwen3VLForConditionalGeneration.forward": (
        "96817fc7 5.16.0",
        "62c3ce5f 5.17.0",
        "5103de0f 5.18.0",
        "d5376d63 5.21.0",
        "bce50e0f 5.23.0",
        "0b31f8c0 5.24.0",
    ),
    "qwen3_vl.Qwen3VLModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "qwen3_vl.Qwen3VLModel.forward": ("6fd4a726 5.16.0", "7e7fc93d 5.18.0", "a28e8497 5.23.0", "eb3202b2 5.24.0"),
    "qwen3_vl.Qwen3VLModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen3_vl.Qwen3VLTextModel.forward": ("315e0886 5.16.0", "caec4a5b 5.23.0", "43960267 5.24.0"),
    "qwen3_vl.Qwen3VLVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen3_vl.Qwen3VLVisionBlock.forward": ("681e62f9 5.16.0",),
    "qwen3_vl.Qwen3VLVisionModel.forward": ("f5e83732 5.16.0", "aaadd4d8 5.17.0"),
    "qwen3_vl.Qwen3VLVisionPatchMerger.forward": ("b444c427 5.16.0",),
    "qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration._prepare_position_ids_for_generation": (
        "44dfcf37 5.16.0",
        "448f86bb 5.23.0",
        "fe7ec50e 5.24.0",
    ),
    "qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration.forward": (
        "76974658 5.16.0",
        "091e0e9a 5.17.0",
        "2a8edc03 5.18.0",
        "3ec01872 5.21.0",
        "373c6388 5.23.0",
        "79686304 5.24.0",
    ),
    "qwen3_vl_moe.Qwen3VLMoeModel.compute_3d_position_ids": ("d2be51b9 5.16.0", "d0dd89f7 5.24.0"),
    "qwen3_vl_moe.Qwen3VLMoeModel.forward": (
        "8499c960 5.16.0",
        "1246bb7f 5.18.0",
        "a28e8497 5.23.0",
        "4ea6f44b 5.24.0",
    ),
    "qwen3_vl_moe.Qwen3VLMoeModel.get_placeholder_mask": ("ff906bcc 5.16.0", "5426a468 5.23.0"),
    "qwen3_vl_moe.Qwen3VLMoeTextModel.forward": ("acdd43d4 5.16.0", "79f37400 5.23.0", "d5028b3b 5.24.0"),
    "qwen3_vl_moe.Qwen3VLMoeVisionAttention.forward": ("2afc2f9f 5.16.0",),
    "qwen3_vl_moe.Qwen3VLMoeVisionBlock.forward": ("681e62f9 5.16.0",),
    "qwen3_vl_moe.Qwen3VLMoeVisionModel.forward": ("f5e83732 5.16.0", "aaadd4d8 5.17.0"),
    "qwen3_vl_moe.Qwen3VLMoeVisionPatchMerger.forward": ("b444c427 5.16.0",),
    "siglip.SiglipAttention.forward": ("66b32085 5.16.0",),
    "siglip.SiglipEncoderLayer.forward": ("22f28409 5.16.0", "e2aec042 5.23.0"),
    "siglip.SiglipVisionModel.forward": ("5baf4a6a 5.16.0", "d423b654 5.18.0"),
    "utils.GenerationMixin._expand_multimodal_outputs": ("6e8c12ce 5.18.0", "c2c61170 5.19.0"),
    "utils.GenerationMixin._maybe_prepare_encoder_kwargs_for_generation": ("d2c76c93 5.18.0",),
    "utils.GenerationMixin._prefill": (
        "0c39aba9 5.16.0",
        "04a3c818 5.18.0",
        "3dc999d5 5.19.0",
        "e5a4b1e4 5.21.0",
        "4c6ef98b 5.23.0",
        "eccd3631 5.24.0",
    ),
    "utils.GenerationMixin.prepare_inputs_for_generation": (
        "1956c194 5.16.0",
        "45c20cf1 5.18.0",
        "a8339e86 5.20.0",
        "fd5e907d 5.23.0",
        "018a76f4 5.24.0",
    ),
    "video_llava.VideoLlavaForConditionalGeneration.forward": (
        "9aa25a53 5.16.0",
        "66f20df0 5.18.0",
        "3af77ac2 5.21.0",
        "c1c2a4cd 5.23.0",
        "fd02f4cc 5.24.0",
    ),
    "video_llava.VideoLlavaModel.forward": (
        "17a71ff7 5.16.0",
        "9d11e28e 5.18.0",
        "50cf9676 5.21.0",
        "bccaf64e 5.23.0",
        "ff619688 5.24.0",
    ),
    "video_llava.VideoLlavaModel.get_placeholder_mask": ("99211891 5.16.0", "47cd37af 5.23.0"),
    "video_llava.VideoLlavaMultiModalProjector.forward": ("d2988043 5.16.0",),
    "vit.ViTAttention.forward": ("54ffa426 5.16.0",),
    "vit.ViTLayer.forward": ("33a0d8fe 5.16.0",),
    "vit.ViTModel.forward": ("212d5a8f 5.16.0",),
    "vjepa2.VJEPA2Layer.forward": ("d19a8e5f 5.16.0",),
    "vjepa2.VJEPA2Model.forward": ("9c76034c 5.16.0",),
    "vjepa2.VJEPA2RopeAttention.forward": ("ea82d862 5.16.0",),
}

if __name__ == "__main__":
    print(*_table(), sep="\n")
