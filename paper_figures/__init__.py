"""Every figure of this repository, redrawn from records: `python -m paper_figures`."""
