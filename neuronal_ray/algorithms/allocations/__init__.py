"""Allocations, one file each: how sparsity is spread over blocks, linears and rows."""
