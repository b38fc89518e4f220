"""The sets of lambdas that NeuronAL's two steps try; importing this file loads no torch."""

LAMBDAS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
"""The paper's set (section 5.1) and 0.04, which the paper's own Tables 23 and 24 select."""

ROW_LAMBDAS = (0.0, *LAMBDAS)
"""The same with 0.0, which leaves the rows of the block step as they are."""
