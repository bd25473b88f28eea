"""RLPrompt (arXiv 2205.12548): a small network in a frozen language model learns which tokens make a good prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.base import PromptMethod

if TYPE_CHECKING:
    from guerdon.language.policy import Policy
    from guerdon.training.config import PromptTraining
    from guerdon.training.prompting import PromptRun, Search

START_GAIN = 1e-4  # of the initial weights: Q starts near 0, and so the policy near uniform


def z_scores(rewards: Sequence[float]) -> np.ndarray:
    """(B,) (r - mean) / (standard deviation + 1e-4), over the prompts of a batch."""
    r = np.asarray(rewards, float)
    return (r - r.mean()) / (r.std() + 1e-4)


def soft_q_loss(q: torch.Tensor, target: torch.Tensor, actions: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Path consistency of soft Q-learning, over one step and to the end.

    With log pi = Q - V, V = logsumexp Q, V = 0 behind the last token and the reward r there, the mean over t and B of

        1/2 (-V_t + V_{t+1} + r [t = T] - log pi_t)^2  +  1/2 (-V_t + r - sum_{l >= t} log pi_l)^2,

    once with log pi of the policy and V of the target, and once with V_t of the policy and the rest of the target: log
    pi alone says nothing of how large V is. 0 where Q is the soft optimum: Q(s, a) = V(s a), and r of a whole prompt.

    Args:
        q, target: (B, T, V) of the policy, and of the slow copy of it that has no gradient.
        actions: (B, T) tokens.
        reward: (B,).

    Source: Guo et al. 2021 (single-step and multi-step path consistency), as Deng et al. 2022 use it, undiscounted.
    """
    chosen, values = q.gather(-1, actions[..., None])[..., 0], q.logsumexp(-1)
    slow, slow_values = target.detach().gather(-1, actions[..., None])[..., 0], target.detach().logsumexp(-1)
    after = torch.cat([slow_values[:, 1:], reward[:, None]], 1)

    def error(logps: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rest = logps.flip(1).cumsum(1).flip(1)
        return (after - value - logps).square() + (reward[:, None] - value - rest).square()

    return (error(chosen - values, slow_values) + error(slow - slow_values, values)).mean() / 2


class Writer:
    """The policy: h -> MLP(h) before the output layer of a frozen causal model, whose logits are Q.

    Args:
        frozen: the model.
        hidden: width of the MLP.
        lr, max_grad_norm: of AdamW, without weight decay.
        seed: of the initial weights.
    """

    def __init__(self, frozen: Policy, hidden: int, lr: float, max_grad_norm: float, seed: int):
        from guerdon.training.optim import MasterAdamW

        self.frozen = frozen
        self.head = frozen.model.model.get_output_embeddings()
        vocabulary, width = self.head.weight.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp, self.target = _mlp(width, hidden), _mlp(width, hidden)
        self.target.load_state_dict(self.mlp.state_dict())
        self.target.requires_grad_(False)
        for mlp in (self.mlp, self.target):
            mlp.to(frozen.model.device)
        self.optimizer = MasterAdamW(self.mlp.named_parameters(), lr=lr, max_grad_norm=max_grad_norm)
        tokenizer = frozen.tokenizer
        self.barred = torch.arange(vocabulary, device=frozen.model.device) >= len(tokenizer)
        self.barred[tokenizer.all_special_ids] = True
        start = tokenizer.bos_token_id
        self.start = tokenizer.eos_token_id if start is None else start

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, D) hidden states of the frozen model before each of the tokens (B, T)."""
        begun = torch.cat([tokens.new_full((len(tokens), 1), self.start), tokens], 1)[:, :-1]
        with self.frozen.model.plain(), torch.no_grad():
            return self.frozen.model.body(input_ids=begun, use_cache=False).last_hidden_state.float()

    def q(self, mlp: Any, states: torch.Tensor) -> torch.Tensor:
        """(..., V) of states (..., D); special tokens have -inf."""
        logits = self.head(mlp(states).to(self.head.weight.dtype)).float()
        return logits.masked_fill(self.barred, float("-inf"))

    def sample(self, count: int, length: int, top_k: int, seed: int) -> torch.Tensor:
        """(count, length) tokens, each drawn from the softmax over the `top_k` likeliest ones."""
        generator = torch.Generator(self.frozen.model.device).manual_seed(seed)
        tokens = torch.zeros(count, 0, dtype=torch.long, device=self.frozen.model.device)
        for _ in range(length):
            blank = torch.cat([tokens, tokens.new_zeros(count, 1)], 1)
            with torch.no_grad():
                q = self.q(self.mlp, self.states(blank)[:, -1])
            top = q.topk(min(top_k, int((~self.barred).sum())))
            drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, top.indices.gather(1, drawn)], 1)
        return tokens

    def learn(self, tokens: torch.Tensor, rewards: np.ndarray, speed: float) -> Metrics:
        """One gradient step on prompts (B, T) with rewards (B,), and one of the target toward the policy."""
        states = self.states(tokens)
        q, target = self.q(self.mlp, states), self.q(self.target, states)
        loss = soft_q_loss(q, target, tokens, torch.tensor(rewards, dtype=torch.float32, device=q.device))
        loss.backward()
        self.optimizer.accumulate()
        norm = self.optimizer.step()
        for slow, fast in zip(self.target.parameters(), self.mlp.parameters(), strict=True):
            slow.data.lerp_(fast.data, speed)
        logps = q.detach().log_softmax(-1)
        entropy = -(logps.exp() * logps.nan_to_num(neginf=0.0)).sum(-1).mean()
        return {"loss/soft_q": float(loss.detach()), "policy/entropy": float(entropy), "optim/grad_norm": norm}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.optimizer.state_dict(), **{f"target.{k}": v for k, v in self.target.state_dict().items()}}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        slow = {k.removeprefix("target."): v for k, v in tensors.items() if k.startswith("target.")}
        self.target.load_state_dict(slow)
        self.optimizer.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("target.")})


def _mlp(width: int, hidden: int) -> Any:
    into, out = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
    for layer in (into, out):
        torch.nn.init.xavier_uniform_(layer.weight, START_GAIN)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(into, torch.nn.ReLU(), out)


@method("rlprompt", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class RLPrompt(PromptMethod):
    """Prompts of T tokens that a policy writes, which learns by soft Q-learning from how well they do.

    The policy is a frozen language model with an MLP before its output layer, which alone is trained. A step draws a
    batch of prompts, judges them (reward: the margins of probability times 200 where right, 180 where wrong), takes
    z-scores over the batch, which stabilise the reward, and follows `soft_q_loss`. All prompts of a batch are judged by
    the same items, so that the z-score of the paper, of each input, is taken of their mean.

    Source: Deng et al. 2022, with the settings of the official code for classification. The prompt stands before the
    full few-shot prompt (`--shots 0` for the item alone). The first step judges the full prompt without it, too.
    """

    proposer: str = ""  # frozen causal model that holds the MLP; without it the model itself
    length: int = 5  # T, tokens of a prompt
    batch_size: int = 16  # prompts in a step
    hidden: int = 2048  # width of the MLP
    top_k: int = 256  # a token is drawn among so many likeliest ones
    reward_scale: float = 5.0  # of z-scores in the reward: one over the temperature of soft Q-learning
    lr: float = 5e-5  # of Adam
    max_grad_norm: float = 5.0  # gradients are clipped to this norm; 0 does not clip
    target_speed: float = 1e-3  # share of the way to the policy that the target goes in each step

    def check_loop(self, training: PromptTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "length", "batch_size", "hidden", "top_k", low=1)
        check_range(vars(self), "lr", "reward_scale", above=True)
        check_range(vars(self), "max_grad_norm")
        check_range(vars(self), "target_speed", high=1)

    def setup(self, run: PromptRun) -> None:
        from guerdon.language.policy import Policy

        frozen = Policy.load(self.proposer, run.config.precision) if self.proposer else run.causal("give --proposer")
        run.learner = Writer(frozen, self.hidden, self.lr, self.max_grad_norm, run.config.seed)

    def learn(self, run: Search) -> Iterator[Metrics]:
        writer: Writer = run.learner
        if not run.archive:
            yield self.progress(run, run.evaluate([run.everything]))
        while run.left:
            seed = int(run.rng.integers(2**62))
            tokens = writer.sample(min(self.batch_size, run.left), self.length, self.top_k, seed)
            texts = writer.frozen.tokenizer.batch_decode(tokens)
            found = run.evaluate([text.strip() or run.everything for text in texts])
            rewards = self.reward_scale * z_scores([self.fit(run, i) for i in found])
            yield {**self.progress(run, found), **writer.learn(tokens, rewards, self.target_speed)}
