"""Measurements of speed, memory and sizes, and the runtimes that they compare."""
