"""Which split of a data set is used: for calibration `train`, for evaluation `test`, else `validation`."""

from collections.abc import Sequence

from neuronal_ray.cli.errors import BadInput

CALIBRATED = ("train",)
EVALUATED = ("test", "validation")
_WORDS = {"valid": "validation", "val": "validation", "dev": "validation"}


def choose_split(splits: Sequence[str], *, evaluated: bool, source: str, flag: str) -> str:
    """Return the split to use, the only one where there is one. Raises BadInput if it is not there."""
    wanted = EVALUATED if evaluated else CALIBRATED
    found = next((name for name in wanted if name in splits), None)
    if found is None and len(splits) == 1:
        return splits[0]
    if found is None:
        raise BadInput(f"{flag}: {source!r} has the splits {', '.join(splits) or 'none'}, expected {wanted[0]}")
    return found


def split_in(name: str) -> str | None:
    """Return the split that a file's name begins with, as in train-00000-of-00002.parquet."""
    word = name.replace(".", "-").replace("_", "-").partition("-")[0].lower()
    word = _WORDS.get(word, word)
    return word if word in (*CALIBRATED, *EVALUATED) else None
