"""What was experienced or logged, with the seed axis in front, and the ways to draw batches from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np

from guerdon.control.priorities import SumTree
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.control.transitions import Chained, Transitions
from guerdon.errors import ConfigError, DataError
from guerdon.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_OPEN = 1 << 62  # the last step of an episode that has not ended


@dataclass
class Batch:
    """Transitions (S, B, ...); sequences of them are (S, B, T, ...).

    With n-step returns, `reward` is the discounted sum of the next `steps` rewards, and the other fields tell of the
    last of these steps: the target is `reward + gamma ** steps * ~terminated * V(next_obs)`.
    """

    obs: Tensor
    action: Tensor  # (S, B, A) float32, or (S, B) int64 where discrete
    reward: Tensor  # (S, B) float32
    next_obs: Tensor
    terminated: Tensor  # (S, B) bool: nothing follows
    truncated: Tensor  # (S, B) bool: something would follow
    steps: Tensor | None = None  # (S, B) int64: how many rewards are in `reward`; None: one
    weight: Tensor | None = None  # (S, B) float32: importance weights of prioritised sampling, at most 1
    index: Tensor | None = None  # (S, B) int64: the rows
    mask: Tensor | None = None  # (S, B, T) bool: the steps of a sequence that are no padding


@dataclass(frozen=True)
class Hindsight:
    """Goals that were reached later stand in for those that were not (Andrychowicz et al. 2017, HER).

    Observations are vectors that hold what is achieved and what is desired; Gymnasium's dict observations
    `achieved_goal`, `desired_goal`, `observation` are flattened in this order. A relabelled transition gets as its goal
    what was achieved after a step of its own episode, itself or a later one ("future"), after the last step so far
    ("final"), or after any step ever ("random").
    """

    achieved: slice
    desired: slice
    reward: Callable[[Tensor, Tensor], Tensor]  # (achieved after the step, goal), each (S, B, G), -> (S, B)
    terminal: Callable[[Tensor, Tensor], Tensor] | None = None  # likewise bool; None: goals end no episode
    strategy: Literal["future", "final", "random"] = "future"
    ratio: float = 0.8  # share of relabelled transitions: 4 of 5


class Drawing(TypedDict, total=False):
    """How `Replay` draws; see there."""

    n_step: int
    gamma: float
    priority: float | None
    hindsight: Hindsight | None


class Replay:
    """A ring of the last `capacity` transitions for each of S seeds.

    A row is one step of one copy; row `t * copies + c` is followed by that of the same copy at `t + 1`. Images are kept
    once: the next observation is that of the following row, and only the last ones of episodes are kept apart; where
    observations stack `frames` images, each is kept as its newest.

    Args:
        capacity: transitions per seed, over all copies.
        seeds: S.
        spec: of the environment.
        streams: each seed's random numbers; batches come where these are.
        copies: C, environments per seed, added together.
        frames: images that an observation stacks, as `make(frame_stack=...)` does.
        n_step: rewards that are summed up to the bootstrap (1). A sum ends early where the episode ends, by termination
            or truncation, and at the newest step.
        gamma: their discount (0.99).
        priority: the exponent alpha of prioritised replay (Schaul et al. 2016); None draws uniformly.
        hindsight: goals to relabel with; None leaves them.

    Raises:
        ConfigError: options that exclude each other.
    """

    _records: np.ndarray | None = None  # (S, rows), all fields of a row together

    def __init__(
        self,
        capacity: int,
        seeds: int,
        spec: Spec,
        streams: Streams,
        *,
        copies: int = 1,
        frames: int = 1,
        **drawing: Unpack[Drawing],
    ) -> None:
        if spec.observation[0] % frames or (frames > 1 and not spec.image):
            raise ConfigError(f"observations {spec.observation} are no stack of {frames} images.")
        first, *rest = spec.observation
        shape = (first // frames, *rest)
        steps = max(1, capacity // copies)
        # Beside those that may be drawn, a ring of images holds the newest next one and what the oldest stack with.
        rows = (steps + frames if spec.image else steps) * copies

        fields: dict[str, tuple[Any, ...]] = {
            "obs": (np.uint8 if spec.image else np.float32, *shape),
            "action": (np.int64,) if spec.discrete else (np.float32, spec.actions),
            "reward": (np.float32,),
            "terminated": (np.bool_,),
            "truncated": (np.bool_,),
            "age": (np.int64,),
            "end": (np.int64,),
        }
        if spec.image:
            fields["final"] = (np.int64,)  # place in `_finals` where an episode ended
            self._finals = torch.zeros(0, *shape, dtype=torch.uint8, device=streams.device)
            self._free: list[int] = []
        else:
            fields["next_obs"] = (np.float32, *shape)
        if spec.image or streams.device.type != "cpu":
            kinds = {name: torch.from_numpy(np.empty(0, kind)).dtype for name, (kind, *_) in fields.items()}
            data = {
                name: torch.zeros(seeds, rows, *each, dtype=kinds[name], device=streams.device)
                for name, (_, *each) in fields.items()
            }
            if spec.image:
                data["final"].fill_(-1)
        else:
            data = self._side_by_side(fields, seeds, rows)
        self._fixed, self._time = False, 0  # whether the rows are one logged set for all; steps ever added
        self._age = np.zeros((seeds, copies), np.int64)  # of the episodes in progress
        self._begin(data, streams, seeds, steps, copies, frames, **drawing)

    @classmethod
    def of(cls, transitions: Transitions, seeds: int, streams: Streams, **drawing: Unpack[Drawing]) -> Replay:
        """Logged transitions, held once for all seeds (images in place, where they can be); see `Replay`.

        Each seed draws in its own order. Nothing can be added.
        """
        replay = cls.__new__(cls)
        device, following = streams.device, transitions.next_observations
        lengths = transitions.lengths()
        ages = np.arange(len(transitions)) - np.repeat(transitions.starts, lengths)
        arrays = {
            "obs": transitions.observations,
            "action": transitions.actions,
            "reward": transitions.rewards,
            "terminated": transitions.terminated,
            "truncated": transitions.truncated,
            "age": ages,
            "end": np.repeat(transitions.starts + lengths - 1, lengths),
        }
        if isinstance(following, Chained):
            arrays["final"] = np.where(following.ends, np.cumsum(following.ends) - 1, -1)
            replay._finals = torch.as_tensor(following.finals, device=device)
        else:
            arrays["next_obs"] = following
        if isinstance(following, Chained) or device.type != "cpu":
            data = {name: torch.as_tensor(array, device=device)[None] for name, array in arrays.items()}
        else:
            data = replay._side_by_side({name: (a.dtype, *a.shape[1:]) for name, a in arrays.items()}, 1, len(ages))
            for name, tensor in data.items():
                tensor[0] = torch.from_numpy(arrays[name])
        replay._fixed, replay._time = True, len(transitions)
        replay._begin(data, streams, seeds, len(transitions), 1, 1, **drawing)
        return replay

    def _side_by_side(self, fields: Mapping[str, tuple[Any, ...]], seeds: int, rows: int) -> dict[str, Tensor]:
        """The fields of a row in one piece of memory, since batches wait for memory: a row more or less at once."""
        kind = np.dtype([(name, kind, tuple(shape)) for name, (kind, *shape) in fields.items()], align=True)
        self._records = np.zeros((seeds, rows), kind)
        return {name: torch.from_numpy(self._records[name]) for name in fields}

    def _begin(
        self,
        data: dict[str, Tensor],
        streams: Streams,
        seeds: int,
        steps: int,
        copies: int,
        frames: int,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        priority: float | None = None,
        hindsight: Hindsight | None = None,
    ) -> None:
        if hindsight and (n_step > 1 or "next_obs" not in data):
            raise ConfigError("goals are relabelled in vectors and one step at a time: leave n_step at 1.")
        self._data, self._streams, self._seeds = data, streams, seeds
        self._steps, self._copies, self._frames = steps, copies, frames
        self._n_step, self._gamma, self._hindsight = n_step, gamma, hindsight
        self._rows = data["obs"].shape[1]
        self._arrays = {name: tensor.numpy() for name, tensor in data.items() if tensor.device.type == "cpu"}
        self._base = torch.arange(seeds, device=streams.device)[:, None] * (0 if self._fixed else self._rows)
        self._alpha = priority
        if priority is not None:
            self._tree = SumTree(seeds, self._rows, streams.device)
            self._most = torch.ones(seeds, dtype=torch.float64, device=streams.device)  # the greatest weight so far
            self._weighed = 0  # the time up to which rows have a weight

    def __len__(self) -> int:
        """Transitions of a seed that may be drawn."""
        return min(self._time, self._steps) * self._copies

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        next_obs: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """One step of every copy, each (S, C, ...); `next_obs` is the true one (`Step.final_obs`) where one ended."""
        here, age, ended = self._at(self._time), self._age, terminated | truncated
        if "final" in self._data:
            channels = self._data["obs"].shape[2]
            obs, next_obs = obs[:, :, -channels:], next_obs[:, :, -channels:]
            self._release(here)
            self._put("obs", self._at(self._time + 1), next_obs)
        else:
            self._put("next_obs", here, next_obs)
        fields = {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
        for name, value in (fields | {"age": age, "end": _OPEN}).items():
            self._put(name, here, value)
        self._time += 1
        self._age = np.where(ended, 0, age + 1)
        if ended.any():
            self._close(ended, age, next_obs)

    def cut(self) -> None:
        """The next step added begins new episodes: those in progress count as truncated where they are."""
        running = self._age > 0
        if running.any():
            newest = self._data["obs"][:, self._at(self._time)].cpu().numpy()  # read for images only
            last = self._at(self._time - 1)
            self._put("truncated", last, self._data["truncated"][:, last].cpu().numpy() | running)
            self._close(running, self._age - 1, newest)
            self._age = np.zeros_like(self._age)

    def _at(self, time: int) -> slice:
        """The rows of all copies at a time."""
        first = time * self._copies % self._rows
        return slice(first, first + self._copies)

    def _put(self, name: str, rows: slice, value: Any) -> None:
        if self._arrays:
            self._arrays[name][:, rows] = value
        else:
            self._data[name][:, rows] = torch.as_tensor(value, device=self._streams.device)

    def _close(self, ended: np.ndarray, age: np.ndarray, finals: np.ndarray) -> None:
        """The newest steps of these copies (S, C), so many steps old, were the last of their episodes."""
        for seed, copy in np.argwhere(ended):
            steps = min(age[seed, copy] + 1, self._rows // self._copies)
            times = np.arange(self._time - steps, self._time)
            rows = (times * self._copies + copy) % self._rows
            self._data["end"][seed, torch.from_numpy(rows)] = self._time - 1
            if "final" in self._data:
                if not self._free:
                    kept, *shape = self._finals.shape
                    self._finals = torch.cat([self._finals, self._finals.new_zeros(kept or 64, *shape)])
                    self._free = list(range(kept, len(self._finals)))
                place = self._free.pop()
                self._finals[place] = torch.as_tensor(finals[seed, copy])
                self._data["final"][seed, int(rows[-1])] = place

    def _release(self, rows: slice) -> None:
        """Rows that are about to be overwritten need their last observations no longer."""
        places = self._data["final"][:, rows]
        self._free += places[places >= 0].tolist()
        places.fill_(-1)

    def sample(self, batch_size: int, beta: float = 1.0) -> Batch:
        """A batch for each seed, drawn with replacement.

        Args:
            beta: with priorities, the exponent of the importance weights `(N P(i)) ** -beta`, which are divided by
                the greatest of the batch.

        Raises:
            DataError: nothing is there yet.
        """
        if self._alpha is None:
            index, weight = self._uniform("rows", batch_size), None
        else:
            index, weight = self._prioritised(batch_size, beta)
        batch = self._gather(index)
        batch.weight = weight
        if self._hindsight is not None:
            self._relabel(batch, index, self._hindsight)
        return batch

    def sequences(self, batch_size: int, length: int) -> Batch:
        """Consecutive steps of one episode, (S, B, length, ...), around rows that are drawn uniformly.

        A sequence begins at its row, or earlier where the episode (so far) would end too soon. Episodes shorter than
        `length` are padded at the end with their last step; `mask` tells the steps that are none.
        """
        index = self._uniform("rows", batch_size)
        left = self._left(index)
        past = torch.minimum(self._take("age", index), self._when(index) - max(0, self._time - self._steps))
        back = torch.minimum((length - 1 - left).clamp(min=0), past)
        offset = torch.arange(length, device=index.device)
        ahead = (left + back)[..., None]
        rows = self._shift(index[..., None], torch.minimum(offset, ahead) - back[..., None])
        obs = self._observed(rows)
        action, reward, terminated, truncated = self._take_all(["action", "reward", "terminated", "truncated"], rows)
        return Batch(
            obs,
            action,
            reward,
            self._following(rows, obs),
            terminated,
            truncated,
            index=rows,
            mask=offset <= ahead,
        )

    def observations(self, index: Tensor) -> Tensor:
        """What was seen in these rows (S, B): (S, B, *obs)."""
        return self._observed(index)

    def later(self, index: Tensor, steps: Tensor | int) -> Tensor:
        """The rows so many steps after `index` (S, B), or the last ones of their episodes (so far) where these end."""
        return self._shift(index, torch.clamp(self._left(index), max=steps))

    def goals(
        self,
        index: Tensor,
        *,
        current: float = 0.2,
        trajectory: float = 0.5,
        random: float = 0.3,
        gamma: float | None = None,
    ) -> Tensor:
        """Rows (S, B) whose observations serve as goals of the rows `index`, as OGBench draws them (Park et al. 2024).

        Args:
            current: probability of the row itself.
            trajectory: of a later row of its episode: `min(i + k, last)`, with k geometric, P(k) = (1 - gamma)
                gamma^(k-1) for k = 1, 2, ...; without `gamma` uniform over the later rows.
            random: of any row, uniformly.
        """
        if min(current, trajectory, random) < 0 or abs(current + trajectory + random - 1) > 1e-6:
            raise ConfigError(f"shares of goals {current}, {trajectory}, {random}: they must sum to 1.")
        branch, place = self._streams.uniform("replay/goals", index.shape[1], 2).unbind(-1)
        if gamma is None:
            ahead = (place * self._left(index)).long() + 1
        else:
            ahead = (torch.log1p(-place.double()) / log(gamma)).long() + 1
        goal = torch.where(branch < trajectory, self.later(index, ahead), self._uniform("goals", index.shape[1]))
        return torch.where(branch < 1 - current, goal, index)

    def prioritise(self, index: Tensor, errors: Tensor) -> None:
        """Rows `index` (S, B) get the priorities `(|errors| + 1e-6) ** alpha`; new rows have the greatest so far.

        Raises:
            ConfigError: this replay draws uniformly.
        """
        if self._alpha is None:
            raise ConfigError("this replay draws uniformly: give it `priority`, the exponent of its priorities.")
        weight = (errors.double().abs() + 1e-6) ** self._alpha
        self._tree.set(index, weight)
        self._most = torch.maximum(self._most, weight.amax(1))

    def _prioritised(self, batch_size: int, beta: float) -> tuple[Tensor, Tensor]:
        """Rows, one from each of B parts of equal weight (Schaul et al. 2016, appendix B.2.1), and corrections."""
        self._require_some()
        self._weigh()
        parts = torch.arange(batch_size, device=self._base.device) + self._streams.uniform("replay/mass", batch_size)
        total = self._tree.total[:, None]
        index = self._tree.find(parts.double() / batch_size * total)
        share = self._tree.weights.gather(1, index) / total
        weight = (len(self) * share) ** -beta
        return index, (weight / weight.amax(1, keepdim=True)).float()

    def _weigh(self) -> None:
        """Weights for the rows added since the last time, none for those that may no longer be drawn."""
        if self._weighed == self._time:
            return
        oldest, copies = max(0, self._time - self._steps), np.arange(self._copies)
        for first, last, weight in (
            (max(0, self._time - self._rows // self._copies), oldest, torch.zeros_like(self._most)),
            (max(oldest, self._weighed), self._time, self._most),
        ):
            rows = (np.arange(first, last)[:, None] * self._copies + copies).ravel() % self._rows
            index = torch.as_tensor(rows, device=self._base.device).expand(self._seeds, -1)
            self._tree.set(index, weight[:, None].expand_as(index))
        self._weighed = self._time

    def _require_some(self) -> None:
        if not self._time:
            raise DataError("there is no transition to draw yet: add some first.")

    def _uniform(self, name: str, *shape: int) -> Tensor:
        """Rows (S, *shape) that may be drawn."""
        self._require_some()
        drawn = self._streams.integers(f"replay/{name}", len(self), *shape)
        oldest = self._time - self._steps
        return drawn if oldest <= 0 else (drawn + oldest * self._copies) % self._rows

    def _shift(self, index: Tensor, steps: Tensor | int) -> Tensor:
        """Rows of the same copies so many steps later."""
        return (index + steps * self._copies) % self._rows

    def _when(self, index: Tensor) -> Tensor:
        """The times of rows."""
        newest = self._time - 1
        return newest - (newest - index // self._copies) % (self._rows // self._copies)

    def _left(self, index: Tensor) -> Tensor:
        """Steps that follow rows in their episodes (so far)."""
        return self._take("end", index).clamp(max=self._time - 1) - self._when(index)

    def _take(self, name: str, index: Tensor) -> Tensor:
        return self._take_all([name], index)[0]

    def _take_all(self, names: Sequence[str], index: Tensor) -> list[Tensor]:
        """Fields of the rows `index` (S, ...)."""
        if not self._fixed:
            index = index + self._base.view(-1, *[1] * (index.dim() - 1))
        if self._records is not None:
            taken = self._records.take(index.numpy())
            return [torch.from_numpy(taken[name]) for name in names]
        flat = [self._data[name].flatten(0, 1) for name in names]
        return [field.index_select(0, index.reshape(-1)).view(*index.shape, *field.shape[1:]) for field in flat]

    def _observed(self, index: Tensor) -> Tensor:
        if self._frames == 1:
            return self._take("obs", index)
        back = torch.arange(self._frames - 1, -1, -1, device=index.device)
        back = torch.minimum(back, self._take("age", index)[..., None])
        return self._take("obs", self._shift(index[..., None], -back)).flatten(index.dim(), index.dim() + 1)

    def _following(self, index: Tensor, obs: Tensor) -> Tensor:
        """Next observations of rows with these observations."""
        if "next_obs" in self._data:
            return self._take("next_obs", index)
        newest, place = self._take("obs", self._shift(index, 1)), self._take("final", index)
        ended = place >= 0
        newest[ended] = self._finals[place[ended]]
        if self._frames == 1:
            return newest
        axis = index.dim()
        return torch.cat([obs.narrow(axis, newest.shape[axis], obs.shape[axis] - newest.shape[axis]), newest], axis)

    def _gather(self, index: Tensor) -> Batch:
        if self._n_step == 1 and "next_obs" in self._data:  # most batches are of these, and small: rows are found once
            names = ["obs", "action", "reward", "next_obs", "terminated", "truncated"]
            taken = dict(zip(names, self._take_all(names, index), strict=True))
            return Batch(**taken, index=index)
        obs, action = self._observed(index), self._take("action", index)
        last, before, steps = index, obs, None
        if self._n_step == 1:
            reward = self._take("reward", index)
        else:
            offset = torch.arange(self._n_step, device=index.device)
            rewards, terminated = self._take_all(["reward", "terminated"], self._shift(index[..., None], offset))
            counts = offset <= self._left(index)[..., None]
            counts[..., 1:] &= terminated[..., :-1].cumsum(-1) == 0
            steps, reward = counts.sum(-1), (rewards * counts * self._gamma**offset).sum(-1)
            last = self._shift(index, steps - 1)
            before = self._observed(last) if self._frames > 1 else obs
        terminated, truncated = self._take_all(["terminated", "truncated"], last)
        following = self._following(last, before)
        return Batch(obs, action, reward, following, terminated, truncated, steps, index=index)

    def _relabel(self, batch: Batch, index: Tensor, how: Hindsight) -> None:
        chosen, place = self._streams.uniform("replay/goals", index.shape[1], 2).unbind(-1)
        if how.strategy == "random":
            rows = self._uniform("goals", index.shape[1])
        else:
            left = self._left(index)
            rows = self.later(index, left if how.strategy == "final" else (place * (left + 1)).long())
        goal = self._take("next_obs", rows)[..., how.achieved]
        relabelled, achieved = chosen < how.ratio, batch.next_obs[..., how.achieved]
        for obs in (batch.obs, batch.next_obs):
            obs[..., how.desired] = torch.where(relabelled[..., None], goal, obs[..., how.desired])
        batch.reward = torch.where(relabelled, how.reward(achieved, goal).float(), batch.reward)
        if how.terminal is not None:
            batch.terminated = torch.where(relabelled, how.terminal(achieved, goal), batch.terminated)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the random streams and logged transitions, as plain tensors (views, where that is enough)."""
        state = {}
        if not self._fixed:
            filled = min((self._time + ("final" in self._data)) * self._copies, self._rows)
            state = {f"data.{name}": tensor[:, :filled] for name, tensor in self._data.items()}
            state |= {"time": torch.tensor(self._time), "age": torch.from_numpy(self._age)}
            if "final" in self._data:
                state["finals"] = self._finals
        if self._alpha is not None:
            state |= {"weights": self._tree.weights, "most": self._most, "weighed": torch.tensor(self._weighed)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` stood, bit for bit."""
        if not self._fixed:
            for name, tensor in self._data.items():
                tensor[:, : state[f"data.{name}"].shape[1]] = state[f"data.{name}"]
            self._time, self._age = int(state["time"]), np.array(state["age"])
            if "final" in self._data:
                self._finals = state["finals"].to(self._finals.device, copy=True)
                self._free = sorted(set(range(len(self._finals))) - set(self._data["final"].flatten().tolist()))
        if self._alpha is not None:
            index = torch.arange(self._rows, device=self._base.device).expand(self._seeds, -1)
            self._tree.set(index, state["weights"].to(index.device))
            self._most, self._weighed = state["most"].to(index.device, copy=True), int(state["weighed"])
