"""Ray Train jobs."""
