# Every target makes the environment that it needs: Python 3.11 or newer, pip and make are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := runs/demo
# Rules of the transformers linter that do not fit here. TRF028 wants the licence text in every file (ours is in LICENSE,
# files have one SPDX line); TRF057 wants @auto_docstring, which prints errors at import outside of the library.
MLINTER_OFF := TRF028|TRF057

.PHONY: help demo test lint docs bench clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# The stamp is newer than setup.cfg once everything in it is installed.
.venv/.ready: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "CAMoE needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,search,hub,test]'
	touch $@

demo: .venv/.ready  ## draw motion clips, train a tiny CAMoE on them, score it and draw pictures (about 6 minutes)
	@echo "1 of 4: drawing 3,700 clips of moving shapes into data/motion_demo, with captions; about 1 minute, once"
	$(BIN)/python training/make_motion_clips.py --preset demo --output data/motion_demo
	@echo "2 of 4: training CAMoE on 3,000 of them from scratch, into $(DEMO); about 4 minutes"
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		--num_cpu_threads_per_process 1 \
		training/run_retrieval.py --config training/recipes/motion_demo.yaml --output_dir $(DEMO)
	@echo "3 of 4: scoring 500 queries against 500 clips that show combinations it never saw; half a minute"
	$(BIN)/python training/evaluate_retrieval.py --checkpoint $(DEMO) --dataset_name data/motion_demo --split test
	@echo "4 of 4: drawing the best clips of some queries, and why; half a minute"
	$(BIN)/python training/show_retrieval.py --checkpoint $(DEMO) --dataset_name data/motion_demo --split test
	@printf '%s\n' "" "Done. The numbers are above and in $(DEMO)/eval_results.json, pictures in $(DEMO)/*.png. Next:" \
		"  $(BIN)/camoe index data/motion_demo/test --model $(DEMO) --index runs/demo_index    # search these clips" \
		"  $(BIN)/camoe serve --index runs/demo_index                                          # on a page" \
		"  $(BIN)/python training/explain.py --checkpoint $(DEMO) --query 'a ring moves left' \\" \
		"      --video data/motion_demo/test/test_00000.mp4 --out explain.png                  # why a score is what it is"

# One thread each, twice as many workers as two cores: many tests wait for programs. A file stays whole, for its
# fixtures, and starts in the order of tests/conftest.py.
test: .venv/.ready  ## run all tests (no network, no GPU, no display)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

bench: .venv/.ready  ## compare with what else there is: one table, a chart, benchmarks/results/ (a quarter of an hour)
	$(BIN)/python benchmarks/run_all.py

lint: .venv/.ready  ## ruff and the transformers library's model linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sed -E '/^\[rules\.($(MLINTER_OFF))\]/,/^default_enabled/s/= true/= false/' \
		"$$($(BIN)/python -c 'import mlinter.mlinter as m; print(m.DEFAULT_RULE_SPECS_PATH)')" > .venv/mlinter_rules.toml
	$(BIN)/mlinter --rules-toml .venv/mlinter_rules.toml modeling_camoe

docs: .venv/.ready  ## build the documentation as a site, in site/; a broken link is an error
	$(BIN)/mkdocs build --quiet

clean:  ## remove what demo made; the environment stays
	rm -rf $(DEMO) data/motion_demo data/motion_demo_frames
