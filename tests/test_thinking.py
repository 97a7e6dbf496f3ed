"""Blocks of thinking: what a judge reads of an answer, and that nothing else changes."""

import numpy as np
import pytest
from fakes import Recording

from xpo_jax.judges.ask import ResponsePairs, ask
from xpo_jax.judges.thinking import without_thinking
from xpo_jax.values import Prompts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Paris.", "Paris."),
        ("<think>\nFrance ...\n</think>\n\nParis.", "Paris."),
        ("<think></think>Paris. <think>Or Lyon?</think> Yes, Paris.", "Paris.  Yes, Paris."),
        ("<think>France, so", ""),  # cut off while it was thinking
        ("Paris. <think>Or", "Paris."),
        ("France, so\n</think>\nParis.", "Paris."),  # the chat template opened the block
        ("I <thinks> so</thinks>", "I <thinks> so</thinks>"),
        ("", ""),
    ],
)
def test_without_thinking_leaves_the_answer(text, shown):
    assert without_thinking(text) == shown


@pytest.mark.parametrize(("hide", "winner"), [(False, 1.0), (True, 0.0)])
def test_ask_hides_thinking_from_the_judge_on_request(hide, winner):
    """The longer text wins: the policy's answer only if its thinking counts."""
    Recording.calls.clear()
    policy, reference = "<think>" + "x" * 50 + "</think>no", "longer"
    one = np.ones(1, bool)
    prompts = Prompts(
        ({},), ((),), np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.zeros(1, np.int32), one
    )
    verdicts = ask(
        Recording(),
        prompts,
        ResponsePairs([policy], [reference], ~one, one, one),
        unfinished_loses=False,
        both_orders=False,
        hide_thinking=hide,
        shown_seed=(0,),
    )
    assert verdicts.p_first.tolist() == [winner]
    ((comparison,),) = Recording.calls
    assert {comparison.a, comparison.b} == {"no" if hide else policy, reference}


def test_ask_answers_that_differ_in_their_thinking_alone_tie_without_the_judge():
    Recording.calls.clear()
    one = np.ones(1, bool)
    prompts = Prompts(
        ({},), ((),), np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.zeros(1, np.int32), one
    )
    pairs = ResponsePairs(["<think>a</think>no"], ["<think>b</think> no"], ~one, one, one)
    rules = {"unfinished_loses": False, "both_orders": False, "shown_seed": (0,)}
    verdicts = ask(Recording(), prompts, pairs, hide_thinking=True, **rules)
    assert (verdicts.p_first.tolist(), verdicts.queries, [c for c in Recording.calls if c]) == ([0.5], 0, [])
    assert ask(Recording(), prompts, pairs, hide_thinking=False, **rules).queries == 1
