"""Fused PyTorch optimizers: one Triton launch per step for all tensors and parameter groups."""

from torsh_optim._adam import Adam, AdamW, AdvancedAdam
from torsh_optim._convert import state_from, state_to
from torsh_optim._explain import GroupRow, GroupTable, explain_groups
from torsh_optim._groups import param_groups
from torsh_optim._lamb import LAMB
from torsh_optim._lion import Lion
from torsh_optim._lookahead import Lookahead
from torsh_optim._saga import SAGA
from torsh_optim._sgd import SGD
from torsh_optim._svrg import SVRG
from torsh_optim._trajectories import Trajectories, trajectories

__version__ = "0.2.0"

__all__ = [
    "LAMB",
    "SAGA",
    "SGD",
    "SVRG",
    "Adam",
    "AdamW",
    "AdvancedAdam",
    "GroupRow",
    "GroupTable",
    "Lion",
    "Lookahead",
    "Trajectories",
    "__version__",
    "explain_groups",
    "param_groups",
    "state_from",
    "state_to",
    "trajectories",
]
