"""Where the rows of simulated clients come from: every source gives one `Arena`."""

from homespun.simulation.datasets.arrays import from_arrays
from homespun.simulation.datasets.columns import Column
from homespun.simulation.datasets.parquet import from_parquet

__all__ = ["Column", "from_arrays", "from_parquet"]
