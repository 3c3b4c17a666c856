import copy
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import battery
from torsh_dist import Step, launch, no_sync

# fp32 sums in another order, six updates on: the exactness matrix of all layouts.
CLOSE = {"rtol": 5e-6, "atol": 5e-6}
ROWS = (13, 3)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))


def rows_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten(), ignore_index=-100)


def tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["y"] != -100).sum()


def optimizer(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def one_process(batches, loss_fn, max_norm):
    """The same training by hand in one process on the whole batch."""
    model = network()
    update = optimizer(model)
    results = []
    for batch in batches:
        update.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        update.step()
        results.append((loss.detach(), norm))
    return model, results


def compare(batches, shares, loss_fn, **options):
    expected, results = one_process(batches, loss_fn, 0.5)
    model = DistributedDataParallel(network())
    step = Step(model, optimizer(model), loss_fn, max_norm=0.5, **options)
    for share, (loss, norm) in zip(shares, results, strict=True):
        result = step(share[dist.get_rank()])
        torch.testing.assert_close(result.loss, loss, **CLOSE)
        torch.testing.assert_close(result.grad_norm, norm, **CLOSE)
        assert not result.skipped
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def row_batches(count: int = 6):
    batches = [(torch.randn(16, 5), torch.randint(4, (16,))) for _ in range(count)]
    return batches, [
        [(x[: ROWS[0]], y[: ROWS[0]]), (x[ROWS[0] :], y[ROWS[0] :])] for x, y in batches
    ]


def uneven_rows_equal_one_process():
    compare(*row_batches(), rows_loss)


def accumulation_equals_one_process():
    compare(*row_batches(), rows_loss, accumulate=4)  # 13 rows in 4 pieces, 3 rows in 3


def uneven_tokens_equal_one_process():
    batches = []
    for number in range(6):
        y = torch.randint(4, (8, 6))
        y[:4][torch.rand(4, 6) < 0.9] = -100  # rank 0: about two of 24 tokens, at step 3 none
        if number == 3:
            y[:4] = -100
        batches.append({"x": torch.randn(8, 6, 5), "y": y})
    shares = [
        [{key: value[rows] for key, value in batch.items()} for rows in (slice(4), slice(4, 8))]
        for batch in batches
    ]
    compare(batches, shares, token_loss, count=tokens)
    compare(batches, shares, token_loss, count=tokens, accumulate=2)


def masked_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, y, mask = batch
    return (F.cross_entropy(model(x), y, reduction="none") * mask).sum() / mask.sum()


def masked_rows(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return batch[2].sum()


def masked_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows 0 to 7 and 8 to 11 are masked: all, or half, of a rank's, and all of a piece's."""
    mask = torch.ones(16)
    mask[:12] = 0
    return [(torch.randn(16, 5), torch.randint(4, (16,)), mask) for _ in range(3)]


def a_rank_without_items_takes_no_part():
    batches = masked_batches()
    shares = [
        [tuple(one[rows] for one in batch) for rows in (slice(8), slice(8, 16))]
        for batch in batches
    ]
    compare(batches, shares, masked_loss, count=masked_rows)
    compare(batches, shares, masked_loss, count=lambda batch: int(batch[2].sum()))
    compare(batches, shares, masked_loss, count=masked_rows, accumulate=2)


def accumulation_sends_once():
    sent = []

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        work = dist.all_reduce(bucket.buffer() / 2, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    model = DistributedDataParallel(network())
    model.register_comm_hook(None, hook)
    step = Step(model, optimizer(model), rows_loss, accumulate=4)
    for share in row_batches(3)[1]:
        step(share[dist.get_rank()])
    assert sent == [0, 0, 0]


def infinity_on_one_rank_skips_everywhere():
    for fused in (False, True):
        model = DistributedDataParallel(network())
        update = optimizer(model, fused=fused)
        schedule = torch.optim.lr_scheduler.LinearLR(update, 1.0, 0.1, 10)
        step = Step(model, update, rows_loss, scheduler=schedule, max_norm=1.0)
        for number, share in enumerate(row_batches(3)[1]):
            x, y = share[dist.get_rank()]
            before = copy.deepcopy([*model.parameters()])
            moments = copy.deepcopy(update.state_dict()["state"])
            if number == 1 and dist.get_rank() == 1:
                x = x * float("inf")
            result = step((x, y))
            assert bool(result.skipped) == (number == 1)
            same = [bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True)]
            assert all(same) if number == 1 else not any(same)
            if number == 1:
                for index, kept in update.state_dict()["state"].items():
                    for name, value in kept.items():
                        assert torch.equal(value, moments[index][name]), name
        assert int(step.skipped) == 1
        assert schedule.last_epoch == 3


def evaluation_is_the_global_mean():
    model = DistributedDataParallel(nn.Sequential(nn.Dropout(0.5), network()))
    model.module[1][1].eval()
    step = Step(model, optimizer(model), rows_loss)
    (batch,), (share,) = row_batches(1)
    expected = rows_loss(copy.deepcopy(model.module).eval(), batch)
    torch.testing.assert_close(step.eval(share[dist.get_rank()]), expected.detach(), **CLOSE)
    assert model.training
    assert model.module[0].training
    assert not model.module[1][1].training


def bare_model_is_refused():
    model = network()
    with pytest.raises(ValueError, match="bare Sequential and there are 2 processes"):
        Step(model, optimizer(model), rows_loss)


CHECKS = [
    uneven_rows_equal_one_process,
    accumulation_equals_one_process,
    uneven_tokens_equal_one_process,
    a_rank_without_items_takes_no_part,
    accumulation_sends_once,
    infinity_on_one_rank_skips_everywhere,
    evaluation_is_the_global_mean,
    bare_model_is_refused,
]


@pytest.fixture(scope="module")
def two_ranks():
    return launch(battery.run, CHECKS, device="cpu", timeout=120)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(two_ranks, check):
    battery.judge(two_ranks, check)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_without_a_process_group(accumulate):
    batches, _ = row_batches()
    expected, results = one_process(batches, rows_loss, 0.5)
    model = network()
    step = Step(model, optimizer(model), rows_loss, accumulate=accumulate, max_norm=0.5)
    for batch, (loss, norm) in zip(batches, results, strict=True):
        result = step(batch)
        torch.testing.assert_close(result.loss, loss, **CLOSE)
        torch.testing.assert_close(result.grad_norm, norm, **CLOSE)
        assert result.count == 16
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_piece_without_items_takes_no_part():
    batches = masked_batches()
    expected, _ = one_process(batches, masked_loss, 0.5)
    model = network()
    step = Step(model, optimizer(model), masked_loss, accumulate=2, max_norm=0.5, count=masked_rows)
    for batch in batches:
        result = step(batch)
        assert not result.skipped
        assert result.count == 4
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not any(param._backward_hooks for param in model.parameters())


def test_batches_are_cut_in_any_container():
    Pair = namedtuple("Pair", "x extra")
    seen = []

    def loss_fn(model, batch):
        seen.append((batch.x.shape[0], batch.extra["w"].shape[0], batch.extra["name"]))
        assert batch.extra["scale"].dim() == 0
        return model(batch.x).square().mean()

    model = network()
    batch = Pair(torch.ones(5, 5), {"w": torch.ones(5), "scale": torch.tensor(2.0), "name": "five"})
    Step(model, optimizer(model), loss_fn, accumulate=2)(batch)
    assert seen == [(2, 2, "five"), (3, 3, "five")]


def test_an_empty_batch_updates_with_nothing():
    model = network()
    before = copy.deepcopy([*model.parameters()])
    step = Step(model, torch.optim.SGD(model.parameters(), lr=1.0), rows_loss, accumulate=3)
    result = step((torch.empty(0, 5), torch.empty(0, dtype=torch.int64)))
    assert float(result.loss) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_sync_leaves_a_bare_model_alone():
    with no_sync(network()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 is not a number of pieces"),
        ({"max_norm": 0.0}, "max_norm=0.0 is not above 0"),
    ],
)
def test_refuses_options(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        Step(model, optimizer(model), rows_loss, **options)


def test_refuses_an_optimizer_of_another_model():
    with pytest.raises(ValueError, match=r"4 parameter\(s\) that model does not have"):
        Step(network(), optimizer(network()), rows_loss)


def test_refuses_what_it_cannot_count_or_cut():
    model = network()
    with pytest.raises(TypeError, match="str without a tensor that has rows"):
        Step(model, optimizer(model), rows_loss)("batch")
    with pytest.raises(ValueError, match=r"have \[2, 3\] rows"):
        Step(model, optimizer(model), rows_loss, accumulate=2)((torch.ones(2, 5), torch.ones(3)))


@pytest.mark.gpu
def test_makes_no_synchronisation_with_a_fused_optimizer(forbid_synchronisation):
    model = network().cuda()
    step = Step(model, optimizer(model, fused=True), rows_loss, accumulate=2, max_norm=1.0)
    batch = (torch.randn(16, 5, device="cuda"), torch.randint(4, (16,), device="cuda"))
    step(batch)
    with forbid_synchronisation():
        step(batch)
