"""lm-eval's `local-completions`, with tasks of our own: its numbers are those of the model's own scores."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.harness import MODEL, post

TOLERANCE = 1e-6  # nats
DATA = {
    "capitals": [
        {"question": "The capital of France is", "choices": ["Paris", "Oslo", "Lima"], "answer": 0},
        {"question": "The capital of Norway is", "choices": ["Paris", "Oslo", "Lima"], "answer": 1},
        {"question": "The opposite of hot is", "choices": ["cold", "a hot summer's day", "naïve"], "answer": 0},
        {"question": "Two and two is", "choices": ["4", "12", "five"], "answer": 0},
    ],
    "texts": [
        {"text": "The river rises in the hills behind the town, and runs to the sea."},
        {"text": "Das Wetter in Zürich ist schön; in Oslo schneit es.\nIt is cold there."},
    ],
    "stories": [{"text": "Once upon a time, a river"}, {"text": "The first snow"}],
}
TASKS = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "stories": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 24, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


class Evaluation(NamedTuple):
    results: dict
    samples: dict


@pytest.fixture(scope="module")
def folder(beside, tmp_path_factory):
    """The tasks with their documents; and the model's tokenizer, which lm-eval would take from the model's page."""
    folder = tmp_path_factory.mktemp("lm_eval")
    beside("tokenizer", folder)
    for name, settings in TASKS.items():
        documents = folder / f"{name}.jsonl"
        documents.write_text("".join(json.dumps(document) + "\n" for document in DATA[name]))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **settings}))
    return folder


@pytest.fixture(scope="module")
def evaluation(documented, folder, tmp_path_factory):
    """What lm-eval says of all tasks."""
    output = tmp_path_factory.mktemp("results")
    program, *arguments = shlex.split(documented("lm-eval").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder)))
    command = [Path(sys.executable).with_name(program), *arguments, "--tasks", ",".join(TASKS), "--include_path", folder]
    environ = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, "--output_path", output, "--log_samples"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (results,) = output.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return Evaluation(json.loads(results.read_text())["results"], samples)


@pytest.fixture(scope="module")
def tokenize(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def scores(beside, engine):
    """The library's own: of each token but the first."""
    return lambda texts: json.loads(beside("scores", engine, text=json.dumps(texts)))


def test_the_likelihood_of_each_choice_is_the_models(evaluation, tokenize, scores):
    pairs, theirs = [], []
    for sample in evaluation.samples["capitals"]:
        for arguments, ((number, _),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            pairs.append((arguments["arg_0"], arguments["arg_1"]))
            theirs.append(float(number))
    token_ids = [tokenize(context + continuation) for context, continuation in pairs]
    lengths = [len(tokenize(context)) for context, _ in pairs]
    ours = [sum(each[length - 1 :]) for each, length in zip(scores(token_ids), lengths, strict=True)]
    print(f"{len(ours)} likelihoods; largest difference {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e} nats")
    assert len(ours) == 12
    assert theirs == pytest.approx(ours, abs=TOLERANCE, rel=0)


def test_the_likelihood_of_whole_texts_is_the_models(evaluation, tokenize, scores):
    samples = evaluation.samples["texts"]
    theirs = [float(number) for sample in samples for (number,) in sample["resps"]]
    texts = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
    (start,) = tokenize("<|im_start|>")
    ours = list(map(sum, scores([[start, *tokenize(text)] for text in texts])))
    print(f"{len(ours)} texts; largest difference {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e} nats")
    assert theirs == pytest.approx(ours, abs=TOLERANCE, rel=0)


def test_the_model_knows_its_capitals(evaluation):
    assert evaluation.results["capitals"]["acc,none"] >= 0.75


def test_generations_end_at_a_full_stop(evaluation):
    texts = [text for sample in evaluation.samples["stories"] for (text,) in sample["resps"]]
    assert all(text.strip() and "." not in text for text in texts)


def test_the_server_tokenizes_as_the_models_own_tokenizer(server, tokenize):
    for document in DATA["texts"]:
        status, answer = post(server.port, "/tokenize", {"model": MODEL, "prompt": document["text"]})
        assert (status, answer["tokens"]) == (200, tokenize(document["text"]))
