"""The loader's place goes through torch's distributed checkpoints as it is."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torsh_data import StreamLoader


def stream():
    return StreamLoader([{"x": n} for n in range(60)], 6, seed=2, rank=0, world_size=1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint_holds_the_place(tmp_path):
    loader = stream()
    whole = [batch["index"].tolist() for batch in loader]
    loader = stream()
    begun = [batch["index"].tolist() for batch in itertools.islice(loader, 4)]
    dcp.save({"loader": loader, "x": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    resumed = stream()
    dcp.load({"loader": resumed, "x": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    assert begun + [batch["index"].tolist() for batch in resumed] == whole
