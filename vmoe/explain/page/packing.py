"""Packs numbers for the page: quantised to 8 or 16 bits, base64 in JSON. `assets/data.js` unpacks them."""

import base64
import math
from typing import Any

import numpy as np

_PACK_FROM = 200  # numbers; shorter lists stay readable JSON
_EIGHT_BITS_FROM = 20_000  # numbers; a matrix of this size is shown as colours
_DIGITS = 5


def pack(values: np.ndarray, bits: int = 16) -> dict[str, Any]:
    """Quantises an array of any shape over its own range.

    Code 0 is a missing (not finite) number. Codes 1 to 2^bits - 1 go from low to high in equal steps. So the error of a
    number is at most half a step: (high - low) / (2^bits - 2) / 2.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    low = float(values[finite].min()) if finite.any() else 0.0
    high = float(values[finite].max()) if finite.any() else 0.0
    steps = 2**bits - 2
    scaled = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
    codes = np.where(finite, 1 + np.rint(scaled * steps), 0)
    return {**pack_integers(codes, bits), "low": low, "high": high}


def pack_integers(values: np.ndarray, bits: int) -> dict[str, Any]:
    """Packs integers from 0 to 2^bits - 1 exactly, little-endian."""
    data = np.ascontiguousarray(values).astype(f"<u{bits // 8}").tobytes()
    return {"packed": base64.b64encode(data).decode("ascii"), "bits": bits, "shape": list(np.shape(values))}


def compact(value: Any) -> Any:
    """A report with long lists and matrices of numbers packed, other numbers rounded to five digits, and no NaN."""
    if isinstance(value, dict):
        return {str(key): compact(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        table = _number_table(value)
        if table is not None and table.size >= _PACK_FROM:
            return _packed_table(table)
        return [compact(part) for part in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _packed_table(table: np.ndarray) -> Any:
    if np.array_equal(table, np.rint(table)):  # indices and counts must stay exact
        exact = table.min() >= 0 and table.max() < 2**16
        return pack_integers(table, 16) if exact else table.astype(int).tolist()
    return pack(table, 8 if table.size >= _EIGHT_BITS_FROM else 16)


def _number_table(value: Any) -> np.ndarray | None:
    """The numbers of a rectangular (nested) list, with NaN for None; None if it holds anything else."""
    probe = value
    while isinstance(probe, list | tuple | np.ndarray) and len(probe):
        probe = probe[0]
    if not (probe is None or isinstance(probe, int | float | np.number)) or isinstance(probe, bool):
        return None
    try:
        return np.array(value, dtype=np.float64)  # None becomes nan
    except (TypeError, ValueError):
        return None
