# Two commands on a fresh machine with Python ≥ 3.10, a C++ compiler and make:
#   make train   train on Fashion-MNIST, end with pictures and scores
#   make test    the whole test suite
# Both create .venv and install what is needed into it.

PYTHON ?= python3
VENV := .venv
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python

.PHONY: train test communities faults lint docs bench gate release matrix gpu gpu-again gpu-here clean

train: $(VENV)/train.stamp
	$(RUN) -m glf_fast.train $(ARGS)

# One process per core, each with one thread: the tests are many and small. Each process begins with neighbours, which share
# what is imported, compiled and trained for them, and takes the others' when it has none. ARGS="-m long" runs those that take minutes.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal $(ARGS)

# Other people's packages that would pull another torch, or half of PyPI: in an environment of their own, on top of .venv.
# Needs Python 3.11 or newer, as pandas 3 does.
communities: $(VENV)-communities/test.stamp
	OMP_NUM_THREADS=1 $(VENV)-communities/bin/python -m pytest tests/communities $(ARGS)

# Half an hour on two cores: kills, failing disks, damaged files and odd input, and a table of what became of them.
# ARGS="--only kills --minutes 5"; what went wrong is printed with the command that repeats it.
faults: $(VENV)/test.stamp
	$(RUN) tests/faults $(ARGS)

# Alone on the machine: a neighbour falsifies every time.
bench: $(VENV)/bench.stamp
	$(RUN) -m pytest bench --benchmark-only $(ARGS)

# Every Triton kernel that is shipped, for three architectures, with the installed Triton and the GPU machine's, on all cores.
gate: $(VENV)/test.stamp
	test -d build/triton-3.6.0 || $(PIP) install --quiet --no-deps --target build/triton-3.6.0 triton==3.6.0
	$(RUN) tools/compile_gate.py --triton build/triton-3.6.0 $(ARGS)

# The two files of a release in dist/, checked; nothing is uploaded. ARGS=--rehearse builds what cannot be released yet.
release: $(VENV)/release.stamp
	$(RUN) tools/release.py $(ARGS)

# One wheel in empty environments: Python 3.10 to 3.13, the oldest torch and the newest. An hour, and 15 GB of disk with
# PyPI's torch. ARGS="--pythons 3.12 --torches 2.13.0"
matrix: $(VENV)/release.stamp
	$(RUN) tools/matrix.py $(ARGS)

# On a machine with a GPU and no network, in two calls of 7 and 5 minutes: use the Python that is there. Results go to $$OUT,
# or gpu-results. ARGS=--rehearse makes both calls on a processor.
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

gpu-again:
	$(PYTHON) tools/gpu.py --second $(ARGS)

# Before that, on a machine with nvcc and a network: its software, both calls over a stub GPU, and build/gpu-here/carry.tar.xz for it.
gpu-here:
	$(PYTHON) tools/gpu_here.py

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	# Text files name their encoding, because Windows has another default; ruff has this rule in its preview alone.
	$(RUN) -m ruff check --preview --select PLW1514 .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The documentation as static files in build/site. A broken link is an error. Look at it: python -m http.server -d build/site
# The variable silences an advertisement of the theme's successor.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

# torch comes first and alone, at the pinned version, so that nothing later can pull a second copy.
$(VENV)/torch.stamp: constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip 'setuptools>=77' wheel ninja
	$(PIP) install --quiet --constraint constraints.txt torch numpy
	touch $@

$(VENV)/train.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES) libraries.txt
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	# An independent Inception to compare ours with. Its dependencies (torchvision, and with it another torch) stay out.
	$(PIP) install --quiet --no-deps torch-fidelity==0.4.0
	$(PIP) install --quiet --no-deps --requirement libraries.txt
	touch $@

$(VENV)-communities/test.stamp: $(VENV)/test.stamp communities.txt
	test -x $(VENV)-communities/bin/python || $(RUN) -m venv $(VENV)-communities
	# The packages of .venv, torch among them, are seen from here.
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(VENV)-communities/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(VENV)-communities/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement communities.txt
	touch $@

# What an extra adds to the installed package, which pip does not build again.
$(VENV)/bench.stamp $(VENV)/docs.stamp $(VENV)/release.stamp: $(VENV)/%.stamp: $(VENV)/test.stamp
	$(PIP) install --quiet --constraint constraints.txt 'glf_fast[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-communities build dist *.egg-info
