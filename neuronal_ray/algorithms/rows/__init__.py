"""Row steps, one file each: how the sparsity of each linear is spread over its rows, after any allocation.

A file declares `ROW_STEP = RowStep(spread_rows=...)`. Keyword-only arguments with a default are its settings
(`--set row-step.NAME=VALUE`). An argument with the name of an option for plug-ins (`row_lambdas`, `lambda_search` and
others, see allocations) takes the value of that option instead.
"""
