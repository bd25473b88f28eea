"""Text in another style, judged without a reference: is the content kept, the style reached, the text fluent.

For each answer, all in [0, 1]:

    content   BERTScore F1 of the answer and the column `answer`, by the encoder of the style classifier
    style     probability of the wanted class
    fluency   probability of the fluent class by a second classifier; without one exp(mean log p(token)) under the
              language model itself, the inverse of its perplexity
    value     content x style x fluency, the joint score

Source: PromptQuine and RLPrompt (arXiv 2506.17930, 2205.12548); Zhang et al. 2020 for BERTScore, here without its
weights and rescaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from guerdon.errors import ConfigError, near
from guerdon.feedback.records import Record
from guerdon.language.models import load_other
from guerdon.lazy import torch
from guerdon.rewards.verifiers import Verdict, Verifier

STYLE = "style"  # name of the verifier


class Classifier:
    """The probability of one class of a sequence classifier of transformers.

    Args:
        spec: MODEL#CLASS, with a directory or a hub id.

    Raises:
        ConfigError: no such model, no classifier, or no such class.
    """

    def __init__(self, spec: str):
        name, _, wanted = spec.rpartition("#")
        if not (name and wanted):
            raise ConfigError(f"'{spec}' has to be MODEL#CLASS: a classifier, and the class that is wanted.")
        self.model, self.tokenizer = load_other("ForSequenceClassification", name)
        classes = {str(label): int(i) for i, label in self.model.config.id2label.items()}
        if wanted not in classes:
            raise ConfigError(
                f"the classifier {name} has no class '{wanted}'.{near(wanted, classes)} It has {', '.join(classes)}."
            )
        self.wanted = classes[wanted]

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(n,) probabilities, and for each text the (tokens, D) last hidden states, of unit length."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt", return_special_tokens_mask=True
        )
        own = encoded.pop("special_tokens_mask") == 0
        with torch.no_grad():
            found = self.model(**encoded.to(self.model.device), output_hidden_states=True)
        p = found.logits.float().softmax(-1)[:, self.wanted].cpu().numpy()
        states = torch.nn.functional.normalize(found.hidden_states[-1].float(), dim=-1).cpu()
        return p, [row[mask].numpy() for row, mask in zip(states, own, strict=True)]


def bert_score(a: np.ndarray, b: np.ndarray) -> float:
    """F1 of greedy matching of token states (tokens, D) of unit length, in [0, 1]; 0 where a text has no token."""
    if not (len(a) and len(b)):
        return 0.0
    similar = a @ b.T
    precision, recall = similar.max(1).mean(), similar.max(0).mean()
    return float(np.clip(2 * precision * recall / (precision + recall), 0, 1)) if precision + recall > 0 else 0.0


def style_verifier(style: str, fluency: str, likelihood: Callable[[str], float]) -> Verifier:
    """The joint score as a verifier, with its three factors as parts.

    Args:
        style: MODEL#CLASS.
        fluency: the same, or empty.
        likelihood: geometric mean of the probabilities of a text's tokens; it is the fluency where `fluency` is empty.

    Raises:
        ConfigError: a classifier that is none, or has no such class.
    """
    stylist, critic = Classifier(style), Classifier(fluency) if fluency else None

    def judge(record: Record, completions: list[str]) -> Verdict:
        p, states = stylist([*completions, str(record.columns["answer"])])
        content = [bert_score(own, states[-1]) for own in states[:-1]]
        fluent = critic(completions)[0] if critic else [likelihood(text) for text in completions]
        parts = {"content": content, "style": p[:-1], "fluency": fluent}
        arrays = {name: np.asarray(values, np.float32) for name, values in parts.items()}
        return Verdict(arrays["content"] * arrays["style"] * arrays["fluency"], arrays)

    return Verifier(STYLE, STYLE, judge, binary=False, columns=("answer",))
