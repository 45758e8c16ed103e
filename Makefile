# `make reproduce` and `make test` need Python 3.11 or newer and make; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# pip would compile on one core; what packages ship for newer Pythons alone does not compile, and is never imported.
PIP := $(RUN) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: help install reproduce test book slides figures lint types style mutation fuzz versions clean

help:
	@echo "make reproduce   train and measure everything at smoke scale; tables, records and figures go to out/"
	@echo "make test        run all tests"
	@echo "make book        build the tutorials and the API as web pages: out/book/index.html"
	@echo "make slides      the one-hour lecture as slides: out/slides; REVEAL=folder shows them without a network"
	@echo "make figures     redraw paper_figures/images from the committed records"
	@echo "make lint        check style, types and who imports whom"
	@echo "make mutation    put faults into the code one by one: do the tests notice? (an hour or two)"
	@echo "make fuzz        try the contract of every public function on hundreds of random inputs (minutes)"
	@echo "make versions    build the wheel and test it in empty environments: oldest and newest Python, torch and NumPy (minutes, gigabytes)"
	@echo "make clean       remove .venv and out/"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; name one with PYTHON=...')"
	@$(PYTHON) -m venv $(VENV)
	@printf "installing into $(VENV), two minutes or three "; \
	(while sleep 2; do printf .; done) & dots=$$!; trap "kill $$dots" EXIT; \
	$(PIP) torch && $(PIP) -e '.[reproduce,tutorials,dev]' && \
	{ $(RUN) -W ignore -m compileall -qq -j 0 $(VENV)/lib || true; }
	@echo " done"
	@touch $@

# Two experiments at a time, each with half of the cores: at this size a second thread gains less than a second experiment. Those that
# measure time run alone. One of the two shows a progress bar.
SMOKE := $(addprefix smoke-,table2 table3 figure3 exactness theorems table1 spectra compress)
HALF := OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 ))
.PHONY: $(SMOKE) smoke-report smoke-images
reproduce: install
	@$(MAKE) --no-print-directory -j2 $(SMOKE)
	$(RUN) -m reproduce compress_speed --out out --records out/records
	$(RUN) -m reproduce decode --out out --records out/records
	@$(MAKE) --no-print-directory -j2 smoke-report smoke-images

$(SMOKE): smoke-%: install
	$(HALF) $(if $(filter table2,$*),,TQDM_DISABLE=1) $(RUN) -m reproduce $* --out out --records out/records
smoke-spectra: smoke-table2
smoke-compress: smoke-table2 smoke-table3
smoke-report: install
	$(RUN) -m reproduce report --records out/records
	$(RUN) -m reproduce claims --records out/records
smoke-images: install
	$(RUN) -m paper_figures --records out/records --out out/figures

# nbval takes two seconds to start in every process, and the notebooks alone need it.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -p no:nbval -n 2 --dist worksteal --cov
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m pytest -p quick_nbval -n 2 --dist loadfile --nbval-lax tutorials

book: install
	$(PIP) -e '.[book]'
	rm -rf out/book
	$(RUN) -m sphinx -q -W --keep-going -c tutorials/book tutorials out/book
	$(RUN) -m tutorials.book.check out/book

# The pictures are in the page; reveal.js and MathJax, and nothing else, come from where these two point, when it is opened.
REVEAL ?= https://unpkg.com/reveal.js@4.0.2
MATHJAX ?= https://cdnjs.cloudflare.com/ajax/libs/mathjax/2.7.7/latest.js?config=TeX-AMS_CHTML-full,Safe
slides: install
	$(VENV)/bin/jupyter nbconvert --to slides --output-dir out/slides tutorials/tucker_in_one_sitting.ipynb \
		--template slides --TemplateExporter.extra_template_basedirs=tutorials/book --SlidesExporter.reveal_number=c/t --SlidesExporter.reveal_theme=white \
		--SlidesExporter.reveal_url_prefix='$(REVEAL)' --SlidesExporter.mathjax_url='$(MATHJAX)'

figures: install
	$(RUN) -m paper_figures

lint: install
	@$(MAKE) --no-print-directory -j2 types style
types: install
	$(RUN) -m mypy
style: install
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(VENV)/bin/lint-imports --no-cache --no-logo

mutation: install
	$(RUN) -m reproduce mutation

fuzz: install
	$(RUN) -m reproduce fuzz

versions: install
	$(RUN) -m reproduce versions --preset wheel

clean:
	rm -rf $(VENV) out
