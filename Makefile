# Everything a user or a developer runs. Needs Python 3.11 or newer and make; all else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# One cache for all: most of the time goes into what they have in common, torch's sources.
MYPY := ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache

.PHONY: setup demo test check bench soak proto clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: setup
	$(BIN)/holdfast demo --kill trainer --kills 3 --ranks 2

# Three processes, since some tests wait longer than they compute. HOLDFAST_THOROUGH=1 tries all places and pairs that
# these tests otherwise sample; it takes much longer.
test: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal -q

# mypy wants the package under its own name, whatever the folder of this clone is called.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .build && ln -sfn .. .build/holdfast
	cd .build && $(MYPY) --exclude '/(tests|benchmarks|examples|build)/' -p holdfast
	cd tests && MYPYPATH=../.build:. $(MYPY) --explicit-package-bases .
	cd benchmarks && MYPYPATH=../.build:. $(MYPY) --explicit-package-bases .

bench: setup
	$(BIN)/python benchmarks/capture.py

# A million schedules of the simulator (tests/simulation) take half an hour on two cores; SCHEDULES=… for another number.
soak: setup
	$(BIN)/python -m holdfast.tests.simulation.soak $(SCHEDULES)

proto: setup
	mkdir -p .build && ln -sfn .. .build/holdfast
	cd .build && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. holdfast/agent/wire.proto

clean:
	rm -rf .venv .build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
