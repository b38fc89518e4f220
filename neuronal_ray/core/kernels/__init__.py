"""What is done for every weight or activation, in search and inference: each file has a fast form and its reference."""
