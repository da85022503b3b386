"""Strokes: from a mask by simulation, and into the network by encoding."""
