# Everything happens in a virtual environment, made on first use; running a target again is quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed
PROGRAMS := .venv-programs
# Processors with AMX: GCC 12 drops stores that it needs (its bug 114098), and the library crashes; and it has attention only for heads
# whose length is a multiple of 128 where arithmetic is in 16 bits (AVX512-FP16): others are computed number by number.
LLAMACPP_FLAGS := -fno-dse -U__AVX512FP16__
LLAMACPP_BUILD := $(if $(findstring Linux,$(shell uname)),CFLAGS="$(LLAMACPP_FLAGS)" CXXFLAGS="$(LLAMACPP_FLAGS)")

.PHONY: run test fast faults programs llamacpp lint cover bench bench-peers clean

run: $(MARK)                ## the server, with the default model, on 127.0.0.1:8080
	$(BIN)/llmserve pull
	exec $(BIN)/llmserve serve

test: $(MARK)-test          ## every test, with the real model and real clients
	$(BIN)/pytest -m "not faults and not programs"

fast: $(MARK)-test          ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

faults: $(MARK)-test        ## what the server survives, and a table of it in FAULTS.md
	FAULTS_REPORT=FAULTS.md $(BIN)/pytest -m faults tests/faults

programs: $(MARK)-test $(PROGRAMS)/.installed  ## other people's programs against the server, and a fuzzer
	SERVER_PYTHON=$(abspath $(BIN)/python) $(PROGRAMS)/bin/python -m pytest -W ignore -m programs tests/programs

llamacpp: $(MARK)           ## the other engine; pip compiles it, which takes some minutes the first time
	$(LLAMACPP_BUILD) $(BIN)/pip install --disable-pip-version-check -e ".[llamacpp]"

lint: $(MARK)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cover: $(MARK)-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not faults and not programs" --ignore tests/e2e
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

bench: $(MARK)-test         ## every figure the README claims, as ratios within one run
	$(BIN)/python -m benchmarks

bench-peers: $(MARK)-bench  ## llmserve beside llama-server and llama-cpp-python's server: a table and pictures
	$(BIN)/python -m benchmarks.peers

clean:
	rm -rf $(VENV) $(PROGRAMS) build *.egg-info

$(MARK): setup.cfg pyproject.toml setup.py llmserve/engine/kernels.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(MARK)-test: $(MARK)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(MARK)-bench: $(MARK)
	$(LLAMACPP_BUILD) $(BIN)/pip install --quiet --disable-pip-version-check -e ".[llamacpp,bench]"
	touch $@

$(PROGRAMS)/.installed: tests/programs/requirements.txt
	test -x $(PROGRAMS)/bin/python || $(PYTHON) -m venv $(PROGRAMS)
	$(PROGRAMS)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(MARK)-lint: $(MARK)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[lint]"
	touch $@
