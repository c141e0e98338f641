# Each target sets up everything that it needs (scripts/bootstrap.sh).
.PHONY: help demo test check lint bench conform soak fuzz oldkernel oldkernels arm64 setup setup-bench setup-demo clean
.DEFAULT_GOAL := help

BIN := .venv/bin
# The directories of mkfs.ext4, losetup and mount.fuse3 are not in every user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

help:
	@echo "make demo   make stubs of a real tree, fill them on demand, check every byte"
	@echo "make test   check formatting, lint and types, and run all tests (ARGS=\"--engine devfuse\": of one engine)"
	@echo "make check T=tests/emulator/test_group.py  run one file or test, without lint (ARGS=\"-m pure\": of one tier, tests/support/README.md)"
	@echo "make lint   check formatting, lint and types only"
	@echo "make bench  measure fusehsm, the real kernel and bindfs, and fetch, cp, rsync and curl (ARGS=--quick for a short run)"
	@echo "make conform  compare the emulator with the real kernel, with both engines: all workloads (docs/conform.md), and 2,000 new sequences"
	@echo "make soak   kill fetch at 500 random moments while users work, and compare every byte (ARGS=\"--points 5000 --seed 1\"); then make fuzz"
	@echo "make fuzz   every fuzzer for 30 minutes, with a new seed (FUZZ_SECONDS=60 FUZZ_SEED=1 T=tests/daemon: of those tests only)"
	@echo "make oldkernel  run tests and fusehsm conform under Debian's Linux 6.1 in an emulated machine (KERNEL=5.10 or 6.12: under those)"
	@echo "make oldkernels  the same under all of them, in hours, with the results in docs/old-kernels.md"
	@echo "make arm64  run the pure tests, those of fusehsm run, and a mount on an emulated arm64 machine (docs/arm64.md)"
	@echo "make clean  remove the virtual environment and caches"

demo: setup-demo
	$(BIN)/python -m examples.demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

T := tests
check: setup
	$(BIN)/python -m pytest $(T) $(ARGS)

lint: setup
	@mkdir -p build
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache > build/imports.log 2>&1 || { cat build/imports.log; exit 1; }
	$(BIN)/codespell fusehsm tests docs examples bench scripts *.md

bench: setup-bench
	$(BIN)/python -m bench.run $(ARGS)

conform: setup
	$(BIN)/python scripts/conform_table.py
	$(BIN)/python -m pytest -q tests/conform/test_sequences.py --sequences 2000

# soak and oldkernel are not part of `make test`, because they take minutes.
soak: setup
	$(BIN)/python -m tests.support.tier.soak $(ARGS)
	@$(MAKE) --no-print-directory fuzz

# Every fuzzer (tests/support/fuzzing.py) longer than in `make test`, with other cases. A failure shows the command that repeats it.
FUZZ_SECONDS := 1800
FUZZ_SEED := $(shell date +%s)
fuzz: setup
	@echo "seed $(FUZZ_SEED), $(FUZZ_SECONDS) s each"
	FUSEHSM_TESTS_LONGEST=$$(($(FUZZ_SECONDS) * 2 + 300)) $(BIN)/python -m pytest -v -m fuzz $(T) \
		--fuzz-seconds $(FUZZ_SECONDS) --fuzz-seed $(FUZZ_SEED)

oldkernel:
	@scripts/bootstrap.sh oldkernel
	@KERNEL="$(KERNEL)" PARTS="$(PARTS)" WORKLOADS="$(WORKLOADS)" scripts/oldkernel.sh $(ARGS)

# A part that fails does not stop the others: the page shows it.
oldkernels:
	@scripts/bootstrap.sh oldkernel
	@for kernel in 5.10 6.1 6.12; do KERNEL=$$kernel scripts/oldkernel.sh || true; done
	@scripts/oldkernel.sh --here
	@$(BIN)/python scripts/old_kernels.py

arm64:
	@scripts/bootstrap.sh arm64
	@KERNEL="$(KERNEL)" PARTS="$(PARTS)" scripts/arm64.sh $(ARGS)

setup:
	@scripts/bootstrap.sh tests

setup-bench:
	@scripts/bootstrap.sh bench

setup-demo:
	@scripts/bootstrap.sh demo

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
