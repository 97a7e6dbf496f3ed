"""The human judge: its arguments, and its page, driven over HTTP as the page does; the rounds: test_human_board.py."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
from fakes import comparisons

from xpo_jax.judges.contract import Progress
from xpo_jax.judges.human import Human
from xpo_jax.judges.human_server import differences

ANNA, BEN = "a" * 16, "b" * 16


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.jsonl"


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
