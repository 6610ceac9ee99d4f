"""The auction, plain: what csrc/core/auction.h does, bid by bid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SCALING = 8.0
FINEST = 2.0**-46  # the last epsilon at least, by the largest cost: float64 then has sums exactly


def auction(cost: FloatArray) -> tuple[IntArray, FloatArray]:
    """Column of each row and prices of columns for finite or +inf costs [rows, columns], rows <= columns.

    Bertsekas and Castanon 1992, "A forward/reverse auction algorithm for asymmetric assignment problems". There must be
    a way to match all rows.
    """
    rows, columns = cost.shape
    price = np.zeros(columns)
    column_of_row = np.full(rows, -1)
    last = last_epsilon(cost)
    epsilon = last
    while epsilon < spread(cost) / SCALING:
        epsilon *= SCALING
    while True:
        pays = cost[np.arange(rows), column_of_row] + price[column_of_row]
        column_of_row[pays > (cost + price).min(axis=1) + epsilon] = -1
        epsilon_now = bid_for_columns(cost, price, column_of_row, epsilon)
        bid_for_rows(cost, price, column_of_row, epsilon_now)
        if epsilon_now > epsilon or epsilon <= last:
            return column_of_row, price
        epsilon /= SCALING


def bid_for_columns(cost: FloatArray, price: FloatArray, column_of_row: IntArray, epsilon: float) -> float:
    """Forward: a free row makes its best column as dear as its second best, and epsilon dearer."""
    while np.any(column_of_row < 0):
        row = int(np.argmin(column_of_row))
        pays = cost[row] + price
        best, *others = np.argsort(pays, kind="stable")[:2]
        second = pays[others[0]] if others and pays[others[0]] < np.inf else pays[best] + spread(cost)
        price[best] += second - pays[best] + epsilon
        column_of_row[column_of_row == best] = -1
        column_of_row[row] = best
        while price[best] * np.finfo(float).eps > epsilon / 2:  # float64 has no finer prices of that size
            epsilon *= 2
    return epsilon


def bid_for_rows(cost: FloatArray, price: FloatArray, column_of_row: IntArray, epsilon: float) -> None:
    """Reverse: a free column that is dearer than a taken one gets cheaper, until a row comes or it is not."""
    rows, columns = cost.shape
    if rows == columns:
        return
    level = price[column_of_row].min()
    while (dear := np.setdiff1d(np.flatnonzero(price > level), column_of_row)).size:
        column = dear[0]
        offers = cost[np.arange(rows), column_of_row] + price[column_of_row] - cost[:, column]
        row = int(np.argmax(offers))
        second = np.delete(offers, row).max(initial=-np.inf)
        price[column] = level
        if offers[row] > level + epsilon:
            price[column] = max(level, second - epsilon)
            column_of_row[row] = column


def spread(cost: FloatArray) -> float:
    finite = cost[np.isfinite(cost)]
    return float(finite.max() - finite.min())


def last_epsilon(cost: FloatArray) -> float:
    """The largest power of two below q / rows, if all costs are multiples of q, a power of two."""
    finite = cost[np.isfinite(cost)]
    mantissa, exponent = np.frexp(finite[finite != 0])
    integer = (mantissa * 2.0**53).astype(np.int64)
    units = np.ldexp((integer & -integer).astype(np.float64), exponent - 53)
    epsilon = float(units.min()) if units.size else 0.0
    epsilon = max(epsilon * 2.0 ** -len(bin(cost.shape[0])[2:]), float(np.finfo(float).tiny))
    while epsilon < np.abs(finite).max() * FINEST:
        epsilon *= 2
    return epsilon
