"""Curves, tables and galleries of runs, put together into one HTML page."""
