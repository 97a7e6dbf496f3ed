"""Conversations as data sets write them: each file of tests/cases is read as what it means, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_data import follows, load_data, load_error
from fake_models import CHATML, write_tokenizer
from tiny_run import write_rows

from xpo_jax.data import conversations
from xpo_jax.data.answer_files import read_answers
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.data.offline_pairs import load_pairs
from xpo_jax.data.rows import DataError
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.prompting import Rendering
from xpo_jax.values import Comparison

CASES = Path(__file__).parent / "cases"
# As in Qwen2.5: a turn of another role is left out without a word.
STRICT = """{% for m in messages %}\
{% if m.role in ('system', 'user') or (m.role == 'assistant' and not m.tool_calls) %}\
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\
{% elif m.role == 'assistant' %}\
{{ '<|im_start|>assistant\\n' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}\
{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<response>' + m.content + '</response><|im_end|>\\n' }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def user(text):
    return {"role": "user", "content": text}


def with_template(tmp_path, template):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer", template))


@pytest.fixture
def strict(tmp_path):
    """Return a tokenizer whose chat template renders four roles and no others."""
    return with_template(tmp_path, STRICT)


def load_case(tokenizer, name, column="messages", **fields):
    (source,) = [str(CASES / f"{name}.jsonl")]
    group = {
        "train": source,
        "held_out": source,
        "column": column,
        "max_prompt_tokens": 512,
        "buckets": (512,),
    }
    return load_data(tokenizer, **{**group, **fields}).train


def case_error(tokenizer, name, column="messages", **fields):
    with pytest.raises(DataError) as error:
        load_case(tokenizer, name, column, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the case files -------------------------------------------------------------------------------


def test_null_keys_are_left_out_and_other_extra_keys_are_a_choice(tokenizer):
    error = case_error(tokenizer, "chat_null_keys")
    assert follows(
        error, f"{CASES}/chat_null_keys.jsonl, row 2: turn 1 ... 'name' ... data.on_extra_keys = 'drop'"
    )
    train = load_case(tokenizer, "chat_null_keys", on_extra_keys="drop")
    assert [prompt.messages for prompt in train.prompts] == [
        (user("Name a river."),),
        (user("Name a lake."),),
    ]
    assert train.summary().endswith("from 2 rows; dropped from conversations: key name 1")


def test_roles_that_the_chat_template_renders_reach_it(strict):
    (prompt,) = load_case(strict, "chat_tools").prompts
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    assert prompt.messages == (
        user("Is it raining?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
        user("And tomorrow?"),
    )
    text = strict.decode(prompt.tokens)
    assert '{"name": "weather", "arguments": {}}' in text and "<response>dry</response>" in text


def test_role_that_the_chat_template_leaves_out_is_refused_with_its_list(strict, tokenizer):
    error = case_error(strict, "chat_developer")
    outline = "row 1: turn 1 of column 'messages' ... 'developer' ... renders system, user, assistant, tool"
    assert follows(error, f"{CASES}/chat_developer.jsonl, {outline}")
    (prompt,) = load_case(tokenizer, "chat_developer").prompts  # ChatML renders any role
    assert prompt.messages[0] == {"role": "developer", "content": "Answer in one word."}
    assert "<|im_start|>developer\nAnswer in one word." in tokenizer.decode(prompt.tokens)


def test_tool_calls_that_the_chat_template_leaves_out_are_refused(tokenizer):
    error = case_error(tokenizer, "chat_tools")
    assert follows(error, f"{CASES}/chat_tools.jsonl, row 1: turn 2 ... tool_calls ... remove the row")


def test_text_parts_are_joined_and_others_refused_by_name(tokenizer, data_folder):
    (prompt,) = load_case(tokenizer, "chat_parts").prompts
    assert prompt.messages == (user("Name a tree."),)
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    write_rows(data_folder / "t.jsonl", [{"text": [user(parts)]}])
    assert follows(load_error(tokenizer), "t.jsonl, row 1: turn 1 ... 'image_url' ... remove the row")


def test_sharegpt_is_read(tokenizer):
    (prompt,) = load_case(tokenizer, "chat_sharegpt", "conversations", on_assistant_last="drop").prompts
    assert prompt.messages == (user("Name a bird."),)


def test_answered_conversation_is_refused_or_loses_its_answer(tokenizer):
    error = case_error(tokenizer, "chat_assistant_last")
    assert follows(error, f"{CASES}/chat_assistant_last.jsonl, row 1: ... data.on_assistant_last = 'drop'")
    train = load_case(tokenizer, "chat_assistant_last", on_assistant_last="drop")
    assert train.prompts[0].messages == (user("Name a metal."),)
    assert train.summary().endswith("; dropped from conversations: last assistant turn 1")


@pytest.mark.parametrize("source", ["case", "python", "object", "one", "wrapped"])
def test_conversation_stored_as_text_is_read_as_one(tokenizer, data_folder, source):
    fish = [user("Name a fish.")]
    stored = {
        "case": json.loads((CASES / "chat_json_text.jsonl").read_text())["messages"],
        "python": repr(fish),  # as pandas writes it to csv
        "object": json.dumps({"messages": fish}),
        "one": json.dumps(fish[0]),
        "wrapped": {"conversations": [{"from": "human", "value": "Name a fish."}]},
    }[source]
    write_rows(data_folder / "t.jsonl", [{"text": stored}])
    (prompt,) = load_data(tokenizer).train.prompts
    assert prompt.messages == tuple(fish)
    assert tokenizer.decode(prompt.tokens).startswith("<|im_start|>user\nName a fish.<|im_end|>")


# ---- texts and conversations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"from": "Ulm", "to": "Bonn"}', '[{"name": "Ann"}]', "[Note] {x}", '{"role": "king"}']
)
def test_text_that_only_looks_like_json_stays_text(text):
    assert conversations.parse(text, "t.jsonl, row 1", "column 'text'") == text


def test_conversation_as_text_that_cannot_be_read_is_refused(tokenizer, data_folder):
    numpy_style = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"
    for text in (json.dumps([user("a" * 50)])[:-5], numpy_style):
        write_rows(data_folder / "t.jsonl", [{"text": text}])
        assert follows(
            load_error(tokenizer), "t.jsonl, row 1: column 'text' ... as text ... jsonl or parquet"
        )


def test_template_with_a_column_that_holds_a_conversation_is_refused(tokenizer, data_folder):
    write_rows(data_folder / "t.jsonl", [{"text": json.dumps([user("a")])}])
    error = load_error(tokenizer, template="Say: {text}", column=None)
    assert follows(error, "t.jsonl, row 1: column 'text' ... data.column ... data.template to None")
    comparison = Comparison((user("a"),), {"input": json.dumps([user("a")])}, "a", "b")
    with pytest.raises(JudgeError, match=r"^judge\.template: column 'input' holds a conversation"):
        Rendering("{input} {A} {B}", break_control_tokens=False)(comparison)


def test_answer_files_read_conversations_and_answers_of_any_form(tmp_path):
    rows = [
        {"messages": json.dumps([user("a")]), "answer": "1"},
        {"messages": [{"from": "human", "value": "b"}], "answer": [{"role": "assistant", "content": "2"}]},
        {"prompt": json.dumps([user("c")]), "answer": json.dumps([{"from": "gpt", "value": "3"}])},
        {"prompt": "d", "answer": '[{"role": "assistant"'},  # an answer that breaks off is what it is
    ]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    answered = read_answers(path, template=None, column="text", rename=None)
    assert [(entry.messages, entry.answers) for entry in answered.values()] == [
        ((user("a"),), ["1"]),
        ((user("b"),), ["2"]),
        ((user("c"),), ["3"]),
        ((user("d"),), ['[{"role": "assistant"']),
    ]
    write_rows(tmp_path / "answers.jsonl", [{"prompt": "d", "answer": [user("e")]}])
    with pytest.raises(DataError, match="row 1: column 'answer' must be text, or a list of one message"):
        read_answers(path, template=None, column="text", rename=None)


def test_key_of_a_conversation_covers_its_tool_calls():
    plain, calling = {"role": "assistant", "content": ""}, {"tool_calls": [{"function": {"name": "a"}}]}
    assert conversations.key([plain]) == '[["assistant", ""]]' != conversations.key([plain | calling])


# ---- chat templates -------------------------------------------------------------------------------

NO_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)


def test_chat_template_without_generation_prompt_is_refused(tmp_path, data_folder):
    write_rows(data_folder / "t.jsonl", [{"text": [user("a")]}])
    error = load_error(with_template(tmp_path, NO_GENERATION_PROMPT))
    assert follows(error, "t.jsonl, row 1: ... no generation prompt ... add_generation_prompt")


def test_chat_template_whose_user_turn_begins_the_answer_is_accepted(tmp_path):
    tokenizer = with_template(tmp_path, LLAMA2)
    assert tokenizer.decode(ChatTemplate(tokenizer)([user("a")])) == "[INST] a [/INST]"


def test_chat_template_arguments_reach_the_template(tmp_path, data_folder):
    beginning = "assistant\n' }}"
    assert beginning in CHATML
    tokenizer = with_template(tmp_path, CHATML.replace(beginning, "assistant\n' + (mood or '') }}"))
    write_rows(data_folder / "t.jsonl", [{"text": [user("a")]}])
    prompts = [
        load_data(tokenizer, chat_template_arguments=arguments).train.prompts[0]
        for arguments in (None, {"mood": "calm"})
    ]
    begin = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(prompt.tokens) for prompt in prompts] == [begin, f"{begin}calm"]


def test_chat_template_arguments_that_the_template_does_not_read_are_refused(tokenizer):
    for name in ("enable_thinking", "role", "for"):  # words of the template that are no variables
        with pytest.raises(ValueError, match=f"the tokenizer's chat template reads no {name}; correct"):
            ChatTemplate(tokenizer, arguments={name: False})
    with pytest.raises(ValueError, match="gets messages from the run"):
        ChatTemplate(tokenizer, arguments={"messages": []})


def test_chat_template_is_checked_once_for_each_role(tmp_path, monkeypatch):
    tokenizer = with_template(tmp_path, CHATML)
    calls, apply = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: (calls.append(1), apply(*a, **k))[1]
    )
    template = ChatTemplate(tokenizer)
    template([user("a")])
    first = len(calls)
    template([user("b"), {"role": "assistant", "content": "c"}, user("d")])
    assert (first, len(calls) - first) == (4, 2)
    template([user("b")])
    assert len(calls) - first == 3


def test_misspelt_role_is_refused_even_by_a_template_that_prints_any(tokenizer):
    with pytest.raises(
        ValueError, match=r"turn 1 of the conversation has the unknown role 'usr'; .* renders system"
    ):
        ChatTemplate(tokenizer)([{"role": "usr", "content": "a"}])


# ---- offline pairs --------------------------------------------------------------------------------


def test_pairs_logged_from_a_conversation_stored_as_text_are_rendered_as_one(tokenizer, tmp_path):
    from xpo_jax.data.pairs_log import content_hash

    stored = json.dumps([user("Name a fish.")])
    responses = [{"tokens": [tokenizer.encode(t)[0], 258], "text": t, "finished": True} for t in "ab"]
    record = {
        "step": 0, "position": 0, "row": {"chat": stored}, "messages": [user("Name a fish.")],
        "responses": responses, "p_first": 1.0, "weight": 1.0,
        "hash": content_hash([user("Name a fish.")], {"chat": stored}, "a", "b"),
    }  # fmt: skip
    path = write_rows(tmp_path / "pairs.jsonl", [record])
    fields = {"max_prompt_tokens": 64, "on_long": "error", "take": None, "max_new_tokens": 8}
    fields |= {"chat_template_arguments": None, "on_bad_row": "error"}
    fields |= {"on_extra_keys": "error", "on_assistant_last": "error"}
    options = {**fields, "tokenizer": tokenizer, "end_tokens": (258,)}
    loaded = load_pairs(pairs=path, template=None, column="chat", **options)
    assert tokenizer.decode(loaded.prompts[0].tokens).startswith("<|im_start|>user\nName a fish.")
    record["messages"] = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    record["hash"] = content_hash(record["messages"], record["row"], "a", "b")
    write_rows(tmp_path / "pairs.jsonl", [record])
    with pytest.raises(
        DataError, match=re.escape("row 1: the logged prompt is a conversation, but data.template")
    ):
        load_pairs(pairs=path, template="{chat}", column=None, **options)
