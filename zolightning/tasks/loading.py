"""Rows of a data set, from local files or from the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zolightning.models import first_line

if TYPE_CHECKING:
    from datasets import Dataset

# Text stays text: pandas would read the words "NA" and "None" as missing.
_CSV = {"keep_default_na": False}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {"sep": "\t", **_CSV}),
    ".parquet": ("parquet", {}),
}


def load_file(path: str) -> Dataset:
    """Load a local file; its ending names the format.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; text may be compressed (``.gz``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, the file cannot be read, or it has no rows.

    Example:
        >>> load_file("train.jsonl.gz").column_names
        ['sentence', 'label', 'idx']
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data file {path} {'is a folder' if file.is_dir() else 'does not exist'}")
    ending = Path(file.stem if file.suffix == ".gz" else file.name).suffix
    if ending not in _READERS:
        raise ValueError(f"data file {path}: unknown ending; known: {', '.join(_READERS)} (text also as .gz)")
    import datasets

    builder, options = _READERS[ending]
    try:
        rows = datasets.load_dataset(builder, data_files=str(file), split="train", **options)
    except Exception as error:  # each format has its own kinds, an empty file others; the user needs the reason
        cause = error.__cause__ or error
        reason = "it is empty" if isinstance(cause, StopIteration) else first_line(cause)
        raise ValueError(f"data file {path} has no rows or cannot be read: {reason}") from error
    return _non_empty(rows, f"data file {path}")


def load_hub(path: str, config: str | None) -> dict[str, Dataset]:
    """Load every split of a data set on the hub, or of a local folder laid out like one.

    Args:
        path: Hub id or folder.
        config: Configuration of the data set, or None.

    Returns:
        Split name to rows.

    Raises:
        ValueError: If the data set cannot be loaded, or has no ``train`` split.
    """
    import datasets

    name = path if config is None else f"{path}:{config}"
    try:
        splits = dict(datasets.load_dataset(path, config))
    except Exception as error:  # the hub client has a dozen kinds
        raise ValueError(f"data set {name} cannot be loaded: {first_line(error)}") from error
    if "train" not in splits:
        raise ValueError(f"data set {name} has no train split; it has: {', '.join(splits)}")
    return {split: _non_empty(rows, f"data set {name} ({split})") for split, rows in splits.items()}


def _non_empty(rows: Dataset, where: str) -> Dataset:
    if len(rows) == 0:
        raise ValueError(f"{where} has no rows")
    return rows
