.PHONY: help check format test slow gpu kills fuzz results results-cifar10
help:    ## show this
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'
check:   ## everything that must pass: format, lint, types, tests
	ruff format --check . && ruff check . && mypy && pytest -q
format:  ## put the code in shape
	ruff format . && ruff check --fix .
test:    ## the default tests (minutes)
	pytest
slow:    ## the slow tests too
	pytest -m 'not gpu'
gpu:     ## the tests that need an NVIDIA GPU (minutes); tests/gpu says how to try them on a CPU
	pytest -m gpu -n 0 --durations 10 tests/gpu
kills:   ## kill runs at 30 moments; each must go on to the same figures (minutes)
	pytest -m slow -n 0 -s tests/test_kills.py
fuzz:    ## thousands of hostile files, odd arguments and odd objects (20 minutes)
	pytest -m 'slow or not slow' -n 0 -s tests/test_fuzz.py
results: ## docs/results.md: all agents on digits, three seeds (hours on two cores)
	python benchmarks/agents.py $(ARGS)
results-cifar10: ## docs/results.md: all agents on CIFAR-10, three seeds (hours on two cores; ARGS="--device cuda --jobs 14")
	python benchmarks/cifar10.py $(ARGS)
	cp runs/cifar10/comparison/plots/pareto_front.png docs/images/comparing_cifar10.png
