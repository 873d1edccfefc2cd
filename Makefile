# make demo: segment the packaged CT.  make test: run the tests.  make lint: check the style of the code.  make tour: drive the
# panel outside of Slicer, with its times and pictures.  All set up an environment of their own in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint tour clean

demo: $(VENV)/.demo
	$(BIN)/nmsw segment Resources/SampleData/cptac_pda_3mm.nii.gz -o demo/segmentation.seg.nrrd --preview demo/preview.png --statistics demo/volumes.csv --patches demo/patches.mrk.json --report demo/report.json
	@echo "Open demo/preview.png to look at the result, or drag demo/segmentation.seg.nrrd into 3D Slicer."

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tour: $(VENV)/.test
	$(BIN)/python Testing/Python/panel_tour.py

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[headless]"
	@mkdir -p demo
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo
