"""Tasks: plain functions of a worker."""
