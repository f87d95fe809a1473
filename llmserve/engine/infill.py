"""How the families of models are asked for what stands between two texts. Knows no model: control tokens' texts in, segments out."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from llmserve.engine.chat_template import Control, Segment, Text


class InfillFormat(NamedTuple):
    """The control tokens before the prefix, the suffix and, if there is one, the answer. `suffix_first`: it comes before the prefix."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False


FORMATS = (
    InfillFormat("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    InfillFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    InfillFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    InfillFormat("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    InfillFormat("[PREFIX]", "[SUFFIX]", suffix_first=True),  # Codestral
)

TEXTS = frozenset(text for form in FORMATS for text in (form.prefix, form.suffix, form.middle) if text)


def render(prefix: str, suffix: str, control_texts: Collection[str]) -> tuple[Segment, ...] | None:
    """The prompt by which a model with these control tokens fills the gap; None if it has none for that."""
    for form in FORMATS:
        if form.prefix in control_texts and form.suffix in control_texts and (not form.middle or form.middle in control_texts):
            before, behind = (Control(form.prefix), Text(prefix)), (Control(form.suffix), Text(suffix))
            shown = (*behind, *before) if form.suffix_first else (*before, *behind)
            return (*shown, Control(form.middle)) if form.middle else shown
    return None
