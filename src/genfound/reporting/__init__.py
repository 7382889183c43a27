"""Runs of a study -> tables, plots and one self-contained page."""
