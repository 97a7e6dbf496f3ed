"""The paraphrase judge: its formula by hand, its table of attacks, its gates and its errors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from xpo_jax.embedded.german.grammar import Meaning, random_meaning, realise
from xpo_jax.embedded.german.lexicon import OBJECTS
from xpo_jax.embedded.german.verbs import VERBS
from xpo_jax.judges.paraphrase import ParaphraseJudge, paraphrase
from xpo_jax.judges.paraphrase_gates import general
from xpo_jax.values import Comparison, Message

LIMITS = {
    "min_kept": 0.3,
    "min_similarity": 0.3,
    "max_similarity": 1.0,
    "min_length_ratio": 0.6,
    "max_length_ratio": 1.6,
}
ARGUMENTS = {
    "gate": "embedded",
    "distance_weight": 0.6,
    "start_weight": 0.2,
    "length_weight": 0.2,
    "softness": 0.0,
    "input_tag": "pphr_input",
    "output_tag": "pphr_output",
    **LIMITS,
}
COMPARISONS = 400


def build(**changes: object) -> ParaphraseJudge:
    return paraphrase(**{**ARGUMENTS, **changes})  # type: ignore[arg-type]


def prompt(source: str) -> list[Message]:
    return [
        {"role": "system", "content": "Formuliere um."},
        {"role": "user", "content": f"Text: <pphr_input> {source} </pphr_input>"},
    ]


def tagged(answer: str) -> str:
    return f"<pphr_output>{answer}</pphr_output>"


# --- the formula ---


def test_score_equals_values_computed_by_hand() -> None:
    """The common letters are counted by a plain recursion, independent of the library."""
    source, answer = "Der Arzt liest das Buch.", "Das Buch liest der Arzt."
    a, b = "derarztliestdasbuch", "dasbuchliestderarzt"
    d = 1 - 2 * _lcs(a, b) / (len(a) + len(b))
    parts = build().score(source, answer)
    assert parts["valid"] == 1 and parts["copy"] == 0 and parts["reason"] == ""
    assert parts["distance"] == pytest.approx(math.exp(-8 * (d - 0.6) ** 2), rel=1e-12)
    assert parts["start"] == pytest.approx(
        math.exp(-6 * (d - 0.5) ** 2), rel=1e-12
    )  # both shorter than 20 letters
    assert parts["length"] == 1.0
    expected = 0.6 * float(parts["distance"]) + 0.2 * float(parts["start"]) + 0.2
    assert parts["score"] == pytest.approx(expected, rel=1e-12)


def _lcs(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    return row[-1]


def test_score_equals_literal_values() -> None:
    judge = build(
        gate="general", min_kept=0.0, min_similarity=0.0, max_length_ratio=9.0, min_length_ratio=0.0
    )
    parts = judge.score("Abcd ef.", "Abcx efgh ij kl mn.")
    # letters abcdef, abcxefghijklmn: common abcef, d = 1 - 2*5/(6+14) = 0.5; words 2 and 5: r = 5/8
    assert parts["distance"] == pytest.approx(0.9231163463866358, rel=1e-12)  # exp(-8 * 0.01)
    assert parts["start"] == pytest.approx(1.0)
    assert parts["length"] == pytest.approx(0.4723665527410147, rel=1e-12)  # exp(-0.75)
    parts = judge.score("Abcdefghijklmnopqrstuvwxyz", "Abcdefghijklmnopqrstzzzzzz")
    assert parts["start"] == pytest.approx(
        0.22313016014842982, rel=1e-12
    )  # exp(-1.5): the first 20 are alike


def test_score_weights_are_normalized() -> None:
    source, answer = "Der Arzt liest das Buch.", "Das Buch liest der Arzt."
    assert build().score(source, answer) == build(distance_weight=6, start_weight=2, length_weight=2).score(
        source, answer
    )
    only = build(distance_weight=3, start_weight=0, length_weight=0).score(source, answer)
    assert only["score"] == only["distance"]


@pytest.mark.parametrize("weights", [(0.6, 0.2, 0.2), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_score_rejected_is_below_copy_is_below_every_paraphrase(weights: tuple[float, float, float]) -> None:
    judge = build(distance_weight=weights[0], start_weight=weights[1], length_weight=weights[2])
    rng = random.Random(11)
    for _ in range(300):
        meaning = random_meaning(rng)
        source, answer = realise(meaning, rng), realise(meaning, rng)
        if source == answer:
            continue
        copy = judge.score(source, source)
        assert (copy["valid"], copy["copy"]) == (1, 1)
        assert 0 < float(copy["score"]) < float(judge.score(source, answer)["score"])
    assert judge.score("Der Arzt liest das Buch.", "Der Arzt las das Buch.")["score"] == 0


def test_paraphrase_higher_score_wins_and_equal_scores_tie() -> None:
    judge = build()
    source, good, bad = (
        "Der Arzt liest das Buch.",
        "Das Buch wird vom Arzt gelesen.",
        "Der Arzt das Buch liest.",
    )
    verdicts = judge(
        [
            Comparison(prompt(source), {}, tagged(good), tagged(bad)),
            Comparison(prompt(source), {}, tagged(bad), tagged(good)),
            Comparison(prompt(source), {}, tagged(good), f" {tagged(good)}\n"),
            Comparison(prompt(source), {}, tagged(bad), ""),
        ]
    )
    assert [verdict.p for verdict in verdicts] == [1.0, 0.0, 0.5, 0.5]
    scores = verdicts[0].scores
    assert set(scores) == {"a", "b"}
    assert scores["a"] == judge.parts(prompt(source), tagged(good)) and scores["a"]["valid"] == 1
    assert scores["b"]["score"] == 0 and scores["b"]["reason"] == "not a sentence of the grammar"
    assert set(scores["a"]) == {"score", "valid", "copy", "distance", "start", "length", "reason"}
    assert verdicts[0].reason.endswith("B not a sentence of the grammar")


# --- attacks ---


@pytest.mark.parametrize("softness", [0.1, 1e-6])
def test_paraphrase_soft_verdict_is_the_sigmoid_of_the_difference(softness: float) -> None:
    source, near = "Der Koch kauft morgen den Tisch.", "Der Koch kauft den Tisch morgen."
    far = "Den Tisch wird der Koch am morgigen Tag erwerben."
    judge = build(softness=softness)
    [verdict] = judge([Comparison(prompt(source), {}, tagged(far), tagged(near))])
    [swapped] = judge([Comparison(prompt(source), {}, tagged(near), tagged(far))])
    difference = float(verdict.scores["a"]["score"]) - float(verdict.scores["b"]["score"])
    assert difference > 0.05
    assert verdict.p == pytest.approx(1 / (1 + math.exp(max(-700.0, -difference / softness))))
    assert verdict.p is not None and swapped.p == pytest.approx(1 - verdict.p)
    assert judge([Comparison(prompt(source), {}, tagged(far), tagged(far))])[0].p == 0.5


def _other_object(meaning: Meaning, rng: random.Random) -> str:
    others = [
        name
        for name in VERBS[meaning.verb].objects
        if name != meaning.object.concept and (OBJECTS[name][0].plural != "-" or not meaning.object.plural)
    ]
    return realise(replace(meaning, object=replace(meaning.object, concept=rng.choice(others))), rng)


def _keywords(sentence: str) -> str:
    return ", ".join(word for word in sentence[:-1].replace(",", "").split() if len(word) > 3) + "."


# name -> (a filter for meanings, (meaning, source, valid paraphrase, rng) -> the whole answer)
Attack = Callable[[Meaning, str, str, random.Random], str]
ANY: Callable[[Meaning], bool] = lambda meaning: True
ATTACKS: dict[str, tuple[Callable[[Meaning], bool], Attack]] = {
    "copy": (ANY, lambda m, s, v, r: tagged(s)),
    "unrelated sentence": (ANY, lambda m, s, v, r: tagged(realise(random_meaning(r), r))),
    "reversed words": (ANY, lambda m, s, v, r: tagged(" ".join(s[:-1].split()[::-1]).capitalize() + ".")),
    "shuffled words": (
        ANY,
        lambda m, s, v, r: tagged(" ".join(r.sample(s[:-1].split(), len(s.split()))) + "."),
    ),
    "keyword list": (ANY, lambda m, s, v, r: tagged(_keywords(s))),
    "wrong object": (ANY, lambda m, s, v, r: tagged(_other_object(m, r))),
    "negation dropped": (
        lambda m: m.negated,
        lambda m, s, v, r: tagged(realise(replace(m, negated=False), r)),
    ),
    "negation added": (
        lambda m: not m.negated and m.object.determiner == "definite" and m.modality is None,
        lambda m, s, v, r: tagged(realise(replace(m, negated=True), r)),
    ),
    "truncated": (ANY, lambda m, s, v, r: tagged(" ".join(v[:-1].split()[:-2]) + ".")),
    "truncated, legal": (
        lambda m: m.cause is not None,
        lambda m, s, v, r: tagged(realise(replace(m, cause=None), r)),
    ),
    "time dropped": (
        lambda m: m.time is not None and m.tense != "future",
        lambda m, s, v, r: tagged(realise(replace(m, time=None), r)),
    ),
    "doubled": (ANY, lambda m, s, v, r: tagged(f"{v} {v}")),
    "empty": (ANY, lambda m, s, v, r: tagged(" ")),
    "tags missing": (ANY, lambda m, s, v, r: v),
    "tags twice": (ANY, lambda m, s, v, r: tagged(v) + tagged(v)),
    "text around the tags": (ANY, lambda m, s, v, r: "Gern! " + tagged(v)),
}


def test_paraphrase_attacks_lose_to_a_random_valid_paraphrase(capsys: pytest.CaptureFixture[str]) -> None:
    judge = build()
    lines = [f"{'attack':<22}{'loses':>8}{'ties':>8}{'wins':>8}   mean score (attack, paraphrase)"]
    lost: dict[str, float] = {}
    for name, (fits, attack) in ATTACKS.items():
        rng = random.Random(name)
        points: list[float] = []
        scores: list[list[float]] = []
        while len(points) < COMPARISONS:
            meaning = random_meaning(rng)
            source, valid = realise(meaning, rng), realise(meaning, rng)
            if not fits(meaning) or valid == source:
                continue
            answers = (tagged(valid), attack(meaning, source, valid, rng))
            swap = rng.random() < 0.5
            [verdict] = judge([Comparison(prompt(source), {}, *(answers[::-1] if swap else answers))])
            assert verdict.p is not None
            points.append(1 - verdict.p if swap else verdict.p)
            pair = [verdict.scores[key]["score"] for key in ("ba" if swap else "ab")]
            scores.append(pair)
        lost[name] = sum(point == 1.0 for point in points) / COMPARISONS
        shares = [sum(point == value for point in points) / COMPARISONS for value in (1.0, 0.5, 0.0)]
        paraphrase_mean, attack_mean = (sum(column) / COMPARISONS for column in zip(*scores, strict=True))
        lines.append(
            f"{name:<22}"
            + "".join(f"{share:>8.1%}" for share in shares)
            + f"   {attack_mean:.3f}, {paraphrase_mean:.3f}"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert all(share >= 0.97 for share in lost.values()), lost


def test_embedded_gate_accepts_valid_paraphrases(capsys: pytest.CaptureFixture[str]) -> None:
    judge = build()
    rng = random.Random(12)
    refused, n = 0, 3000
    for _ in range(n):
        meaning = random_meaning(rng)
        refused += judge.score(realise(meaning, rng), realise(meaning, rng))["valid"] == 0
    with capsys.disabled():
        print(f"\nvalid paraphrases refused: {refused} of {n}")
    assert refused <= 0.03 * n


# --- tags and errors ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Das Buch liest der Arzt.",
        "<pphr_output>Das Buch liest der Arzt.",
        "Das Buch liest der Arzt.</pphr_output>",
        "<pphr_output><pphr_output>Das Buch liest der Arzt.</pphr_output></pphr_output>",
        "<pphr_output>Das Buch liest der Arzt.</pphr_output>.",
        "<PPHR_OUTPUT>Das Buch liest der Arzt.</PPHR_OUTPUT>",
        "</pphr_output>Das Buch liest der Arzt.<pphr_output>",
    ],
)
def test_parts_bad_tags_score_zero(text: str) -> None:
    parts = build().parts(prompt("Der Arzt liest das Buch."), text)
    assert (parts["score"], parts["valid"], parts["reason"]) == (0, 0, "output tags missing or broken")


def test_parts_white_space_in_and_around_tags_is_ignored() -> None:
    judge = build()
    bare = judge.parts(prompt("Der Arzt liest das Buch."), tagged("Das Buch liest der Arzt."))
    assert bare["valid"] == 1
    assert (
        judge.parts(
            prompt("Der Arzt liest das Buch."), "\n <pphr_output>\n Das Buch liest der Arzt. </pphr_output> "
        )
        == bare
    )


def test_parts_input_is_the_last_pair_of_tags_in_the_last_user_turn() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "<pphr_input>Der Koch liest das Buch.</pphr_input>"},
        {"role": "assistant", "content": "<pphr_output>x</pphr_output>"},
        {
            "role": "user",
            "content": "Nimm den Text aus <pphr_input>: <pphr_input>Der Arzt liest das Buch.</pphr_input>",
        },
    ]
    assert build().parts(messages, tagged("Das Buch liest der Arzt."))["valid"] == 1


@pytest.mark.parametrize(
    "content", ["Der Arzt liest das Buch.", "<pphr_input>Der Arzt", "<pphr_input> </pphr_input>"]
)
def test_parts_prompt_without_input_is_refused_with_a_remedy(content: str) -> None:
    with pytest.raises(
        ValueError, match="no text between <pphr_input> and </pphr_input>.*data.template"
    ) as error:
        build().parts([{"role": "user", "content": content}], tagged("x"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no user turn"):
        build().parts([], tagged("x"))


def test_embedded_gate_input_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="'Vielen Dank.' is not a sentence of the embedded.*'general'"):
        build().parts(prompt("Vielen Dank."), tagged("Danke."))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "none"}, "judge.gate is 'none'; choose one of 'embedded', 'general'"),
        ({"start_weight": -1}, "weights"),
        ({"distance_weight": math.nan}, "weights"),
        ({"distance_weight": 0, "start_weight": 0, "length_weight": 0}, "not all zero"),
        ({"softness": -0.1}, "softness is -0.1"),
        ({"softness": float("nan")}, "softness is nan"),
        ({"input_tag": "<pphr_input>"}, "judge.input_tag"),
        ({"output_tag": ""}, "judge.output_tag"),
        ({"min_similarity": 0.9, "max_similarity": 0.1}, "judge.min_similarity"),
        ({"min_length_ratio": -1}, "judge.min_length_ratio"),
        ({"min_kept": 2}, "judge.min_kept"),
    ],
)
def test_paraphrase_invalid_settings_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)


# --- the general gate ---

SOURCE = "Im Mai 2019 fuhr Ida Sommer mit 25 Leuten nicht nach Ulm, weil die EU-Mittel fehlten (oft)."


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            "Ida Sommer fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "",
        ),
        (
            "Ida Sommer fuhr im Mai 2018 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "numbers differ",
        ),
        (
            "Ida Winter fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "a name is missing",
        ),
        (
            "Ida Sommer fuhr im Mai 2019 mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "negation differs",
        ),
        (
            "Ida Sommer fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten, oft.",
            "brackets differ",
        ),
        (
            "Ida Sommer fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel (oft) fehlten",
            "does not end as a sentence",
        ),
        (
            "ida Sommer fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "does not begin as a sentence",
        ),
        (
            "Ida Sommer fuhr fuhr im Mai 2019 nicht mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "repeats a word",
        ),
        ("Nicht 2019, nicht 25 (oft), Ida Sommer.", "too few of the input's content words"),
        (
            "Ida Sommer fuhr nicht <b>2019</b> mit 25 Leuten nach Ulm, da die EU-Mittel fehlten (oft).",
            "markup",
        ),
        (SOURCE + " " + SOURCE, "brackets differ"),
        ("...", "no words"),
    ],
)
def test_general_gate_names_its_reason(answer: str, reason: str) -> None:
    assert general(**LIMITS)(SOURCE, answer) == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Gern kaufen wir heute frisches Brot beim Bäcker.", ""),
        ("Beim Bäcker kaufen wir heute gern frisches Brot.", ""),
        (
            "Beim Bäcker kaufen wir heute gern Brot. Beim Bäcker kaufen wir heute gern Brot.",
            "repeats itself",
        ),
        ("Frisches Brot vom Bäcker.", "too short"),
        (
            "Heute kaufen wir, so wie fast an jedem anderen Tag auch, gern frisches Brot beim Bäcker.",
            "too long",
        ),
        ("Die Bäckerei verkauft nur alte Kuchen.", "too few of the input's content words"),
    ],
)
def test_general_gate_without_names_and_numbers(answer: str, reason: str) -> None:
    assert (
        general(**LIMITS | {"min_length_ratio": 0.7})(
            "Wir kaufen heute gern frisches Brot beim Bäcker.", answer
        )
        == reason
    )


@pytest.mark.parametrize(
    "source",
    [
        ":-)",
        "7",
        "Super!",
        "Waaahnsinn, einfach nur SUPER!!!",
        "„Na, sowas“, sagte er (leise) - und ging…",
        "a",
        "ÄÖÜ ß",
        "http://x.example/a?b=1 & 3,50 € = 4 %",
        "\u200b",
        "'' \"",
        "Ich ich ich.",
        "Dr. Dr. Müller-Lüdenscheidt wohnt in B.",
    ],
)
def test_general_gate_lets_copies_pass_and_never_raises(source: str) -> None:
    judge = build(gate="general")
    parts = judge.parts(prompt(source), tagged(source)) if source.strip() else {}
    if source.strip():
        assert (parts["valid"], parts["copy"]) == (1, 1), parts
    for answer in ("", "Ja.", source[::-1], source * 3, "Etwas ganz anderes."):
        assert 0 <= float(judge.score(source, answer)["score"]) <= 1
