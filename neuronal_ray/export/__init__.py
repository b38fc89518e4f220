"""Checking results, and writing them in other formats."""
