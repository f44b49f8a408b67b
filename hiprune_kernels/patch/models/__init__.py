"""The models that can be patched: one `ModelFamily` each, in `FAMILIES`, a file a family."""

from __future__ import annotations

from . import bare, glm4v, internvl, llava, llava_next, llava_onevision, qwen_vl, video_llava
from .family import ModelFamily

__all__ = ["FAMILIES", "ModelFamily"]

FAMILIES = {  # config.model_type -> family
    **llava.FAMILIES,
    **llava_next.FAMILIES,
    **llava_onevision.FAMILIES,
    **video_llava.FAMILIES,
    **qwen_vl.FAMILIES,
    **glm4v.FAMILIES,
    **internvl.FAMILIES,
    **bare.FAMILIES,
}
