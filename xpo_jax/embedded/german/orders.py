"""German word order: which sequences of constituents make a sentence.

A pattern is a string with one letter per constituent; the grammar fills each letter with phrases.

    S subject   A "von" + agent   O object (subject of the passive)   V finite verb   R right bracket
    T time      C cause phrase    P place   M manner                  N "nicht"
    F what a cause clause puts before the main clause ("Weil es regnete," / "Es regnete, deshalb")
    W a cause clause after the main clause                             X "Es regnete, sodass"
    E the verbs at the end of a subordinate clause
    K "(ist) nicht in der Lage," and its like                          Z infinitive with "zu"

Left out because they are grammatical but marked: a fronted "kein" or indefinite object in the active,
adverbials of manner before the agent, extraposed adverbials.
"""

from __future__ import annotations

from functools import cache

Node = dict[str, "Node"]


def _insert_all(base: str, letter: str) -> list[str]:
    return [base[:i] + letter + base[i:] for i in range(len(base) + 1)]


@cache
def _active_middle(parts: str, definite: bool) -> tuple[str, ...]:
    """Return the orders of the middle field after the subject; `parts` is a subset of O T C P M N."""
    adverbials = "".join(letter for letter in "TCPM" if letter in parts)
    negated = "N" if "N" in parts else ""
    if "O" not in parts:
        orders = [adverbials]
    elif definite and negated:
        orders = _insert_all(adverbials, "O")
    elif definite:
        orders = _insert_all(adverbials, "O")
        if adverbials.endswith("PM"):
            orders += [order + "MP" for order in _insert_all(adverbials[:-2], "O")]
    else:
        orders = [adverbials + "O"]
        if "P" in adverbials and "M" not in adverbials:
            orders.append(adverbials[:-1] + "OP")
        elif "P" in adverbials:
            orders.append(adverbials[:-2] + "MOP")
    return tuple(order + negated for order in orders)


@cache
def _passive_middle(parts: str, definite: bool) -> tuple[str, ...]:
    """Return the orders of the passive's middle field; `parts` is a subset of O A T C P M N.

    What is new to the reader (an indefinite subject) does not stand before time and cause.
    """
    early = "".join(letter for letter in "TC" if letter in parts)
    late = "".join(letter for letter in "PM" if letter in parts)
    negated = "N" if "N" in parts else ""
    if "A" not in parts:
        bases = [early + late]
    else:
        bases = [early + "A" + late]
        if early:
            bases.append("A" + early + late)
        if late.startswith("P"):
            bases.append(early + "PA" + late[1:])
    orders = []
    for base in bases:
        if "O" not in parts:
            orders.append(base)
            continue
        if definite or not any(letter in base for letter in "TC"):
            orders.append("O" + base)
        elif "A" not in base:
            orders.append(early + "O" + late)
        if "A" in base and (definite or not any(letter in base[base.index("A") :] for letter in "TC")):
            after_agent = base.index("A") + 1
            orders.append(base[:after_agent] + "O" + base[after_agent:])
        if "M" not in base and not negated and not (definite and "P" in base):
            orders.append(base + "O")
    return tuple(dict.fromkeys(order + negated for order in orders))


@cache
def main_clauses(parts: str, definite: bool, passive: bool, may_front: str) -> tuple[str, ...]:
    """Return verb-second clauses. `parts`: the constituents; `may_front`: those that may come first.

    F, the one letter of `may_front` that is not in `parts`, precedes the clause.
    """
    patterns = []
    for front in may_front:
        if front not in parts and front != "F":
            continue
        rest = parts.replace(front, "")
        subject = "S" if "S" in rest else ""
        middles = (_passive_middle if passive else _active_middle)(rest.replace("S", ""), definite)
        patterns += [f"{front}V{subject}{middle}R" for middle in middles]
    return tuple(patterns)


@cache
def subordinate_clauses(parts: str, definite: bool, passive: bool) -> tuple[str, ...]:
    """Return verb-last clauses after "sodass"."""
    middles = (_passive_middle if passive else _active_middle)(parts.replace("S", ""), definite)
    if passive and definite:
        middles = tuple(middle for middle in middles if middle.startswith("O"))
    return tuple(("X" if passive else "XS") + middle + "E" for middle in middles)


@cache
def infinitive_clauses(parts: str, definite: bool, time_inside: bool) -> tuple[str, ...]:
    """Return clauses such as "Die Ärztin ist gestern nicht in der Lage gewesen, das Auto ... zu reparieren"."""
    inner = parts.replace("S", "") if time_inside else parts.replace("S", "").replace("T", "")
    heads = ["SVK"] if time_inside or "T" not in parts else ["SVTK", "TVSK"]
    return tuple(head + middle + "Z" for head in heads for middle in _active_middle(inner, definite))


@cache
def with_clause_after(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the same clauses, each followed by a cause clause."""
    return tuple(pattern + "W" for pattern in patterns)


@cache
def trie(patterns: tuple[str, ...]) -> Node:
    """Return the patterns as a tree of letters; "" marks an end."""
    root: Node = {}
    for pattern in patterns:
        node = root
        for letter in pattern:
            node = node.setdefault(letter, {})
        node[""] = {}
    return root
