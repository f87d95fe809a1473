"""What the tests need of the server's own environment, told on standard output: `python -m tests.programs.beside WHAT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.config import DEFAULT_MODEL, load
from llmserve.engine import matmul
from llmserve.engine.backend import Logits, Piece
from llmserve.models.loading import Loader, has_llamacpp


def engines() -> None:
    print("ctransformers", "llamacpp" if has_llamacpp() else "")


def tiny(path: str) -> None:
    """Write a tiny model."""
    from tests.tiny_models import write_llama_spm

    write_llama_spm(Path(path))


def tokenizer(folder: str) -> None:
    """Write the default model's tokenizer as its authors publish it, made of the model file's own keys."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    metadata = _model("ctransformers").header.metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens([AddedToken(token) for token, kind in zip(tokens, types, strict=True) if kind == 3])
    made.save(str(Path(folder) / "tokenizer.json"))
    ends = {f"{name}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **ends}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))


def scores(engine: str) -> None:
    """The log-probability of each token but the first, given those before it, of the lists of token ids on standard input."""
    logits = _ctransformers_logits if engine == "ctransformers" else _llamacpp_logits
    texts = json.load(sys.stdin)
    answers = [
        [_log_probability(row, token_id) for row, token_id in zip(rows, token_ids[1:], strict=False)]
        for token_ids, rows in zip(texts, logits(texts), strict=True)
    ]
    print(json.dumps(answers))


def _ctransformers_logits(texts: list[list[int]]) -> Iterator[list[Logits]]:
    from llmserve.engine.ctransformers_backend import CTransformersBackend

    backend = CTransformersBackend(_model("ctransformers").path, 512)
    for token_ids in texts:
        rows = []
        for position, token_id in enumerate(token_ids):
            backend.forward([token_id], position, 1)
            rows.append(backend.logits().copy())
        yield rows


def _llamacpp_logits(texts: list[list[int]]) -> Iterator[list[Logits]]:
    from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

    model = _model("llamacpp")
    backend = LlamaCppBackend(model.path, 512, 1, 512, LlamaCppSettings(repack=model.repack))
    for token_ids in texts:
        backend.truncate(0, 0)
        backend.forward([Piece(0, 0, token_ids, True, True)], 1)
        yield [backend.logits(0, index).copy() for index in range(len(token_ids))]


def _model(engine: str) -> Any:
    matmul.process.claim()  # as a server's
    return Loader(load().server).prepare(replace(DEFAULT_MODEL, engine=engine)).model


def _log_probability(logits: Logits, token_id: int) -> float:
    wide = logits.astype(np.float64)
    return float(wide[token_id] - np.logaddexp.reduce(wide))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {"engines": engines, "tiny": tiny, "tokenizer": tokenizer, "scores": scores}[what](*arguments)
