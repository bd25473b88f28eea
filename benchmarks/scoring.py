"""Scoring 32 continuations of one prefix of 256 tokens against scoring each alone, with transformers.

Alone means: one call for each continuation, with logits where they are needed; or all in one padded batch, in which
every row holds the prefix again. In fp32 all log-probs must be the same to 1e-4 before anything is timed, in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

PREFIX, N = 256, 32
LENGTHS = (4, 24)  # tokens of a continuation, at least and at most
BAR = 3.0
TOLERANCE = 1e-4


def sequences(tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    lengths = np.random.default_rng(0).integers(LENGTHS[0], LENGTHS[1] + 1, N).tolist()
    prefix, *continuations = common.text_tokens(tokenizer, [PREFIX, *lengths], seed=0)
    return prefix, continuations


def ours(precision: str) -> Callable[[], list[float]]:
    from guerdon.language.forward import GroupModel
    from guerdon.language.models import load_model
    from guerdon.language.policy import cast
    from guerdon.language.scoring import score

    model, tokenizer = load_model(common.MODEL)
    prefix, continuations = sequences(tokenizer)
    cast(model, precision)
    grouped = GroupModel(model)
    return lambda: np.concatenate(score(grouped, prefix, continuations)).tolist()


def transformers(precision: str, how: str) -> Callable[[], list[float]]:
    common.quiet()
    import torch

    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL, dtype={"fp32": "float32", "bf16": "bfloat16"}[precision])
    prefix, continuations = sequences(tokenizer)

    @torch.no_grad()
    def logps(batch: list[list[int]]) -> list[float]:
        longest = max(map(len, batch))
        rows = torch.zeros(len(batch), PREFIX + longest, dtype=torch.long)
        mask = torch.zeros_like(rows)
        for i, continuation in enumerate(batch):
            rows[i, longest - len(continuation) :] = torch.tensor(prefix + continuation)
            mask[i, longest - len(continuation) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(rows, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1, use_cache=False)
        all_logps = out.logits[:, :-1].float().log_softmax(-1)
        picked = all_logps.gather(2, rows[:, -longest:, None])[..., 0]
        return [x for i, c in enumerate(batch) for x in picked[i, longest - len(c) :].tolist()]

    if how == "one at a time":
        return lambda: [x for continuation in continuations for x in logps([continuation])]
    return lambda: logps(continuations)


def main() -> None:
    options = common.arguments(__doc__ or "")
    peers = ("one at a time", "padded batch")
    found = []
    for build, *how in [(ours,), *((transformers, how) for how in peers)]:
        with common.Side(options.threads, build, "fp32", *how) as side:
            found.append(np.array(side.step().result))
    error = max(float(np.abs(found[0] - other).max()) for other in found[1:])
    if not error <= TOLERANCE:
        raise SystemExit(f"log-probs in fp32 differ by {error:.3g}")
    sides = {how: (transformers, "bf16", how) for how in peers}
    row = common.compare((ours, "bf16"), sides, BAR, **vars(options))
    common.show("scoring bf16", row)
    common.save("scoring", options.threads, {"equality_fp32": error, "scoring bf16": row})


if __name__ == "__main__":
    main()
