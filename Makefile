# Everything is installed into .venv; a stamp file per extra keeps repeated runs from installing again.
.NOTPARALLEL:
.PHONY: help demo demo-long demo-rl demo-learned demo-lola demo-gpt demo-reweighting demo-distillation demo-imaml test models-check lint format bench bench-peers peers gpu-check clean distclean

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

# TORCH=2.14.1 runs the same with that release of torch, in an environment of its own.
TORCH ?=
VENV := .venv$(TORCH:%=-torch-%)
PIN := $(if $(TORCH),torch==$(TORCH),-c constraints.txt)
BIN := $(VENV)/bin
PEERS := .venv-peers
# One torch thread per test process: two on few cores slow each other down a hundredfold.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help:
	@echo "make demo       train the few-shot example (minutes on two CPU cores) and draw its pictures"
	@echo "make demo-long  learn example weights through 2,000 training steps (minutes), and draw what was learnt"
	@echo "make demo-rl    learn gamma and lambda while an agent learns CartPole (minutes), and draw pictures"
	@echo "make demo-learned  train an optimizer through training runs (minutes), and set it against Adam"
	@echo "make demo-lola  two players who see that the other one learns find tit-for-tat (a minute)"
	@echo "make demo-gpt   learn a small GPT's learning rates (minutes), and set them against the best cosine"
	@echo "make demo-reweighting  learn weights that find bad sources of labels (minutes), and set them against plain training"
	@echo "make demo-distillation  distil 1,200 digits into ten images (minutes), and train new networks on these"
	@echo "make demo-imaml  implicit MAML beside MAML: accuracy, time and memory (minutes)"
	@echo "make test       run the whole test suite   (ARGS='-k window -x', JOBS=4, TORCH=2.14.1)"
	@echo "make models-check  models of transformers, timm, PEFT, PyTorch Geometric and diffusers against the tape (minutes)"
	@echo "make lint       ruff and pyright           (make format: let ruff fix and format)"
	@echo "make bench      run every benchmarks/bench_*.py"
	@echo "make bench-peers  metaoptim beside other libraries, each in an environment of its own; hours"
	@echo "                (ARGS='--problem digits-sgd --peer jax,ours-compiled --T 100', ARGS=--small)"
	@echo "make gpu-check  tests and figures on a GPU, in minutes (without one: a rehearsal on the CPU)"
	@echo "make clean      remove builds and caches   (make distclean: all environments too)"

demo: $(VENV)/.examples
	$(BIN)/python examples/few-shot/maml-omniglot.py --preset demo $(ARGS)

demo-rl: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/meta-gradient-rl/mgrl-cartpole.py $(ARGS)

demo-learned: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/learned-optimizer/learned-optimizer.py $(ARGS)

demo-lola: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/lola/lola.py $(ARGS)

demo-gpt: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/gpt-schedule/gpt-schedule.py $(ARGS)

demo-reweighting: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/reweighting/reweighting.py $(ARGS)

demo-distillation: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/distillation/distillation.py $(ARGS)

demo-imaml: $(VENV)/.examples
	$(THREADS) $(BIN)/python examples/few-shot/imaml.py $(ARGS)

demo-long: $(VENV)/.examples
	$(BIN)/python examples/long-horizon/learn-weights.py --preset demo $(ARGS)

test: $(VENV)/.test,examples,models
	$(THREADS) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

models-check: $(VENV)/.test,examples,models,libraries
	$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --whole-models tests/exact/test_models.py tests/exact/test_models_of_libraries.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test,examples,models
	@set -e; for script in benchmarks/bench_*.py; do \
	  echo "== $$script"; METAOPTIM_WAIT=1 $(BIN)/python "$$script" $(ARGS); \
	done

bench-peers: $(VENV)/.test,examples peers
	$(BIN)/python benchmarks/peers/run.py $(ARGS)

# The environments of the peers, one for each benchmarks/peers/requirements-*.txt.
peers: $(PEERS)/.torch $(PEERS)/.jax

$(PEERS)/.%: benchmarks/peers/requirements-%.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

gpu-check: $(VENV)/.test,examples
	METAOPTIM_WAIT=1 $(BIN)/python benchmarks/gpu_check.py $(ARGS)

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# The stamp's name is the list of extras.
$(VENV)/.%: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIN) -e '.[$*]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-torch-* $(PEERS)
