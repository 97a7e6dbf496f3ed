"""The human judge: the rounds, the file of votes, and the page's server, driven over HTTP as the page does."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from xpo_jax.judges.contract import Progress
from xpo_jax.judges.human import Human
from xpo_jax.judges.human_board import Board, NotTaken, Vote, VoteFile
from xpo_jax.judges.human_server import differences
from xpo_jax.values import Comparison, Verdict

ANNA, BEN = "a" * 16, "b" * 16


def comparisons(n=3):
    return [
        Comparison(({"role": "user", "content": f"prompt {i}"},), {"n": i}, f"left {i}", f"right {i}")
        for i in range(n)
    ]


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


# ---- the page -------------------------------------------------------------------------------------


class Page:
    """What the page sends, and the run behind it: the judge in another thread."""

    def __init__(self, path, n=3, votes=1):
        self.judge = Human(port=0, votes=votes, votes_folder=str(path.parent))
        self.judge.probe()
        self.verdicts = None
        self._thread = threading.Thread(target=self._judge, args=(n,), daemon=True)
        self._thread.start()

    def _judge(self, n):
        self.verdicts = self.judge(comparisons(n))

    def end(self):
        self._thread.join(20)
        return self.verdicts

    @property
    def address(self):
        return self.judge.address

    def get(self, path, **options):
        return request(self.address + path, **options)

    def state(self, by=ANNA):
        while True:
            state = json.loads(self.get(f"state?by={by}")[1])
            if state["pair"] or not self._thread.is_alive():
                return state
            time.sleep(0.01)

    def vote(self, choice, by=ANNA, pair=None):
        pair = pair or self.state(by)["pair"]["id"]
        status, body = self.get("vote", data=json.dumps({"by": by, "pair": pair, "choice": choice}).encode())
        assert status == 200
        return json.loads(body)


def request(address, **options):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, **options), timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def page(path):
    page = Page(path)
    yield page
    page.judge.close()


def test_page_shows_judges_and_ends(page):
    status, body = page.get("")
    assert status == 200 and b"Which answer is better?" in body
    state = page.state()
    assert state["pair"]["messages"] == [{"role": "user", "content": "prompt 0"}]
    assert state["pair"]["a"] == [["left", True], [" 0", False]]
    assert page.vote("A")["pair"]["number"] == 2
    page.judge.progress(Progress(3, 16, (0.6, 0.5, 0.7), 64, [("p", "old", "new")]))
    state = page.vote("tie")
    assert state["taken"] == 2 and state["progress"]["win_rate"] == [0.6, 0.5, 0.7]
    assert state["progress"]["examples"] == [["p", "old", "new"]]
    page.judge.progress(Progress(4, 16, None, 0, [], held_out=(0.7, 0.6, 0.8, 4), queries=2))
    state = page.state()
    assert state["progress"]["held_out"] == [0.7, 0.6, 0.8, 4] and state["taken"] == 2
    assert page.vote("B")["pair"] is None
    assert [verdict.p for verdict in page.end()] == [1.0, 0.5, 0.0]
    assert page.judge.stats() == {"votes": 3}


def test_page_late_vote_is_refused_with_a_note(page):
    pair = page.state()["pair"]["id"]
    page.vote("A")
    assert "decided already" in page.vote("B", by=BEN, pair=pair)["note"]
    assert "decided already" in page.vote("B", by=BEN, pair="0" * 64)["note"]
    status, body = page.get("undo", data=json.dumps({"by": BEN}).encode())
    assert status == 200 and "no choice of yours" in json.loads(body)["note"]
    status, body = page.get("undo", data=json.dumps({"by": ANNA}).encode())
    assert json.loads(body)["pair"]["id"] == pair


def test_page_policy_lets_nothing_be_fetched_from_elsewhere(page):
    with urllib.request.urlopen(page.address) as response:
        policy, text = response.headers["Content-Security-Policy"], response.read().decode()
    assert policy.startswith("default-src 'none'; connect-src 'self'") and "unsafe" not in policy
    assert "http" not in text and " src=" not in text and "innerHTML" not in text


def test_page_without_the_token_is_403(page):
    root = page.address.rsplit("/", 2)[0]
    token = page.address.rsplit("/", 2)[1]
    for path in (
        "/",
        "/state?by=" + ANNA,
        "/vote",
        f"/{token[:-1]}/",
        f"/{token}",
        f"/x{token}/",
        "/%2e%2e/",
    ):
        assert request(root + path)[0] == 403
    assert request(root + "/vote", data=b"{}")[0] == 403


def test_page_malformed_requests_change_nothing(page, path):
    pair = page.state()["pair"]["id"]
    good = {"by": ANNA, "pair": pair, "choice": "A"}
    for changes in (
        {"by": "x"}, {"by": ANNA.upper()}, {"by": None}, {"by": [ANNA]}, {"pair": "x"}, {"pair": 7},
        {"choice": "a"}, {"choice": "undo"}, {"choice": ""}, {"choice": 1}, {"more": "x"}, {"pair": pair + "\n"},
    ):  # fmt: skip
        assert page.get("vote", data=json.dumps({**good, **changes}).encode())[0] == 400
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 4000, b"x" * 5000, json.dumps(good).encode()[:-1]):
        assert page.get("vote", data=body)[0] == 400
        assert page.get("undo", data=body)[0] == 400
    assert page.get("state")[0] == page.get("state?by=zz")[0] == 400
    assert page.get("vote")[0] == page.get("", data=b"{}")[0] == 405
    assert path.read_text() == "" and page.state()["pair"]["id"] == pair


def test_differences_are_marked_by_word():
    a, b = differences("Der Hund schläft heute.", "Heute schläft der Hund.")
    assert "".join(text for text, _ in a) == "Der Hund schläft heute."
    assert "".join(text for text, _ in b) == "Heute schläft der Hund."
    assert (" schläft ", False) in b and ("Heute", True) in b
    assert differences("gleich", "gleich") == ([("gleich", False)], [("gleich", False)])
    assert differences("", "x") == ([], [("x", True)])
    long = "wort " * 3000
    assert differences(long, long + "x") == ([(long, False)], [(long + "x", False)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": -1}, "port is -1"),
        ({"votes": 0}, "votes is 0"),
        ({"port": 70000}, "port is 70000"),
        ({"votes_folder": " "}, "votes_folder is empty"),
    ],
)
def test_human_invalid_argument_is_refused(path, changes, message):
    with pytest.raises(ValueError, match=message):
        Human(**{"port": 0, "votes": 1, "votes_folder": str(path.parent)} | changes)


def test_human_taken_port_names_the_field(page, path):
    port = int(page.address.split(":")[2].split("/")[0])
    with pytest.raises(ValueError, match=f"judge.port: {port} cannot be used"):
        Human(port=port, votes=1, votes_folder=str(path.parent)).probe()


def test_combination_with_a_human_part_shows_the_progress_and_needs_one_process(page, path):
    from fakes import LongerText

    from xpo_jax.judges.combine import Combination
    from xpo_jax.judges.contract import HasOneProcess, HasProgress

    both = Combination({"human": (1.0, page.judge), "rules": (1.0, LongerText())}, "mean")
    assert isinstance(both, HasOneProcess) and both.one_process and isinstance(both, HasProgress)
    both.progress(Progress(1, 2, None, 0, []))
    assert page.judge._status()["progress"]["step"] == 1
    rules = Combination({"rules": (1.0, LongerText())}, "mean")
    assert not rules.one_process and not isinstance(rules, HasProgress)
