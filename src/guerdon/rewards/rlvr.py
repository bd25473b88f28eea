"""The score of reinforcement learning with verifiable rewards (Tulu 3, arXiv 2411.15124)."""

from __future__ import annotations

import numpy as np


def rlvr_score(verified: np.ndarray, finished: np.ndarray, bonus: float = 10.0, penalty: float = -10.0) -> np.ndarray:
    """score = penalty where a completion has no end of sequence, else bonus where it is verified, else 0.

    Args:
        verified: (n,) 0 or 1, or bool.
        finished: (n,) bool, whether the completion ended by itself. An unfinished one gets the penalty even if right.
        bonus, penalty: 10 and -10 in the paper; Tulu 3.1, with GRPO, sets the penalty to 0.

    Returns:
        (n,) float32.
    """
    return np.where(finished, np.where(verified, bonus, 0.0), penalty).astype(np.float32)
