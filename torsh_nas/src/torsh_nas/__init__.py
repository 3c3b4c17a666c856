"""Architecture search inside your model, under a latency budget measured on your own machine."""

from torsh_nas._architecture import Architecture
from torsh_nas._budget import Budget, InfeasibleBudget
from torsh_nas._cell import Cell
from torsh_nas._choice import Choice
from torsh_nas._darts import DARTS
from torsh_nas._derive import derive
from torsh_nas._latency import LatencyTable
from torsh_nas._measure import DeviceInfo, Timing, measure
from torsh_nas._penalty import LatencyPenalty
from torsh_nas._plot import plot_cell, plot_history
from torsh_nas._recalibrate import recalibrate
from torsh_nas._search import Result, Search, cycle
from torsh_nas._solve import solve
from torsh_nas._space import Space, single_path, space
from torsh_nas._strategy import Strategy, weights

__version__ = "0.2.0"

__all__ = [
    "DARTS",
    "Architecture",
    "Budget",
    "Cell",
    "Choice",
    "DeviceInfo",
    "InfeasibleBudget",
    "LatencyPenalty",
    "LatencyTable",
    "Result",
    "Search",
    "Space",
    "Strategy",
    "Timing",
    "__version__",
    "cycle",
    "derive",
    "measure",
    "plot_cell",
    "plot_history",
    "recalibrate",
    "single_path",
    "solve",
    "space",
    "weights",
]
