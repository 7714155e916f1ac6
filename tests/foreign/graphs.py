"""Graphs, tables and recommenders: GCN, GAT and GIN on disjoint graphs, DLRM, NeRF's rays."""

from __future__ import annotations

from functools import partial

import torch
from tests.foreign.foreign import Batch, Foreign, curved
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def pooled(x: Tensor, batch: Tensor) -> Tensor:
    """Add up the nodes of each graph, `[R, d]` to `[N, d]`."""
    return x.new_zeros(int(batch.max()) + 1, x.shape[1]).index_add(0, batch, x)


class GCN(nn.Module):
    """PyTorch Geometric's GCNConv: a projection, then sums over edges, and a bias of its own."""

    class Convolution(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.lin = nn.Linear(inputs, outputs, bias=False)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            source, target = edge_index
            degree = torch.ones(len(x), dtype=x.dtype).index_add(
                0, target, torch.ones(len(target), dtype=x.dtype)
            )
            weight = (degree[source] * degree[target]).rsqrt()[:, None]
            x = self.lin(x)
            return x.index_add(0, target, weight * x[source]) + self.bias

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = self.Convolution(3, width), self.Convolution(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.second(self.first(x, edge_index).relu(), edge_index)
        return self.head(pooled(x, batch))


class GAT(nn.Module):
    """Attention over edges with parameters that the convolution itself holds."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(3, 8, bias=False), nn.Linear(8, 2)
        self.att_src, self.att_dst = (nn.Parameter(torch.randn(1, 2, 4)) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        source, target = edge_index
        h = self.lin(x).view(-1, 2, 4)
        scores = (h * self.att_src).sum(-1)[source] + (h * self.att_dst).sum(-1)[target]
        scores = F.leaky_relu(scores, 0.2).exp()
        total = torch.full((len(x), 2), 1e-6, dtype=x.dtype).index_add(0, target, scores)
        weight = (scores / total[target])[..., None]
        y = torch.zeros_like(h).index_add(0, target, weight * h[source])
        return self.head(pooled(y.flatten(1), batch))


class GIN(nn.Module):
    """A small network behind each sum over edges, edge features, a learned epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.eps = nn.Linear(2, 3), nn.Parameter(torch.zeros(1))
        self.nn = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        source, target = edge_index
        messages = (x[source] + self.edge(edge_attr)).relu()
        x = ((1 + self.eps) * x).index_add(0, target, messages)
        return self.head(pooled(self.nn(x), batch))


class GINPlain(nn.Module):
    """GIN without parameters of its own: only linear layers and norms meet nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        source, target = edge_index
        return self.head(pooled(self.nn(x.index_add(0, target, x[source])), batch))


class DLRM(nn.Module):
    """Bags of a sparse feature by offsets, joined with dense features by dot products."""

    def __init__(self, mode: str, *, sparse: bool = False, width: int = 8, rows: int = 7) -> None:
        super().__init__()
        self.bag, self.mode = nn.EmbeddingBag(rows, width, mode=mode, sparse=sparse), mode
        self.user = nn.Embedding(5, width, sparse=sparse)
        self.bottom, self.top = nn.Linear(3, width), nn.Linear(width + 3, 1)

    def forward(
        self, dense: Tensor, items: Tensor, offsets: Tensor, users: Tensor, weights: Tensor
    ) -> Tensor:
        x = self.bottom(dense).relu()
        bags = self.bag(items, offsets, weights if self.mode == "sum" else None)
        both = torch.stack((x, bags, self.user(users)), 1)
        dots = (both @ both.mT)[:, [0, 0, 1], [1, 2, 2]]
        return self.top(torch.cat((x, dots), 1))


class Rays(nn.Module):
    """NeRF: a network on samples along rays, `[N · S, 3]`, and learned codes by image."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(4, 3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, rays: Tensor, image: Tensor) -> Tensor:
        depths = torch.linspace(0, 1, 3, dtype=rays.dtype)
        points = (rays[:, None] * depths[None, :, None]).flatten(0, 1)
        codes = self.codes(image).repeat_interleave(3, 0)
        colour, density = self.net(torch.cat((points, codes), 1)).view(-1, 3, 4).split((3, 1), -1)
        return (density.softmax(1) * colour).sum(1)


def _graphs(n: int, *, edges: bool = False) -> Batch:
    """Make N graphs of 2, 3, 4, ... nodes, each a ring, in one disjoint union."""
    sizes = torch.arange(n) % 3 + 2
    starts = sizes.cumsum(0) - sizes
    source = [start + torch.arange(size) for start, size in zip(starts, sizes, strict=True)]
    target = [start + torch.arange(size).roll(1) for start, size in zip(starts, sizes, strict=True)]
    batch = torch.repeat_interleave(torch.arange(n), sizes)
    made: dict[str, Tensor] = {
        "x": torch.randn(int(sizes.sum()), 3),
        "edge_index": torch.stack((torch.cat(source), torch.cat(target))),
    }
    if edges:
        made["edge_attr"] = torch.randn(int(sizes.sum()), 2)
    return made | {"batch": batch}


def _equal_graphs(n: int) -> Batch:
    """Make N rings of three nodes."""
    source = torch.arange(3 * n)
    target = source // 3 * 3 + (source + 1) % 3
    return {
        "x": torch.randn(3 * n, 3),
        "edge_index": torch.stack((source, target)),
        "batch": source // 3,
    }


def _clicks(n: int) -> Batch:
    sizes = torch.arange(n) % 3 + 1
    return {
        "dense": torch.randn(n, 3),
        "items": torch.randint(7, (int(sizes.sum()),)),
        "offsets": sizes.cumsum(0) - sizes,
        "users": torch.arange(n) % 5,
        "weights": torch.rand(int(sizes.sum())),
    }


def _rays(n: int) -> Batch:
    return {"rays": torch.randn(n, 3), "image": torch.arange(n) % 4}


def _by_name(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(**batch))


def _owned(*modules: str) -> dict[str, object]:
    return {"row_owner": dict.fromkeys(modules, "batch")}


_edges = partial(_graphs, edges=True)

GRAPHS = [
    Foreign("gcn", GCN, _graphs, _by_name, options=_owned("first*", "second*"), everyday=True),
    Foreign("gcn_undeclared", GCN, _graphs, _by_name),
    Foreign("gcn_equal_graphs_undeclared", GCN, _equal_graphs, _by_name),
    Foreign("gat", GAT, _graphs, _by_name, options=_owned("lin"), everyday=True),
    Foreign("gin", GIN, _edges, _by_name, options=_owned("nn.*", "edge"), everyday=True),
    Foreign("gin_plain", GINPlain, _graphs, _by_name, options=_owned("nn.*")),
    Foreign("gin_plain_undeclared", GINPlain, _graphs, _by_name),
    Foreign("dlrm_sum", partial(DLRM, "sum"), _clicks, _by_name, everyday=True),
    Foreign("dlrm_mean", partial(DLRM, "mean"), _clicks, _by_name),
    Foreign("dlrm_max", partial(DLRM, "max"), _clicks, _by_name),
    Foreign("dlrm_sparse", partial(DLRM, "sum", sparse=True), _clicks, _by_name),
    Foreign("nerf_rays", Rays, _rays, _by_name),
]
