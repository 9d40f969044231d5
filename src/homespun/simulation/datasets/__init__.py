"""Where the rows of simulated clients come from: every source gives one `Arena`."""

from homespun.simulation.datasets.arrays import from_arrays
from homespun.simulation.datasets.columns import Column
from homespun.simulation.datasets.parquet import from_parquet
from homespun.simulation.datasets.records import (
    from_examples,
    from_huggingface,
    from_jsonl,
    from_leaf,
)
from homespun.simulation.datasets.text import from_text

__all__ = [
    "Column",
    "from_arrays",
    "from_examples",
    "from_huggingface",
    "from_jsonl",
    "from_leaf",
    "from_parquet",
    "from_text",
]
