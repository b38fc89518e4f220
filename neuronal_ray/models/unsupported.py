"""How is a model refused?"""


class UnsupportedModel(ValueError):
    """A model that cannot be pruned correctly, with the reason."""
