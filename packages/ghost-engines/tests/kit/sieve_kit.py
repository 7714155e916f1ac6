"""Rows and queries of which rounding, or what is lost where numbers are small, is the most."""

import torch

from ghost_engines.store import Scorer


def all_rounded_down(c):
    """Return what loses the most: all entries to even ones below, and their sum once more."""
    largest = 1 + 2.0**-8
    signs = torch.randn(c).sign()
    rows = torch.stack([signs, -signs]) * largest
    return rows.repeat(8, 1), signs.expand(3, c) * largest


def scattered(c):
    rows = torch.randn(60, c) * torch.randn(60, 1).mul(2).exp()
    rows[10], rows[11], rows[12] = 0, rows[9], rows[9] * (1 - 2.0**-9)
    return rows, torch.randn(6, c) * torch.tensor([1e-30, 1e-5, 1, 1, 1e5, 1e30])[:, None]


def one_huge_entry(c):
    rows, queries = torch.randn(60, c), torch.randn(6, c)
    queries[:, 0] *= 1e9
    rows[:, -1] *= 1e3
    return rows, queries


def subnormal(c):
    return torch.randint(-9, 10, (60, c)) * 2.0**-24, torch.randn(6, c)


def full_of_ties(c):
    rows = torch.randint(-1, 2, (60, c)) * 1.0
    queries = torch.randint(-1, 2, (6, c)).where(torch.rand(6, c) < 0.1, 0) * 1.0
    queries[:, 0] = 1
    return rows, queries


CASES = [all_rounded_down, scattered, one_huge_entry, subnormal, full_of_ties]


def scored_rows(monkeypatch):
    """Return a list that gets the number of rows of each scoring from now on."""
    scored, plain = [], Scorer.__call__

    def counted(self, rows):
        scored.append(len(rows))
        return plain(self, rows)

    monkeypatch.setattr(Scorer, "__call__", counted)
    return scored


def just_exceeded(scores, ats):
    """Yield thresholds that rows just exceed: for all queries, and for one alone.

    Args:
        scores: Scores `[Q, R]`.
        ats: The rows.
    """
    for at in ats:
        least = scores[:, at : at + 1].nextafter(torch.tensor(-torch.inf))
        alone = torch.full_like(least, torch.finfo(torch.float32).max)
        query = at % len(scores)
        alone[query] = least[query]
        yield at, least
        yield at, alone
