"""Allocations, one file each: how sparsity is spread over blocks, linears and rows.

A file declares `ALLOCATION = Allocator(allocate=...)`. Keyword-only arguments with a default are its settings
(`--set allocation.NAME=VALUE`). An argument with the name of an option for plug-ins (`block_lambdas`, `row_lambdas`,
`schedule`, `lambda_search`, `search_budget`, `neuronal_steps`) takes the value of that option instead.
"""
