"""Processes, files, run directories and devices."""
