# make embed             Set up the environment and embed the example.
# make test              Run the tests.
# make faults            Run the fault tests with every crash point.
# make mutants           Apply each mutant to the library, and check that its tests fail.
# make soak              Run the soak tests: ten minutes of all failures at once, and more.
# make check             Check format, lint and types.
# make bench             Compare with fair-esm and transformers, ten minutes on two cores.
# make bench-overhead    Measure the cost of everything but the model.
# make scale             Run a million sequences with a stub instead of the model.
# make docs              Build the documentation into build/site.
# make check-docs        Run every command in the documentation.
# make check-deployments Run the commands of deployments/process-pool.md.
# make format            Format the code and fix lint.
# make lock              Resolve the packages of the image, with their hashes.
# make clean             Remove the environment and the runs.
PYTHON ?= python3
VENV := .venv
PIP_INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: embed test faults soak mutants bench bench-overhead scale check check-deployments docs check-docs format lock clean

embed: $(VENV)/.installed
	$(VENV)/bin/python flows/embed.py --fasta examples/viral_proteins.fasta --output-dir runs/example \
		--model esm2_t6_8M_UR50D --weights random

test: $(VENV)/.installed-dev
	$(VENV)/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.installed-dev
	$(VENV)/bin/pytest tests/faults --faults=full --timeout=14400

soak: $(VENV)/.installed-dev
	$(VENV)/bin/pytest -m soak tests/soak tests/integration

mutants: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.mutants

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python -m benchmarks.bench

bench-overhead: $(VENV)/.installed-dev
	$(VENV)/bin/python -m benchmarks.overhead

scale: $(VENV)/.installed-dev
	$(VENV)/bin/python -m benchmarks.scale $(if $(SEQUENCES),--sequences $(SEQUENCES))

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check-deployments: $(VENV)/.installed-dev
	$(VENV)/bin/pytest -m "soak or not soak" tests/unit/test_deployments.py tests/integration/test_process_pool.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

check-docs: $(VENV)/.installed-docs
	$(VENV)/bin/pytest -m "soak or not soak" tests/unit/test_documentation.py tests/integration/test_documentation.py

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lock: $(VENV)/.installed-dev
	$(VENV)/bin/uv pip compile --quiet pyproject.toml --extra kubernetes --constraint constraints.txt \
		--python-version 3.12 --python-platform x86_64-manylinux_2_28 --only-binary :all: --generate-hashes \
		--custom-compile-command "make lock" --output-file deployments/requirements.lock

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable '.[bench]'
	touch $@
