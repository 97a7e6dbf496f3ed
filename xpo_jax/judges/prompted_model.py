"""A judge whose model on the devices reads a rendered comparison: what `llm.py` and `reasoning.py` have in common.

The model is one of its own, or the policy's starting model, whose arrays are shared. A subclass makes the programs
that run it (`_make_programs`) and reads what they return.

An answer cannot change the structure of the prompt: control tokens in it are ordinary text, and `prompting.py` breaks
the template's tags in it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpo_jax.config.schema import check_increasing
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.device_model import DeviceModel, check_divisible
from xpo_jax.judges.prompting import Rendering
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.values import Comparison, Message, Params


class PromptedModel(abc.ABC):
    """The model, its tokenizer and its prompt; the part of a `contract.DeviceJudge` that comes before the verdicts.

    Args:
      path: a folder or hub name of the model; None for the policy's starting model.
      template: see `prompting.Rendering`; a text is tokenized as it is, messages go through the chat template.
      batch_size, buckets: rows per call, and padded lengths of rendered comparisons, tokens.
      on_long: "error" or "no_verdict", for a comparison longer than the last bucket.
      chat_template_arguments: values for variables of the chat template, or None.

    Raises:
      ValueError: a value out of range; the field comes first.
    """

    collective = True

    def __init__(
        self,
        path: str | None,
        template: str | Sequence[Mapping[str, str]],
        *,
        batch_size: int,
        buckets: Sequence[int],
        on_long: str,
        chat_template_arguments: Mapping[str, Any] | None,
    ):
        self._render = Rendering(template, break_control_tokens=False)  # the tokenizer reads them as text
        if batch_size < 1:
            raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
        check_increasing(buckets, "buckets")
        if chat_template_arguments and isinstance(template, str):
            raise ValueError(
                "chat_template_arguments: the template is one text, which passes through no chat template; write it as"
                " messages, or set chat_template_arguments to None"
            )
        self._path, self._chat_template_arguments = path, chat_template_arguments
        self._batch_size, self._buckets, self._on_long = batch_size, tuple(buckets), on_long

    @abc.abstractmethod
    def _make_programs(self, mesh: Any, model_config: Any, dtype: Any) -> DeviceModel:
        """Make what runs the model; `_folder` and `_tokenizer` are those of the judge's model.

        Raises:
          ValueError: the model or its tokenizer does not suit this judge.
        """

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Open the judge's model, or the policy's starting model where they are the same, for the run's mesh and dtype.

        Raises:
          ValueError: the batch size is not divisible over the mesh, the model folder cannot be used, or the chat
            template rejects the template or does not read an argument; see also `_make_programs`.
        """
        check_divisible(self._batch_size, mesh)
        self._source = None if self._path is None else hub.find(self._path)
        self._folder = folder if self._source is None else self._source.folder
        self._shares_policy_weights = self._folder.resolve() == folder.resolve()
        if not self._shares_policy_weights:
            model_config = model_folder.read_config(self._folder)
            model_folder.check_params(self._folder, model_config)
            tokenizer = model_folder.load_tokenizer(self._folder, model_config)
        self._tokenizer = tokenizer
        try:
            self._chat_template = ChatTemplate(
                tokenizer, "the judge's tokenizer", self._chat_template_arguments
            )
        except ValueError as error:
            raise ValueError(f"judge.chat_template_arguments: {error}") from error
        self._tokens(self._render.template)  # so that the chat template rejects it now, if ever
        self._model = self._make_programs(mesh, model_config, dtype)

    def models(self) -> list[dict[str, str | None]]:
        """Return the judge's model, if `path` names one, for environment.json; called after `attach`."""
        return [] if self._source is None else [{"path": self._source.given, "commit": self._source.commit}]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that the prompt can be rendered and fits the last bucket, if it must.

        Raises:
          ValueError: a column of the template is missing, empty or not text; or the comparison is too long even with
            empty answers.
        """
        rendered = self._render(Comparison(messages, row, "", ""))
        if self._on_long == "error":
            self._fits(len(self._tokens(rendered)))

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return a label and a compile function for each bucket."""
        return self._model.declared_programs()

    def load(self, starting: Params | None) -> None:
        """Share the policy's starting weights if this judge uses them and they are available, else read them."""
        if self._shares_policy_weights and starting is not None:
            self._model.weights = starting
        else:
            self._model.load(self._folder)

    def _rendered_tokens(self, comparison: Comparison) -> list[int]:
        return self._tokens(self._render(comparison))

    def _fits(self, length: int) -> bool:
        """Return whether a bucket holds the tokens; raise JudgeError if none does and `on_long` is "error"."""
        fits = length <= self._buckets[-1]
        if not fits and self._on_long == "error":
            raise JudgeError(
                f"a comparison has {length} tokens, but the last of judge.buckets holds {self._buckets[-1]}; raise it,"
                " or set judge.on_long to 'no_verdict' to skip such pairs"
            )
        return fits

    def _too_long(self, length: int) -> str:
        """Return the reason why there is no verdict on a comparison that does not fit."""
        return f"a comparison of {length} tokens; the last bucket holds {self._buckets[-1]}"

    def _tokens(self, rendered: str | Sequence[Any]) -> list[int]:
        """Return token ids; messages go through the chat template. Control tokens in a text are ordinary text."""
        if isinstance(rendered, str):
            return list(self._tokenizer(rendered, split_special_tokens=True, verbose=False)["input_ids"])
        try:
            return self._chat_template(list[Any](rendered), "the list")
        except ValueError as error:
            raise JudgeError(f"judge.template: {error}") from error
