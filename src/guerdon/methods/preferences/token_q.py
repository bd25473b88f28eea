"""Reading and using a DPO-trained policy as a soft Q-function over tokens (Rafailov et al. 2024, "From r to Q*").

With V* = 0 at the end of an answer and log-probs of policy and reference in the same state,

    beta log pi(a|s) / pi_ref(a|s) = r(s, a) + V*(s') - V*(s)

so that the log-ratio of each token is its optimal advantage, the sum over an answer is its reward up to V*(prompt), and
the answer of highest summed log-likelihood is the one that a search guided by V* would find. Both models must share
tokenizer and chat template. Models are transformers causal LMs in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from guerdon.errors import ConfigError
from guerdon.language.groups import Group
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.lazy import torch
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.feedback.records import Text
    from guerdon.language.policy import Policy

AT_ONCE = 16  # prompts that are searched together, for the memory of their keys and values

# Reading


def implicit_token_rewards(
    policy: Any, reference: Any, ids: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """beta (log pi - log pi_ref) of each completion token, 0 elsewhere: (B, T), aligned with `ids`.

    The cumulative sum over a row is the implicit return so far, the whole sum the DPO reward.

    Args:
        policy, reference: transformers causal LMs.
        ids: (B, T) tokens, padded on the right.
        mask: (B, T) True on the completion, its end-of-sequence token included; False on prompt and padding.
    """
    return _token_rewards(_log_probs(policy, ids), _log_probs(reference, ids), ids, mask, beta)


def credit_map(group: Group, logps: np.ndarray, ref_logps: np.ndarray, beta: float) -> list[np.ndarray]:
    """beta (log pi - log pi_ref) of each learned token of a group, 0 elsewhere, for looking at.

    Args:
        logps, ref_logps: (N,) of the group's learned tokens, in the order of its segments.

    Returns:
        for each completion, an array aligned with the tokens of `group.sequence(completion)`.
    """
    rewards = iter(beta * (np.asarray(logps) - np.asarray(ref_logps)))
    by_segment = [np.array([next(rewards) if learned else 0.0 for learned in s.learn]) for s in group.segments]
    return [np.concatenate([by_segment[s] for s in group.path(c)]) for c in range(len(group))]


def credits_of(run: str | Path) -> tuple[Policy, Callable[[Group], list[np.ndarray]]]:
    """A run's policy, and the `credit_map` of any group by that policy against the one that the run started from.

    Raises:
        ConfigError: there is no finished run of a language policy, or its start has another tokenizer.
    """
    from guerdon.language.policy import Policy

    if not RunDir.is_at(run) or not (Path(run) / "policy" / "config.json").is_file():
        raise ConfigError(f"{run} holds no finished run of a language policy, whose tokens could be given credit.")
    said = RunDir(run).config
    policy, start = Policy.load(run), Policy.load(said["training"]["model"], seed=said["training"]["seed"])
    _check_tokens(policy, start)
    beta = said["options"].get("beta", 1.0)

    def credit(group: Group) -> list[np.ndarray]:
        policy.annotate([group], "logps")
        start.annotate([group], "ref_logps")
        learned = [s for s in group.segments if s.learn.any()]
        own, ref = (np.concatenate([s.values[name][s.learn] for s in learned]) for name in ("logps", "ref_logps"))
        return credit_map(group, own, ref, beta)

    return policy, credit


class SoftQ(NamedTuple):
    """Values that a policy's logits stand for; `q` and `values` up to one constant for each state, the gauge.

    Attributes:
        q: (..., V) Q(s, a) = beta logits.
        values: (...) V(s) = beta logsumexp(logits).
        advantages: (..., V) beta log pi/pi_ref; the gauge cancels.
    """

    q: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor


def soft_q_from_logits(logits: torch.Tensor, ref_logits: torch.Tensor, beta: float) -> SoftQ:
    """Read logits (..., V) of a policy that samples at temperature 1, and of its reference, as values."""
    advantages = beta * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))
    return SoftQ(beta * logits, beta * logits.logsumexp(-1), advantages)


def expected_advantage(logits: torch.Tensor, ref_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """E_ref[beta log pi/pi_ref] = -beta KL(pi_ref || pi) <= 0 in each state: (..., V) logits to (...)."""
    ref = ref_logits.log_softmax(-1)
    return beta * (ref.exp() * (logits.log_softmax(-1) - ref)).sum(-1)


def diagnostics(policy: Any, reference: Any, ids: torch.Tensor, mask: torch.Tensor, beta: float) -> dict[str, float]:
    """How far a DPO policy has moved on pairs: implicit rewards, their margin, and the drift that the reference sees.

    Falling rewards of chosen answers are no fault by themselves where the margin rises and the expected advantage (here
    averaged over the states of both answers) stays near 0.

    Args:
        ids, mask: (2P, T) as for `implicit_token_rewards`, the P chosen rows before the P rejected ones.
    """
    logps, ref_logps = _log_probs(policy, ids), _log_probs(reference, ids)
    chosen, rejected = _token_rewards(logps, ref_logps, ids, mask, beta).sum(-1).chunk(2)
    return {
        "reward/chosen": float(chosen.mean()),
        "reward/rejected": float(rejected.mean()),
        "preference/margin": float((chosen - rejected).mean()),
        "preference/accuracy": float((chosen > rejected).float().mean()),
        "policy/expected_advantage": float(expected_advantage(logps, ref_logps, beta)[mask[:, 1:].bool()].mean()),
    }


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T - 1, V) log-probs of what follows each token but the last."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


def _token_rewards(
    logps: torch.Tensor, ref_logps: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    taken = (logps - ref_logps).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(beta * taken * mask[:, 1:], (1, 0))


# Using


class Decoder(Protocol):
    """A policy that continues many token sequences at once and remembers them."""

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, V) logits of the token that follows each prompt."""
        ...

    def step(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(m, V) logits after `tokens` (m,) are appended to copies of the rows (m,); other rows are forgotten."""
        ...


class CausalDecoder:
    """Any transformers causal LM, with its key-value cache."""

    def __init__(self, model: Any):
        self.model = model

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.model.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        self.mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        self.cache = None
        return self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.cache.reorder_cache(rows)  # type: ignore[attr-defined]
        mask = self.mask[rows]
        self.mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
        return self._forward(tokens[:, None], mask.sum(-1, keepdim=True))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()


def realign(base: torch.Tensor, proxy: torch.Tensor, reference: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Log-probs of pi proportional to pi_base (pi_proxy / pi_ref)^strength from three sets of logits (..., V).

    Moves the base as the proxy has moved from its reference: pi_base exp(strength A / beta), A the proxy's advantage.
    Proxy tuning is strength 1 with small models for proxy and reference; decoding-time realignment has the reference
    for base and the aligned model for proxy.
    """
    shift = proxy.log_softmax(-1) - reference.log_softmax(-1)
    return (base.log_softmax(-1) + strength * shift).log_softmax(-1)


@dataclass
class RealignedDecoder:
    """A policy that is realigned token by token; see `realign`. The three decoders must be different objects."""

    base: Decoder
    proxy: Decoder
    reference: Decoder
    strength: float = 1.0

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        base, proxy, reference = (d.start(prompts) for d in (self.base, self.proxy, self.reference))
        return realign(base, proxy, reference, self.strength)

    def step(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        base, proxy, reference = (d.step(rows, tokens) for d in (self.base, self.proxy, self.reference))
        return realign(base, proxy, reference, self.strength)


@dataclass(order=True, frozen=True)
class Hypothesis:
    """An answer; one that ended by itself ranks above any that was cut, then by summed log-likelihood.

    Attributes:
        finished: whether it ended with a stop token rather than at the most tokens allowed.
        logp: log-likelihood summed over its tokens, the stop token included.
        tokens: the token ids, the stop token included.
    """

    finished: bool
    logp: float
    tokens: tuple[int, ...]


def beam_search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    stop: Collection[int] = (),
    keep: int = 1,
) -> list[list[Hypothesis]]:
    """The likeliest answers to each prompt by beam search, which on a DPO policy searches with its learned value.

    The likelihood is summed, without a length penalty, as the telescoping of values asks. One beam is greedy decoding.
    A prompt is done when no live hypothesis can overtake the `keep` best finished ones.

    Args:
        beams: live hypotheses of each prompt.
        stop: token ids that end an answer.
        keep: answers returned for each prompt.

    Returns:
        for each prompt, at most `keep` hypotheses, best first.
    """
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    live: list[list[Hypothesis]] = [[Hypothesis(False, 0.0, ())] for _ in prompts]
    active = list(range(len(prompts)))
    logits = decoder.start(prompts)
    for step in range(max_new_tokens):
        width = len(logits) // len(active)
        before = torch.full((len(active), width, 1), -torch.inf, device=logits.device)
        for i, p in enumerate(active):
            before[i, : len(live[p]), 0] = before.new_tensor([h.logp for h in live[p]])
        totals = before + logits.log_softmax(-1).view(len(active), width, -1)
        vocabulary = totals.shape[-1]
        # Each live hypothesis may end in `len(stop)` ways, which must not crowd out those that go on.
        best = totals.flatten(1).topk(min(beams * (1 + len(stop)), width * vocabulary))
        rows: list[int] = []
        tokens: list[int] = []
        for i, (p, logps, indices) in enumerate(zip(active, best.values.tolist(), best.indices.tolist(), strict=True)):
            parents, live[p], origin = live[p], [], []
            for rank, (logp, index) in enumerate(zip(logps, indices, strict=True)):
                if logp == -np.inf:
                    break
                parent, token = divmod(index, vocabulary)
                hypothesis = Hypothesis(token in stop, logp, (*parents[parent].tokens, token))
                if not hypothesis.finished and len(live[p]) < beams:
                    live[p].append(hypothesis)
                    origin.append(i * width + parent)
                elif hypothesis.finished and rank < beams:
                    found[p].append(hypothesis)
            found[p] = sorted(found[p], reverse=True)[:keep]
            if live[p] and (len(found[p]) < keep or found[p][-1].logp < live[p][0].logp):
                empty = beams - len(origin)
                rows += origin + [i * width] * empty
                tokens += [h.tokens[-1] for h in live[p]] + [0] * empty
            else:
                live[p] = []
        active = [p for p in active if live[p]]
        if not active or step + 1 == max_new_tokens:
            break
        logits = decoder.step(torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    return [sorted(done + cut, reverse=True)[:keep] for done, cut in zip(found, live, strict=True)]


def sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    stop: Collection[int] = (),
) -> list[Hypothesis]:
    """One sampled answer to each prompt; an answer depends on its prompt and seed alone.

    Args:
        seeds: one for each prompt.
        sampling: temperature and truncation; stop strings are not looked at.
        stop: token ids that end an answer.

    Returns:
        for each prompt the answer, with its log-likelihood at the temperature and before truncation.
    """
    from guerdon.language.sampling.local import draw

    generators = [np.random.default_rng(seed) for seed in seeds]
    answers = [Hypothesis(False, 0.0, ()) for _ in prompts]
    active = list(range(len(prompts)))
    logits = decoder.start(prompts)
    for step in range(sampling.max_new_tokens):
        uniforms = torch.tensor([generators[p].random() for p in active], device=logits.device)
        tokens, logps = draw(logits, uniforms, sampling)
        for p, token, logp in zip(active, tokens.tolist(), logps.tolist(), strict=True):
            answers[p] = Hypothesis(token in stop, answers[p].logp + logp, (*answers[p].tokens, token))
        rows = [i for i, p in enumerate(active) if not answers[p].finished]
        if not rows or step + 1 == sampling.max_new_tokens:
            break
        active = [active[i] for i in rows]
        kept = torch.tensor(rows, device=logits.device)
        logits = decoder.step(kept, tokens[kept])
    return answers


class Shift(NamedTuple):
    """How a policy has moved from where it started, to be added to another one; see `realign`."""

    proxy: Policy
    reference: Policy
    strength: float = 1.0


def decode(
    policy: Policy,
    prompts: Sequence[Text],
    sampling: Sampling,
    *,
    n: int = 1,
    beams: int = 0,
    shift: Shift | None = None,
    seed: int = 0,
) -> list[list[Completion]]:
    """Answers of a policy, or of one that is realigned, by beam search or by sampling.

    Args:
        prompts: strings, or lists of messages where the tokenizer has a chat template.
        sampling: of `max_new_tokens`, and without beams of temperature and truncation.
        n: samples of each prompt; a search gives one answer.
        beams: of the search; 0 samples.
        shift: what realigns the policy, by models with the same tokenizer.
        seed: of the samples.

    Raises:
        ConfigError: the models of the shift have another tokenizer.
    """
    from guerdon.language.templates import prompt_ids, stop_ids

    tokenizer, stop = policy.tokenizer, stop_ids(policy.tokenizer, policy.model.model)
    for other in shift[:2] if shift is not None else ():
        _check_tokens(policy, other)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    found: list[list[Hypothesis]] = []
    with ExitStack() as plain:

        def decoder_of(policy: Policy) -> Decoder:
            return CausalDecoder(plain.enter_context(policy.model.plain()))

        decoder = decoder_of(policy)
        if shift is not None:
            others = decoder_of(shift.proxy), decoder_of(shift.reference)
            decoder = RealignedDecoder(decoder, *others, shift.strength)
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            if beams:
                found += beam_search(decoder, some, beams=beams, max_new_tokens=sampling.max_new_tokens, stop=stop)
                continue
            rows = [prompt for prompt in some for _ in range(n)]
            seeds = [each for prompt in some for each in completion_seeds(n, seed, *prompt)]
            drawn = sample(decoder, rows, seeds, sampling, stop)
            found += [drawn[i * n : (i + 1) * n] for i in range(len(some))]
    texts = iter(tokenizer.batch_decode([h.tokens for each in found for h in each], skip_special_tokens=True))
    return [[Completion(list(h.tokens), np.empty(0), h.finished, next(texts)) for h in each] for each in found]


def _check_tokens(policy: Policy, other: Policy) -> None:
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ConfigError("token by token, policies can only be compared where they have the same tokenizer.")
