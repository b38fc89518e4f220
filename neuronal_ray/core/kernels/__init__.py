"""Kernels for the operations on every weight or activation, in C, Triton or torch, each next to its reference."""
