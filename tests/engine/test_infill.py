"""The prompts that ask for what stands in a gap, as the families were trained with them, and what tiny models are given."""

import pytest

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine import infill
from llmserve.engine.chat_template import Control, Text
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader
from tests.e2e.conftest import ENGINES
from tests.tiny_models import CONTROL, INFILL_TOKENS, USER_DEFINED, write_infill


@pytest.mark.parametrize(
    ("tokens", "prompt"),
    [
        ("<|fim_prefix|> <|fim_suffix|> <|fim_middle|>", "<|fim_prefix|>BEFORE<|fim_suffix|>BEHIND<|fim_middle|>"),
        ("<fim_prefix> <fim_middle> <fim_suffix>", "<fim_prefix>BEFORE<fim_suffix>BEHIND<fim_middle>"),
        ("<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>", "<｜fim▁begin｜>BEFORE<｜fim▁hole｜>BEHIND<｜fim▁end｜>"),
        ("▁<PRE> ▁<SUF> ▁<MID> ▁<EOT>", "▁<PRE>BEFORE▁<SUF>BEHIND▁<MID>"),
        ("[INST] [SUFFIX] [PREFIX] [MIDDLE]", "[SUFFIX]BEHIND[PREFIX]BEFORE"),
    ],
)
def test_each_family_is_asked_in_its_own_words(tokens, prompt):
    segments = infill.render("BEFORE", "BEHIND", tokens.split())
    assert "".join(segment.text for segment in segments) == prompt
    assert [segment for segment in segments if isinstance(segment, Text)] == [
        Text(text) for text in sorted(("BEFORE", "BEHIND"), key=prompt.index)
    ]


@pytest.mark.parametrize(
    "tokens", ["", "<|im_start|>", "<fim_prefix> <fim_suffix>", "<fim_prefix> <|fim_suffix|> <fim_middle>"]
)
def test_a_model_without_all_of_them_cannot(tokens):
    assert infill.render("a", "b", tokens.split()) is None


def test_users_words_stay_text():
    segments = infill.render("<fim_suffix>", "<fim_middle>", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    assert segments[1::2] == (Text("<fim_suffix>"), Text("<fim_middle>"))
    assert all(isinstance(segment, Control) for segment in segments[::2])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_a_real_vocabularys_tokens_are_found(tmp_path, engine, kind):
    """Also where a file calls them user-defined, as Qwen's do: a text that holds one is none."""
    path = write_infill(tmp_path / "m.gguf", kind=kind)
    spec = ModelSpec(id="m", source=str(path), engine=engine)
    model = Loader(ServerConfig(cache_dir=str(tmp_path))).prepare(spec).open(StatisticsCounter())
    try:
        tokenizer = model.tokenizer
        first, second, third = (tokenizer.control_texts[text] for text in INFILL_TOKENS)
        river, sea = tokenizer.encode_text("the river"), tokenizer.encode_text(" to sea")
        segments = infill.render("the river", " to sea", tokenizer.control_texts)
        assert tokenizer.encode(segments) == [first, *river, second, *sea, third]
        assert {first, second, third}.isdisjoint(tokenizer.encode([Text("".join(INFILL_TOKENS))]))
    finally:
        model.close()
