"""Sampling 8 completions of 64 tokens for each of 4 prompts of 128 tokens against transformers' `generate`.

Both draw from the whole softmax at temperature 1 and go on to full length; ours returns log-probs too. The check in
fp32 is greedy: all tokens must be the same.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import common

PROMPTS, N = 4, 8
PROMPT, NEW = 128, 64  # tokens
BAR = 1.5


def ours(precision: str, temperature: float = 1.0) -> Callable[[], list[list[int]]]:
    from guerdon.language.forward import GroupModel
    from guerdon.language.models import load_model
    from guerdon.language.policy import cast
    from guerdon.language.sampling.base import Sampling
    from guerdon.language.sampling.local import LocalSampler

    model, tokenizer = load_model(common.MODEL)
    prompts = common.text_tokens(tokenizer, [PROMPT] * PROMPTS, seed=0)
    cast(model, precision)
    sampler = LocalSampler(GroupModel(model), tokenizer, stop_ids=set())
    how = Sampling(max_new_tokens=NEW, temperature=temperature)

    def step() -> list[list[int]]:
        groups = sampler.sample(prompts, [list(range(N))] * PROMPTS, how)
        return [completion.tokens for group in groups for completion in group]

    return step


def transformers(precision: str, cache: str, temperature: float = 1.0) -> Callable[[], list[list[int]]]:
    common.quiet()
    import torch

    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL, dtype={"fp32": "float32", "bf16": "bfloat16"}[precision])
    prompts = torch.tensor(common.text_tokens(tokenizer, [PROMPT] * PROMPTS, seed=0))
    model.generation_config.eos_token_id = None
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}

    def step() -> list[list[int]]:
        rows = model.generate(
            prompts if temperature else prompts.repeat_interleave(N, 0),
            attention_mask=None if temperature else torch.ones(PROMPTS * N, PROMPT, dtype=torch.long),
            do_sample=temperature > 0,
            num_return_sequences=N if temperature else 1,
            max_new_tokens=NEW,
            cache_implementation=cache,
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )
        return rows[:, PROMPT:].tolist()

    return step


def main() -> None:
    options = common.arguments(__doc__ or "")
    greedy = []
    for what in ((ours, "fp32", 0.0), (transformers, "fp32", "dynamic", 0.0)):
        with common.Side(options.threads, *what) as side:
            greedy.append(side.step().result)
    if greedy[0] != greedy[1]:
        raise SystemExit("greedy tokens in fp32 are not the same")
    found = {}
    for precision in ("bf16", "fp32"):
        peers = {f"generate {cache}": (transformers, precision, cache) for cache in ("dynamic", "static")}
        row = common.compare((ours, precision), peers, BAR, **vars(options))
        row["new_tokens_per_s"] = {
            name: PROMPTS * N * NEW / steps[row["clock"]]["median"] for name, steps in row["steps"].items()
        }
        common.show(name := f"sampling {precision}", row)
        found[name] = row
    common.save("sampling", options.threads, found)


if __name__ == "__main__":
    main()
