"""Text of data sets on the Hugging Face hub: three by name, as the papers take them, and any other by its ID."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.documents import Documents, Reading, one_line
from neuronal_ray.data.splits import choose_split

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(:[^:\s]{0,96}){0,2}")
COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a hub data set: its first `rows` rows (None: all) as one text, joined by `separator`.

    Without a separator each row is a document. At most `windows` windows are evaluated (None: all).
    """

    split: str
    data_file: str | None = None
    separator: str | None = None
    rows: int | None = None
    windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set on the hub that needs no loading script, and the column with its text."""

    repository: str
    configuration: str | None = None
    revision: str | None = None
    column: str = COLUMN
    calibration: HubSplit
    evaluation: HubSplit


# Splits and separators are those of Wanda's (ICLR 2024) and GPTQ's (ICLR 2023) data loaders, ids those of datasets 4:
# C4 without a configuration, because `en` expects all of its shards; PTB from the hub's own Parquet conversion, because
# its main branch is a script.
HUB = {
    "c4": HubText(
        repository="allenai/c4",
        calibration=HubSplit(split="train", data_file="en/c4-train.00000-of-01024.json.gz"),
        evaluation=HubSplit(
            split="validation",
            data_file="en/c4-validation.00000-of-00008.json.gz",
            separator=" ",
            rows=1100,
            windows=256,
        ),
    ),
    "wikitext2": HubText(
        repository="Salesforce/wikitext",
        configuration="wikitext-2-raw-v1",
        calibration=HubSplit(split="train", separator=" "),
        evaluation=HubSplit(split="test", separator="\n\n"),
    ),
    "ptb": HubText(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        column="sentence",
        calibration=HubSplit(split="train", separator=" "),
        evaluation=HubSplit(split="test", separator=" "),
    ),
}


def is_hub_id(source: str) -> bool:
    """Return whether a source has the form OWNER/NAME, OWNER/NAME:CONFIGURATION or OWNER/NAME:CONFIGURATION:SPLIT."""
    return _ID.fullmatch(source) is not None


def hub_rows(source: str, split: HubSplit, *, flag: str) -> Sequence[str]:
    """Open the text column of a named data set. Raises BadInput if the hub does not provide it."""
    hub_text = HUB[source]
    rows = _load(
        source,
        hub_text.repository,
        hub_text.configuration,
        flag=flag,
        data_files=None if split.data_file is None else {split.split: split.data_file},
        split=split.split,
        revision=hub_text.revision,
    )
    texts: Sequence[str] = rows[hub_text.column]
    return texts


def hub_documents(source: str, reading: Reading, *, evaluated: bool) -> Documents:
    """Return the rows of any data set as documents. Raises BadInput if the hub does not provide it."""
    from neuronal_ray.data.tables import open_table_documents

    repository, configuration, split = [*source.split(":"), "", ""][:3]
    splits = _load(source, repository, configuration or None, flag=reading.flag)
    name = split or choose_split(list(splits), evaluated=evaluated, source=source, flag=reading.flag)
    if name not in splits:
        raise BadInput(f"{reading.flag}: {source!r} has the splits {', '.join(splits)}, not {name!r}")
    return open_table_documents(splits[name].data, source, reading)


def _load(source: str, repository: str, configuration: str | None, *, flag: str, **options: Any) -> Any:
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        return datasets.load_dataset(repository, configuration, **options)
    # OSError covers connections, HTTP statuses and missing files; HTTPError an interrupted download;
    # datasets raises ValueError offline when its cache has another part of the data set.
    except (OSError, HTTPError, datasets.exceptions.DatasetsError, ValueError) as error:
        raise BadInput(
            f"{flag}: {source!r} could not be reached on the Hugging Face hub as {repository}"
            f" ({one_line(error):.300}); a local file such as texts.jsonl or texts.parquet can be given instead"
        ) from error
