"""Whether an answer may be a text, asked of the real library byte by byte."""

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import Grammar
from tests.fakes import EOS


def accepts(constraints: Constraints, grammar: Grammar, text: str) -> bool:
    """Whether an answer may be this and end here. For the bytes of `byte_tokenizer`."""
    constraint = constraints.get(grammar).copy()
    for byte in text.encode():
        if constraint.complete or not constraint.allows(byte):
            return False
        constraint.advance(byte)
    return constraint.complete or constraint.allows(EOS)
