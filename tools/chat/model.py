"""A model that answers conversations, with the project's own sampler."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

import jax
import numpy as np

from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.algorithm.sampler import make_sampler, row_keys
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.data.batches import Batches
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.models import attention_kernels
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.models.registry import abstract_model
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Message, Prompts, Samples


class Chat:
    """A model that answers prompts.

    Programs are compiled on first use of a shape; prompts are padded to powers of two, so that there are few shapes.

    Args:
      model: a folder, a hub name, or "embedded".
      sampling: how answers are sampled. seed: of the random keys.
      chat_template_arguments: values for variables of the chat template, or None.

    Raises:
      ValueError: an unusable model, a tokenizer without chat template or with one that does not read an argument, or
        max_new_tokens beyond the context.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        *,
        seed: int,
        dtype: str = "auto",
        chat_template_arguments: Mapping[str, Any] | None = None,
    ):
        folder = str(hub.find(model).folder)
        config = model_folder.read_config(folder)
        self.tokenizer = model_folder.load_tokenizer(folder, config)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model}: the tokenizer has no chat template; use an instruction-tuned model")
        self._chat_template = ChatTemplate(self.tokenizer, "the model", chat_template_arguments)
        self.room = config.max_position_embeddings - sampling.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"--max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's context of"
                f" {config.max_position_embeddings} tokens; lower it"
            )
        self.pad = model_folder.pad_token_id(folder, self.tokenizer)
        device = jax.devices()[0]
        computes_in = compute_dtype(dtype, device.platform)  # where jax.jit runs without a mesh
        kernels = attention_kernels.choose_for(
            attention_kernels.AUTO, device, dtype=computes_in, head_dim=config.head_dim
        )
        graphdef, _ = abstract_model(config, stacked=False, kernels=kernels)
        draw = make_sampler(
            graphdef,
            sampling,
            vocab_size=len(self.tokenizer),
            end_tokens=model_folder.end_token_ids(folder, self.tokenizer),
            pad_token=self.pad,
        )

        def sample(weights: Any, tokens: Any, lengths: Any, valid: Any, position: Any, turn: Any) -> Samples:
            return draw(weights, tokens, lengths, valid, row_keys(seed, Stream.CHAT, turn, position, 0))

        self._sample, self._compiled = jax.jit(sample), cast(dict[Any, Any], {})
        self._weights = model_folder.load_weights(folder, config, dtype=computes_in)
        self.tokens, self.seconds = 0, 0.0

    def prompt(self, messages: Sequence[Message], row: Row) -> Prompt:
        """Apply the model's chat template to a conversation; control tokens in a message become ordinary text.

        Raises:
          DataError: the chat template rejects the conversation, or it is too long; the message names `row`.
        """
        try:
            ids = self._chat_template(messages)
        except ValueError as error:
            raise DataError(f"{row.at}: {error}") from error
        if len(ids) > self.room:
            raise DataError(
                f"{row.at}: the conversation has {len(ids)} tokens, but only {self.room} fit beside"
                " --max_new_tokens; shorten it"
            )
        return Prompt(row, tuple(messages), np.asarray(ids, np.int32))

    def batches(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Prompts]:
        """Yield the prompts in batches, in order; positions are counted over all prompts."""
        powers = (2**i for i in range(4, 32))
        buckets = [*takewhile(lambda width: width < self.room, powers), self.room]
        for number, batch in enumerate(Batches(prompts, batch_size, buckets, self.pad, None)):
            yield batch._replace(position=batch.position + np.int32(number * batch_size))

    def answer(self, batch: Prompts, turn: int = 0) -> tuple[list[str], np.ndarray]:
        """Return the answers to a batch's valid rows, and bool[rows], whether each is finished.

        Args:
          turn: of the conversation; it is part of the random keys.
        """
        args = (self._weights, batch.tokens, batch.lengths, batch.valid, batch.position, np.int32(turn))
        if batch.tokens.shape not in self._compiled:
            self._compiled[batch.tokens.shape] = self._sample.lower(*args).compile()
        begun = time.monotonic()
        samples = jax.device_get(self._compiled[batch.tokens.shape](*args))
        self.seconds += time.monotonic() - begun
        self.tokens += int(samples.lengths.sum())
        rows = [
            tokens[:n].tolist()
            for tokens, n in zip(samples.tokens[batch.valid], samples.lengths[batch.valid], strict=True)
        ]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True), samples.finished[batch.valid]

    def reply(self, messages: Sequence[Message], turn: int = 0) -> tuple[str, bool]:
        """Return the answer to one conversation, and whether it is finished."""
        row = Row("conversation", turn + 1, {})
        texts, finished = self.answer(next(self.batches([self.prompt(messages, row)], 1)), turn)
        return texts[0], bool(finished[0])

    def speed(self) -> str:
        """Return the number of sampled tokens and their rate as text."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens:,} tokens in {self.seconds:.1f} s, without compilation: {rate:,.1f} tokens/s"
