# `make bench` and `make test` need nothing by hand: each makes or reuses $(VENV). `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.make
TRT := $(VENV)/tensorrt
TRITON := $(VENV)/triton-3.6.0
AOT_ARGS ?=
ENGINES := eager,channels_last,compile,fused calls,onnxruntime,openvino,fused_resnet,as is
TRAINERS := eager,channels_last,compile,fused_resnet,as is,ours: low
ENGINES_16 := channels_last,compile,openvino,fused_resnet,as is
TRAINERS_16 := channels_last,compile,fused_resnet
CELLS = $(BIN)/fused-resnet bench-models --rounds 9
BFLOAT16 = --dtypes bf16 --out benchmarks/results/cpu-bf16/models.csv
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
TORCH := from importlib.metadata import version; torch = tuple(map(int, version("torch").split(".")[:2]))
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
HAS_TORCH := $(TORCH); raise SystemExit(torch < (2, 11))
# An environment over a Python that has its own torch keeps that torch and what goes with it; else everything is pinned.
CONSTRAINTS = $(shell grep -qsi 'site-packages = true' $(VENV)/pyvenv.cfg || echo -c constraints.txt)
CSRC := $(shell find csrc -type f -not -name '*.pyc')

# Where there is a compiler, a build without the extension is a failure.
ifeq ($(FUSED_RESNET_NO_EXT),)
export FUSED_RESNET_REQUIRE_EXT ?= $(if $(shell command -v c++),1,0)
endif

.PHONY: help bench bench-all bench-cpu bench-family bench-zoo degradation test lint wheel test-install test-abi cuda-check test-aot test-zoo \
    test-export test-tensorrt test-distributed clean FORCE
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

bench: $(STAMPS)/bench $(STAMPS)/extension ## parity, then speed: make bench BENCH_ARGS="--model resnet50"
	$(BIN)/fused-resnet bench $(BENCH_ARGS)

bench-all: $(STAMPS)/bench $(STAMPS)/rivals $(STAMPS)/extension ## all of benchmarks/RESULTS.md, in about 20 minutes; it resumes
	$(BIN)/fused-resnet bench-all $(BENCH_ARGS)

bench-cpu: $(STAMPS)/bench $(STAMPS)/rivals $(STAMPS)/extension ## ResNet-50 and ResNet-18 beside all CPU engines, 2 threads and 1: 40 minutes; it resumes
	for model in resnet50 resnet18; do \
	    $(CELLS) --model $$model --mode infer --batches 1,16,32 --rivals "$(ENGINES)" $(BENCH_ARGS) && \
	    $(CELLS) --model $$model --mode train --batches 16 --rivals "$(TRAINERS)" $(BENCH_ARGS) && \
	    $(CELLS) --model $$model --mode infer --batches 1,16,32 --rivals "$(ENGINES_16)" $(BFLOAT16) $(BENCH_ARGS) && \
	    $(CELLS) --model $$model --mode train --batches 16 --rivals "$(TRAINERS_16)" $(BFLOAT16) $(BENCH_ARGS) && \
	    OMP_NUM_THREADS=1 $(CELLS) --model $$model --mode infer --batches 1,16 --rivals "$(ENGINES)" \
	        --out benchmarks/results/cpu-1-thread/models.csv $(BENCH_ARGS) || exit 1; \
	done
	$(BIN)/fused-resnet bench-all --parts report

bench-family: $(STAMPS)/bench $(STAMPS)/extension ## all ten ResNets beside torch's modules, batches of 1, 4 and 16: two hours; it resumes
	$(BIN)/python -m fused_resnet.benchmarks.bench_family $(BENCH_ARGS)

bench-zoo: $(STAMPS)/bench $(STAMPS)/peers $(STAMPS)/extension ## fuse() on every model of benchmarks/zoo.py: the README's table; it resumes
	$(BIN)/python -m fused_resnet.benchmarks.bench_zoo --readme README.md $(BENCH_ARGS)

test: lint $(STAMPS)/extension $(STAMPS)/peers ## lint, then the tests: make test PYTEST_ARGS="-k add_relu"
	@test "$(FUSED_RESNET_REQUIRE_EXT)" != 1 || $(BIN)/python -c "import torch, fused_resnet._C"
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(PYTEST_ARGS)

lint: $(STAMPS)/test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMPS)/python ## one abi3 wheel in dist/
	rm -rf dist
	FUSED_RESNET_REQUIRE_EXT=1 $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*-cp310-abi3-*.whl

test-aot: $(STAMPS)/peers $(STAMPS)/triton ## all Triton kernels, configs and targets by both tritons; it resumes: AOT_ARGS="--seconds 600"
	$(BIN)/python tests/triton_backend/records.py --python $(BIN)/python --python $(TRITON)/bin/python $(AOT_ARGS)

test-zoo: $(STAMPS)/extension $(STAMPS)/peers ## fuse() on every model of benchmarks/zoo.py
	FUSED_RESNET_ZOO=1 $(BIN)/python -m pytest tests/fuse/test_zoo.py $(PYTEST_ARGS)

test-install: $(STAMPS)/test ## installs in fresh environments, each another way
	$(BIN)/python -m pytest --noconftest -o addopts= -v -s tests/install/test_install.py $(PYTEST_ARGS)

test-abi: $(STAMPS)/test wheel ## the wheel under other versions of torch, no compiler at hand
	$(BIN)/python -m pytest --noconftest -o addopts= -v -s tests/install/test_abi.py $(PYTEST_ARGS)

cuda-check: $(STAMPS)/peers ## the CUDA kernels, CUTLASS's too, for all architectures, under other torches; no GPU needed
	FUSED_RESNET_CUDA=1 FUSED_RESNET_CUTLASS=1 $(MAKE) wheel
	$(BIN)/python -m pytest --noconftest -o addopts= -v -s tests/install/check_cuda.py tests/install/test_abi.py $(PYTEST_ARGS)

test-export: $(STAMPS)/peers $(STAMPS)/extension ## every network of the family through ONNX Runtime and .pt2, fp32 and fp16
	$(BIN)/python -m pytest -v tests/export_family.py $(PYTEST_ARGS)

test-tensorrt: $(STAMPS)/tensorrt ## the real converters and engine builder of TensorRT; no GPU needed
	$(TRT)/bin/python -m pytest -o addopts= -p no:cacheprovider -v tests/tensorrt $(PYTEST_ARGS)

degradation: $(STAMPS)/bench $(STAMPS)/extension ## plain against residual networks by depth: a table and degradation.png
	$(BIN)/python examples/degradation.py

test-distributed: $(STAMPS)/test $(STAMPS)/extension ## torchrun: four processes, FSDP2, a process that dies, a job that goes on
	$(BIN)/python -m pytest -o addopts= -v tests/distributed $(PYTEST_ARGS)

clean: ## what was built and cached; not $(VENV)
	rm -rf build dist *.egg-info fused_resnet/_C*.so fused_resnet/_build_info.json $(STAMPS)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A Python with torch and what builds the extension.
$(STAMPS)/torch: constraints.txt
	@echo "$(VENV): torch"
	@test -x $(BIN)/python || if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	    $(PYTHON) -m venv --system-site-packages $(VENV) && $(PIP) uninstall -qqy setuptools; \
	    else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(INSTALL) -c constraints.txt torch
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/python: $(STAMPS)/torch
	@$(INSTALL) $(CONSTRAINTS) "setuptools>=77"
	@command -v $(BIN)/ninja ninja >/dev/null || $(INSTALL) $(CONSTRAINTS) ninja || echo "no ninja: csrc compiles slower"
	@touch $@

# Compiles what changed in csrc.
$(STAMPS)/extension: setup.py $(CSRC) $(STAMPS)/python $(if $(wildcard fused_resnet/_C.abi3.so),,FORCE)
	@echo "$(VENV): the extension, from csrc"
	@$(BIN)/python -W ignore setup.py --quiet build_ext --inplace >$(STAMPS)/log 2>&1 || { cat $(STAMPS)/log; exit 1; }
	@touch $@

# The package itself, editable, with one extra.
$(STAMPS)/bench $(STAMPS)/test: $(STAMPS)/%: pyproject.toml setup.py constraints.txt $(STAMPS)/python | $(STAMPS)/extension
	@echo "$(VENV): fused_resnet[$*], editable"
	@$(INSTALL) $(CONSTRAINTS) --no-build-isolation --editable ".[$*]"
	@touch $@

# Other engines to measure ours against.
$(STAMPS)/rivals: $(STAMPS)/bench
	@echo "$(VENV): ONNX Runtime and OpenVINO"
	@$(INSTALL) $(CONSTRAINTS) --no-build-isolation --editable ".[peers]" || echo "some rivals cannot be installed here"
	@touch $@

# For tests, what goes with this torch but may not choose another: torchvision (0.28 with 2.13), triton where it has none, ONNX;
# and CUTLASS's headers.
$(STAMPS)/peers: $(STAMPS)/test
	@echo "$(VENV): torchvision, triton and ONNX Runtime"
	@$(INSTALL) $(CONSTRAINTS) --no-deps "torchvision==$$($(BIN)/python -c '$(TORCH); print(f"0.{torch[1] + 15}.*")')"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) -c constraints.txt --no-deps triton || \
	    echo "no triton for this platform: its tests will be skipped"
	@$(INSTALL) $(CONSTRAINTS) --no-deps timm && $(INSTALL) $(CONSTRAINTS) pyyaml huggingface_hub safetensors || \
	    echo "no timm here: its tests will be skipped"
	@$(INSTALL) -c constraints.txt --no-deps nvidia-cutlass || echo "no CUTLASS here: its tests will be skipped"
	@$(INSTALL) $(CONSTRAINTS) onnx onnxscript onnxruntime || echo "no ONNX Runtime for this platform: its tests will be skipped"
	@touch $@

# The oldest triton that is served, in an environment on top of $(VENV).
$(STAMPS)/triton: $(STAMPS)/peers
	@echo "$(TRITON)"
	@$(BIN)/python -m venv --without-pip $(TRITON)
	@$(BIN)/python -c '$(SITE)' >"$$($(TRITON)/bin/python -c '$(SITE)')/parent.pth"
	@$(INSTALL) --no-deps --upgrade --target "$$($(TRITON)/bin/python -c '$(SITE)')" triton==3.6.0
	@touch $@

# Torch-TensorRT for RTX (it shares its module's name with the one for data centres) in an environment on top of $(VENV).
# Its compiled runtime needs a CUDA build of torch; without those files it takes its own runtime in Python.
$(STAMPS)/tensorrt: constraints.txt $(STAMPS)/peers
	@echo "$(TRT): Torch-TensorRT for RTX"
	@$(BIN)/python -m venv $(TRT)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" >"$$($(TRT)/bin/python -c '$(SITE)')/parent.pth"
	@$(TRT)/bin/pip --disable-pip-version-check install --quiet -c constraints.txt --no-deps torch-tensorrt-rtx \
	    tensorrt_rtx tensorrt_rtx_cu13 tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs dllist psutil
	@test -e "$$($(BIN)/python -c '$(SITE)')/torch/lib/libtorch_cuda.so" || \
	    rm -f "$$($(TRT)/bin/python -c '$(SITE)')"/torch_tensorrt/lib/*.so
	@touch $@
