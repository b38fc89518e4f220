"""Pools: where workers live."""
