"""Small Hadamard matrices, and which of them make up a row. Without torch, for engines that run without it."""

from __future__ import annotations

import math

import numpy as np

_PRIMES = {12: 11, 20: 19, 28: 13, 36: 17}  # order to q; q = 3 mod 4 is Paley's first construction, 1 mod 4 his second
_ODD_PARTS = ((36, 9), (28, 7), (20, 5), (12, 3))


def hadamard(order: int) -> np.ndarray:
    """Return a Hadamard matrix (entries +-1, orthogonal rows) of order 2, 12, 20, 28 or 36, float32.

    Paley (1933): with the Jacobsthal matrix Q[i, j] = chi(i - j) over GF(q), q prime, chi the quadratic character:
    ``H = I + [[0, 1], [-1, Q]]`` of order q + 1 where q = 3 mod 4; where q = 1 mod 4 the symmetric ``C = [[0, 1], [1,
    Q]]`` gives ``H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]`` of order 2 (q + 1).
    """
    two = np.array([[1, 1], [1, -1]], np.float32)
    if order == 2:
        return two
    q = _PRIMES[order]
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0] + [1 if i in squares else -1 for i in range(1, q)], np.float32)
    core = np.zeros((q + 1, q + 1), np.float32)
    core[0, 1:] = 1
    core[1:, 0] = -1 if q % 4 == 3 else 1
    core[1:, 1:] = chi[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
    identity = np.eye(q + 1, dtype=np.float32)
    if q % 4 == 3:
        return identity + core
    return np.kron(core, two) + np.kron(identity, np.array([[1, -1], [-1, -1]], np.float32))


def factors_of(width: int) -> tuple[int, ...]:
    """Orders whose product is the largest block that divides a width and can be rotated, largest order first.

    Odd parts above 1 are met by one of the orders 12, 20, 28, 36 or several; a width whose odd part is none of those
    (11008 = 43 x 256) is rotated in blocks of the largest power of two that divides it.
    """
    best: tuple[int, ...] = ()
    for odd in (1, 3, 5, 7, 9, 15, 21, 27, 45):
        rest, remaining, found = width, odd, []
        for order, part in _ODD_PARTS:
            while remaining % part == 0 and rest % order == 0:
                found.append(order)
                remaining //= part
                rest //= order
        if remaining != 1:
            continue
        while rest % 2 == 0:
            found.append(2)
            rest //= 2
        if math.prod(found) > math.prod(best):
            best = tuple(found)
    return best
