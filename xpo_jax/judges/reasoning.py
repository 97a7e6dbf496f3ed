"""The reasoning judge: a language model on the devices argues about both answers, and its last line is the verdict.

    ... Answer B leaves out the date.
    Verdict: A

The run's own sampler draws what the model writes. The last line must be "Verdict: A", B or tie, and nothing else;
`completion_parsing.from_last_line` reads it. What it cannot read, or what was cut off, is no verdict. Nothing that an
answer says is read as a verdict, because only what the model itself has written is read, and of that the end.

A verdict is a function of the judge's seed, the rendered comparison and the number of the vote, and of nothing else in
the batch: a run that resumes gets the verdicts that it had.

Left out on purpose: asking in both orders (`judging.both_orders` does that for any judge), and a server's model, which
`openai.py` asks (mode "reasoning"). The model runs in `device_sampler.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.config.schema import build
from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges.completion_parsing import Unreadable, check_labels, from_last_line
from xpo_jax.judges.device_sampler import Completion, CompletionSampler
from xpo_jax.judges.prompted_model import PromptedModel
from xpo_jax.judges.prompting import MAX_REASONING_CHARACTERS, check_asks_for_verdict
from xpo_jax.judges.voting import Request, vote
from xpo_jax.models.hf import model_folder
from xpo_jax.values import Comparison, Verdict


class ReasoningJudge(PromptedModel):
    """Compares two answers by the last line of what a model writes about them; a `contract.DeviceJudge`."""

    def __init__(
        self,
        path: str | None,
        template: Any,
        labels: tuple[str, str],
        *,
        sampling: Sampling,
        votes: int,
        seed: int,
        **options: Any,
    ):
        """Take what `reasoning` describes; the other options are those of `PromptedModel`."""
        super().__init__(path, template, **options)
        self._labels, self._sampling, self._seed = labels, sampling, seed
        self.queries_per_comparison = votes
        self._unread: list[str] = []  # reasons since `doubt` was called
        self._answered = 0

    def _make_programs(self, mesh: Any, model_config: Any, dtype: Any) -> CompletionSampler:
        """Make the sampler.

        Raises:
          ValueError: `sampling.end_tokens` names no token, or prompts and answers exceed the model's positions.
        """
        names = self._sampling.end_tokens
        self._sampler = CompletionSampler(
            mesh,
            model_config,
            sampling=self._sampling,
            vocab_size=len(self._tokenizer),
            end_tokens=model_folder.end_token_ids(self._folder, self._tokenizer, names),
            pad_token=model_folder.pad_token_id(self._folder, self._tokenizer),
            dtype=dtype,
            batch_size=self._batch_size,
            buckets=self._buckets,
        )
        return self._sampler

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts, whose reasons are what the model has written; with several votes see `voting.vote`.

        Raises:
          JudgeError: a comparison is too long, and `on_long` is "error".
        """
        sequences = list(map(self._rendered_tokens, comparisons))
        fits = [self._fits(len(tokens)) for tokens in sequences]

        def ask(requests: Sequence[Request]) -> list[Verdict]:
            answered = [request for request in requests if fits[request[0]]]
            keys = [self._key(sequences[index], number) for index, number in answered]
            completions = iter(self._sampler([sequences[index] for index, _ in answered], keys))
            return [
                self._verdict(next(completions))
                if fits[index]
                else Verdict(None, self._too_long(len(sequences[index])))
                for index, _ in requests
            ]

        return vote(ask, len(comparisons), self.queries_per_comparison)

    def doubt(self) -> str:
        """Return that the model does not answer as it should, where most of its answers hold no verdict."""
        unread, answered = self._unread, self._answered
        self._unread, self._answered = [], 0
        if 2 * len(unread) <= answered:
            return ""
        return (
            f"{len(unread)} of the {answered} answers of the judge's model hold no verdict, for example: {unread[0]};"
            " change judge.template, or use a model that follows instructions"
        )

    def _key(self, tokens: Sequence[int], number: int) -> np.ndarray:
        """Return the words of the random key, u32[2], of a vote: its number and the prompt, mixed with the seed."""
        text = f"{self._seed}|{number}|{','.join(map(str, tokens))}"
        return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4")

    def _verdict(self, completion: Completion) -> Verdict:
        self._answered += 1
        text = self._tokenizer.decode(completion.tokens, skip_special_tokens=True)
        try:
            if not completion.finished:
                raise Unreadable(
                    f"the answer was cut off after {len(completion.tokens)} tokens; raise judge.sampling.max_new_tokens"
                )
            a, b = from_last_line(text, self._labels)
        except Unreadable as error:
            self._unread.append(shorten(one_line(str(error)), 200))
            return Verdict(None, str(error))
        return Verdict(a / (a + b), shorten(one_line(text), MAX_REASONING_CHARACTERS))


def reasoning(
    *,
    path: str | None,
    template: str | Sequence[Mapping[str, str]],
    labels: tuple[str, str],
    votes: int,
    sampling: Mapping[str, Any],
    seed: int,
    batch_size: int,
    buckets: Sequence[int],
    on_long: Literal["error", "no_verdict"],
    chat_template_arguments: Mapping[str, Any] | None,
) -> ReasoningJudge:
    """Build the judge.

    Args:
      path, template, batch_size, buckets, on_long, chat_template_arguments: see `llm.llm`; the template must ask for
        the last line. A template that is one text suits a base model only.
      labels: what that line holds, for A and for B.
      votes: answers to a comparison, at most: two where they agree, see voting.py. More than one needs a temperature
        above 0.
      sampling: of the answers, as `config.sampling`; max_new_tokens must hold the reasoning.
      seed: of the random draws.

    Raises:
      ValueError: a value out of range; the field comes first.
    """
    check_labels((labels[0], labels[1]))
    check_asks_for_verdict(template)
    drawn = build(Sampling, sampling, "judge.sampling")
    if votes < 1:
        raise ValueError(f"votes: at least 1 is expected, found {votes}")
    if votes > 1 and drawn.temperature == 0:
        raise ValueError(
            f"votes: at temperature 0 {votes} answers would be the same one; set votes to 1, or raise"
            " judge.sampling.temperature"
        )
    return ReasoningJudge(
        path,
        template,
        labels,
        sampling=drawn,
        votes=votes,
        seed=seed,
        batch_size=batch_size,
        buckets=buckets,
        on_long=on_long,
        chat_template_arguments=chat_template_arguments,
    )
