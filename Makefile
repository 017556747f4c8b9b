.PHONY: demo test gpu
.DELETE_ON_ERROR:

PYTHON ?= python3
DIGITS = --config configs/demo/digits.yaml

demo: .venv/.installed
	.venv/bin/python train_source.py $(DIGITS) seed=0 out_dir=runs/demo/digits_seed0 --resume
	.venv/bin/python train_dann.py $(DIGITS) configs/demo/dann.yaml \
		seed=0 out_dir=runs/demo/digits_dann_seed0 --resume
	.venv/bin/python reproduce.py configs/suites/demo.yaml --seeds 0

test: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

gpu: .venv/.installed
	.venv/bin/python benchmarks/gpu.py

.venv/.installed: requirements.txt requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
