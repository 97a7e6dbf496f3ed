"""The human judge's rounds and its file of votes."""

import json
import threading
import time

import pytest
from fakes import comparisons

from xpo_jax.judges.human_board import Board, NotTaken, Vote, VoteFile
from xpo_jax.values import Comparison, Verdict

ANNA, BEN = "a" * 16, "b" * 16


class Round:
    """A board that judges some comparisons in another thread."""

    def __init__(self, path, votes=1, n=3):
        self.now = 0.0
        self.board = Board(votes, VoteFile(path), clock=lambda: self.now)
        self.verdicts = None
        self._thread = threading.Thread(target=self._judge, args=(comparisons(n),), daemon=True)
        self._thread.start()
        while not self.board._round and self._thread.is_alive():
            time.sleep(0.001)

    def _judge(self, items):
        self.verdicts = self.board.judge(items)

    def end(self):
        self._thread.join(20)
        return self.verdicts


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- rounds ---------------------------------------------------------------------------------------


def test_board_each_choice_is_its_probability(path):
    round = Round(path, n=4)
    for choice in ("A", "B", "tie", "skip"):
        round.board.vote(ANNA, round.board.next(ANNA).id, choice)
    assert round.end() == [
        Verdict(1.0, "A 1"),
        Verdict(0.0, "B 1"),
        Verdict(0.5, "tie 1"),
        Verdict(None, "skipped"),
    ]
    assert [(line["choice"], line["by"], line["a"]) for line in lines(path)] == [
        ("A", ANNA, "left 0"), ("B", ANNA, "left 1"), ("tie", ANNA, "left 2"), ("skip", ANNA, "left 3")
    ]  # fmt: skip
    assert round.board.next(ANNA) is None


def test_board_two_browsers_have_different_comparisons_until_one_is_away(path):
    round = Round(path, n=2)
    first, second = round.board.next(ANNA), round.board.next(BEN)
    assert (first.number, second.number, first.total) == (1, 2, 2)
    assert round.board.next(ANNA) == first  # reloading the page changes nothing
    round.board.vote(BEN, second.id, "A")
    assert round.board.next(BEN) == first  # nothing else is left: better twice on a screen than never decided
    round.board.vote(ANNA, first.id, "B")
    with pytest.raises(NotTaken, match="decided already"):
        round.board.vote(BEN, first.id, "A")
    assert [verdict.p for verdict in round.end()] == [0.0, 1.0]
    assert len(lines(path)) == 2


def test_board_comparison_of_a_closed_browser_is_shown_before_others_get_nothing(path):
    round = Round(path, n=3)
    closed = round.board.next(ANNA)
    round.now = 1000.0
    assert round.board.next(BEN).id == closed.id


def test_board_several_votes_are_averaged_and_agreement_is_counted(path):
    round = Round(path, votes=2, n=2)
    ids = [round.board.next(ANNA).id]
    round.board.vote(ANNA, ids[0], "A")
    ids.append(round.board.next(ANNA).id)
    round.board.vote(ANNA, ids[1], "tie")
    assert round.board.next(ANNA) is None and round.board.agreement() is None
    with pytest.raises(NotTaken, match="judged this comparison already"):
        round.board.vote(ANNA, ids[1], "A")
    round.board.vote(BEN, ids[0], "A")
    assert round.board.agreement() == 1.0
    round.board.vote(BEN, ids[1], "B")
    assert round.end() == [Verdict(1.0, "A 2"), Verdict(0.25, "B 1, tie 1")]
    assert round.board.agreement() == 0.5  # also after the round
    assert round.board.judge(comparisons(2)) == round.verdicts  # from the file, and counted like others
    assert round.board.agreement() == 0.5


def test_board_undo_takes_the_latest_vote_back_and_shows_its_comparison(path):
    round = Round(path)
    first = round.board.next(ANNA)
    round.board.vote(ANNA, first.id, "A")
    round.board.next(ANNA)
    round.board.undo(ANNA)
    assert round.board.next(ANNA) == first and round.board.taken == 0
    with pytest.raises(NotTaken, match="no choice of yours"):
        round.board.undo(ANNA)
    with pytest.raises(NotTaken, match="no choice of yours"):
        round.board.undo(BEN)
    for choice in ("B", "A", "A"):
        round.board.vote(ANNA, round.board.next(ANNA).id, choice)
    assert [verdict.p for verdict in round.end()] == [0.0, 1.0, 1.0]
    with pytest.raises(NotTaken):
        round.board.undo(ANNA)


def test_board_same_comparison_twice_in_a_round_is_judged_once(path):
    board, verdicts = Board(1, VoteFile(path)), []
    thread = threading.Thread(target=lambda: verdicts.extend(board.judge(comparisons(1) * 2)), daemon=True)
    thread.start()
    while (shown := board.next(ANNA)) is None:
        time.sleep(0.001)
    board.vote(ANNA, shown.id, "A")
    thread.join(20)
    assert verdicts == [Verdict(1.0, "A 1")] * 2


# ---- the file -------------------------------------------------------------------------------------


def test_board_interrupted_round_asks_only_for_the_rest(path):
    round = Round(path)
    taken = round.board.next(ANNA)
    round.board.vote(ANNA, taken.id, "B")
    with open(path, "a") as file:
        file.write('{"comparison": "torn')  # by a crash
    again = Round(path)
    rest = [again.board.next(BEN).id]
    again.board.vote(BEN, rest[0], "A")
    rest.append(again.board.next(BEN).id)
    again.board.vote(BEN, rest[1], "A")
    assert taken.id not in rest and [verdict.p for verdict in again.end()] == [0.0, 1.0, 1.0]
    assert Board(1, VoteFile(path)).judge(comparisons()) == again.verdicts  # asks nobody


def test_vote_file_other_lines_are_left_alone(path):
    others = ["[1]", '{"comparison": 1}', '{"comparison": ["x"], "by": {}, "choice": "A"}', "not json"]
    path.write_text("\n".join([*others, '{"comparison": "x", "by": "y", "choice": "C"}', ""]))
    assert VoteFile(path).votes("x") == {}
    assert path.read_text().startswith("[1]\n")


@pytest.mark.parametrize("text", ["Säge", "a\u2028b", "a\x85b\u2029c", "a\r\nb"])
def test_vote_file_keeps_votes_on_any_text_and_drops_a_line_torn_at_any_byte(path, text):
    of = Comparison(({"role": "user", "content": text},), {}, text, "b")
    VoteFile(path).append(Vote("x", ANNA, "A"), of)
    whole = path.read_bytes()
    VoteFile(path).append(Vote("y", ANNA, "B"), of)
    both = path.read_bytes()
    for cut in range(len(whole), len(both) - 1):
        path.write_bytes(both[:cut])
        file = VoteFile(path)
        assert (file.votes("x"), file.votes("y")) == ({ANNA: "A"}, {})
        file.append(Vote("z", BEN, "tie"), of)
        again = VoteFile(path)
        assert (again.votes("x"), again.votes("z")) == ({ANNA: "A"}, {BEN: "tie"})


def test_board_vote_that_cannot_be_written_is_not_taken_and_the_next_one_is(path, monkeypatch, capsys):
    round = Round(path)
    pair = round.board.next(ANNA)
    aside = path.with_suffix(".aside")
    path.rename(aside)
    path.mkdir()  # nothing can be appended to a folder
    with pytest.raises(NotTaken, match="was not taken.*choose again"):
        round.board.vote(ANNA, pair.id, "A")
    assert "a choice cannot be written" in capsys.readouterr().err
    assert round.board.taken == 0 and round.board.next(ANNA) == pair
    path.rmdir()
    aside.write_text('{"comparison": "half')  # as a full disk leaves it
    aside.rename(path)
    round.board.vote(ANNA, pair.id, "A")
    assert VoteFile(path).votes(pair.id) == {ANNA: "A"}


def test_vote_file_that_cannot_be_used_names_the_field(tmp_path):
    with pytest.raises(ValueError, match="judge.votes_folder: .*name another folder"):
        VoteFile(tmp_path)
