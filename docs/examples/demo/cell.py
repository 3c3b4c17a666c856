"""Search a small convolutional cell under a latency budget measured on this machine."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torsh_nas as nas
from digits import digits, to_float
from report import Section, Table

CHANNELS = 16
OPERATIONS = ("conv 3x3", "separable 5x5", "average", "skip")


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """The candidates for an edge of the cell; all keep the number of channels."""
    if name == "skip":
        return nn.Identity()
    if name == "average":
        return nn.Sequential(nn.AvgPool2d(3, stride, padding=1), norm(channels))
    size = int(name[-1])
    if name.startswith("separable"):
        depthwise = nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels)
        layers = [depthwise, nn.Conv2d(channels, channels, 1, bias=False)]
    else:
        layers = [nn.Conv2d(channels, channels, size, stride, size // 2, bias=False)]
    return nn.Sequential(nn.ReLU(), *layers, norm(channels))


def norm(channels: int) -> nn.Module:
    """Without a scale to learn, so that operations compete on what they compute."""
    return nn.BatchNorm2d(channels, affine=False)


class Reader(nn.Module):
    """An ordinary module: a stem, two equal cells of which every edge is a choice, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2))
        self.cells = nn.ModuleList(self.cell() for _ in range(2))
        self.head = nn.Linear(CHANNELS * 16, 10)

    @staticmethod
    def cell() -> nas.Cell:
        options = {"nodes": 3, "keep": 2, "inputs": 1, "reduce": "sum", "label": "cell"}
        return nas.Cell(operation, OPERATIONS, channels=CHANNELS, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 4).flatten(1))


def run(demo) -> Section:
    data = digits()
    images, half = to_float(data.images), len(data.images) // 2
    for_weights = TensorDataset(images[:half], data.labels[:half])
    for_choices = TensorDataset(images[half:], data.labels[half:])
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one thread: times that repeat, also on a shared machine
    net = Reader()
    space, batch = nas.space(net), images[:64]

    everywhere = {op: dense(net, op) for op in ("conv 3x3", "skip")}
    slow, fast = (nas.measure(plain, batch).ms for plain in everywhere.values())
    # A quick run, on a machine that may be busy, only goes through the motions.
    limit = 10 * slow if demo.quick else fast + 0.7 * (slow - fast)
    table = nas.LatencyTable.build(net, batch)
    search = nas.Search(
        net,
        nas.DARTS(lr=0.02, warmup_epochs=0 if demo.quick else 2),
        F.cross_entropy,
        torch.optim.SGD(nas.weights(net), lr=0.05, momentum=0.9, weight_decay=3e-4),
        budget=nas.Budget(latency_ms=limit, source=table),
    )
    loaders = [DataLoader(part, 64, shuffle=True) for part in (for_weights, for_choices)]
    result = search.fit(*loaders, epochs=demo.epochs(10))
    demo.made.net = result.model(weights="reset")
    path = demo.out / "architecture.json"
    result.architecture.to_json(path)

    found = result.timing
    section = Section(
        f"found a cell that takes {found.ms:.2f} ms, budget {limit:.2f} ms",
        [
            f"{space.size():,} cells to choose from; with convolutions everywhere {slow:.2f} ms",
            f"the result is a plain module of {parameters(demo.made.net):,} parameters; {path}",
        ],
    )
    rows = [
        ["conv 3x3 on every edge kept", f"{slow:.2f}", f"{parameters(everywhere['conv 3x3']):,}"],
        ["budget", f"{limit:.2f}", ""],
        ["found", f"{found.ms:.2f}", f"{parameters(demo.made.net):,}"],
        ["skip on every edge kept", f"{fast:.2f}", f"{parameters(everywhere['skip']):,}"],
    ]
    section.tables.append(Table(["cell", "ms for 64 images", "parameters"], rows))
    figure = Figure(figsize=(9, 3))
    left, right = figure.subplots(1, 2)
    nas.plot_cell(result.architecture, ax=left)
    nas.plot_history(result.history, ax=right)
    section.add_figure("The cell that was found, and the search that found it", figure)
    return section


def dense(net: nn.Module, operation: str) -> nn.Module:
    """The plain network with the same operation on the two nearest edges of every node."""
    choices = {}
    for label in nas.space(net).labels:
        source, target = map(int, label.partition("/")[2].split("->"))
        choices[label] = operation if target - source <= 2 else "none"
    return nas.derive(net, nas.space(net).architecture(choices)).eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
