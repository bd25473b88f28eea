"""Preference and reward losses equal TRL's in value and gradient, on the same batch and weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.packing import Batch, pack, unpack
from guerdon.methods.base import LanguageMethod
from guerdon.methods.preferences.dpo import DPO
from guerdon.methods.reward_models.bradley_terry import RewardModel

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "a b c", "chosen": " d e f g h", "rejected": " c c"},
    {"prompt": "h", "chosen": " a", "rejected": " b d f h b"},
    {"prompt": "b b d e", "chosen": " g f e", "rejected": " e f g"},
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


def config(**options) -> LlamaConfig:
    return LlamaConfig(vocab_size=12, initializer_range=0.5, pad_token_id=0, eos_token_id=1, **SIZES, **options)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def seeded(cls, seed: int, **options):
    torch.manual_seed(seed)
    return cls(config(**options))


def groups_of(ids: torch.Tensor, completion: torch.Tensor) -> list[Group]:
    """Groups from rows (2P, T), chosen before rejected, and the mask of their completions."""
    half = len(ids) // 2
    score = np.array([1, 0], dtype=np.float32)
    groups = []
    for i in range(half):
        answers = [ids[j][completion[j].bool()].tolist() for j in (i, half + i)]
        prompt = ids[i][: int(completion[i].argmax())].tolist()
        groups.append(Group.of(prompt, answers, values={"score": score}))
    return groups


def ours(method: LanguageMethod, model: GroupModel, groups: list[Group]) -> tuple[Batch, torch.Tensor]:
    batch = pack(groups, totals=method.totals(groups))
    loss, _ = method.loss(model(batch, method.wants), batch)
    loss.backward()
    return batch, loss.detach()


def assert_same_gradient(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-4
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5 * max(scale, 1), rtol=1e-4)


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    from datasets import Dataset

    options = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), per_device_train_batch_size=3, **QUIET)
    return trl.DPOTrainer(
        model=seeded(LlamaForCausalLM, 0),
        ref_model=seeded(LlamaForCausalLM, 1),
        args=options,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )


CASES = [
    ({"loss_type": name}, {})
    for name in ("sigmoid", "sigmoid_norm", "ipo", "hinge", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
]
CASES += [({"loss_type": name, "label_smoothing": 0.1}, {"label_smoothing": 0.1}) for name in ("robust", "exo_pair")]
CASES += [
    ({"loss_type": name, "divergence": kind, "alpha": 0.3}, {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.7})
    for name in ("sigmoid", "ipo")
    for kind in ("forward_kl", "js_divergence", "alpha_divergence")
]
CASES += [({"loss_type": "sigmoid", "sft_coef": 0.5}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]})]


@pytest.mark.parametrize(("options", "trl_options"), CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_dpo_family(dpo_trainer, options, trl_options):
    method = DPO(beta=0.3, **options)
    method.check()
    defaults = {"loss_types": [options["loss_type"]], "loss_weights": [1.0], "label_smoothing": 0.0}
    defaults |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "beta": 0.3}
    for name, value in (defaults | trl_options).items():
        assert hasattr(dpo_trainer, name)
        setattr(dpo_trainer, name, value)
    inputs = next(iter(dpo_trainer.get_train_dataloader()))
    dpo_trainer.model.zero_grad()
    expected = dpo_trainer.compute_loss(dpo_trainer.model, inputs)
    expected.backward()

    groups = method.credit(groups_of(inputs["input_ids"], inputs["completion_mask"]), np.random.default_rng(0))
    batch = pack(groups)
    with torch.no_grad():
        unpack(batch, "ref_logps", GroupModel(seeded(LlamaForCausalLM, 1))(batch).logps)
    model = GroupModel(seeded(LlamaForCausalLM, 0))
    _, loss = ours(method, model, groups)
    assert abs(loss.item() - expected.item()) < 1e-5 * max(1, abs(expected.item()))
    assert options.get("divergence") or not math.isclose(loss.item(), method.start_loss() or 0, rel_tol=1e-2)
    assert_same_gradient(model.model, dpo_trainer.model)


@pytest.mark.parametrize("center_coef", [0.0, 0.1])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0]])
def test_reward_model(tmp_path, center_coef, margins):
    from datasets import Dataset

    rows = [row | ({"margin": m} if margins else {}) for row, m in zip(ROWS, margins or [0] * 3, strict=True)]
    options = trl.RewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        center_rewards_coefficient=center_coef or None,
        **QUIET,
    )
    scorer = seeded(LlamaForSequenceClassification, 2, num_labels=1)
    trainer = trl.RewardTrainer(
        model=scorer, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    score, body = scorer.score.weight.detach().clone(), {k: v.clone() for k, v in scorer.model.state_dict().items()}
    ids, attended, margin = inputs["input_ids"], inputs["attention_mask"], inputs.get("margin")
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    causal = seeded(LlamaForCausalLM, 0)
    causal.model.load_state_dict(body)
    model = GroupModel(causal, head="scores")
    model.head.weight.data.copy_(score)
    shared = ids.new_zeros(ids.shape)
    for i in range(len(ids) // 2):  # the prompt is what both rows begin with
        a, b = ids[i], ids[len(ids) // 2 + i]
        start = max(1, int((a != b).nonzero()[0]))
        for j in (i, len(ids) // 2 + i):
            shared[j, start : int(attended[j].sum())] = 1
    groups = groups_of(ids, shared)
    for i, group in enumerate(groups):
        group.columns["margin"] = float(margin[i]) if margins else 0.0
    method = RewardModel(margin=bool(margins), center_coef=center_coef)
    _, loss = ours(method, model, method.credit(groups, np.random.default_rng(0)))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradient(model.model.model, trainer.model.model)
    torch.testing.assert_close(model.head.weight.grad, trainer.model.score.weight.grad, atol=1e-5, rtol=1e-4)
