"""Products with packed sparse matrices: C for processors that can expand a vector by a mask, and the references."""
