"""Losses: pure functions, and their weighted sums."""
