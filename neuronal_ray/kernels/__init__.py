"""The few operations that a search does for every weight or activation: each file has a fast form and its reference."""
