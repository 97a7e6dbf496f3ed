"""Texts for people: one line, shortened, visible, and as Markdown."""

import pytest

from xpo_jax.io.text import error_line, markdown_table, one_line, shorten, visible


def test_one_line_replaces_each_run_of_white_space():
    assert one_line(" a\n\n  b\tc ") == "a b c"


@pytest.mark.parametrize(("text", "short"), [("12345678", "12345678"), ("123456789", "12345...")])
def test_shorten_cuts_longer_texts_only(text, short):
    assert shorten(text, 8) == short


def test_error_line_without_a_message_is_the_class():
    assert error_line(OSError(" a\n b ")) == "a b"
    assert error_line(KeyError("a"), with_class=True) == "KeyError: 'a'"
    assert error_line(TimeoutError()) == error_line(TimeoutError("\n"), with_class=True) == "TimeoutError"


def test_visible_shows_control_characters_as_symbols():
    assert visible("a\x1b[31m\x07\tb\r\nc\rd\x7f\x9b\ud800ß") == "a␛[31m␇\tb\nc␍d\ufffd\ufffd\ufffdß"


def test_markdown_table_escapes_markup():
    table = markdown_table(
        [{"n": 1, "text": "a|b\n<pphr_output>*c*"}, {"text": "\\ `d` [e](f)", "p": 0.123456}]
    )
    assert table == (
        "| n | text | p |\n"
        "| --- | --- | --- |\n"
        "| 1 | a\\|b<br>\\<pphr_output>\\*c\\* |  |\n"
        "|  | \\\\ \\`d\\` \\[e](f) | 0.1235 |\n"
    )
