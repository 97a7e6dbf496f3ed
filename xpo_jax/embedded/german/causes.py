"""The causes of the embedded German world: a short clause, or a phrase of the same meaning.

Data only. Each clause is listed twice: with the verb in second position ("es regnete stark") and with the
verb at the end ("es stark regnete"). {S} is the agent; a/b are the forms for one agent and for several.
Causes about the agent ("weil sie krank war") fit persons only.
"""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """One cause. past, present: (verb second, verb last) clauses; phrases: the same as an adverbial."""

    about_agent: bool
    past: tuple[tuple[str, str], ...]
    present: tuple[tuple[str, str], ...]
    phrases: tuple[str, ...]


def _clauses(text: str) -> tuple[tuple[str, str], ...]:
    clauses = []
    for clause in text.split("; "):
        second, last = clause.split(" | ")
        clauses.append((second, last))
    return tuple(clauses)


def _cause(past: str, present: str, phrases: str) -> Cause:
    return Cause("{S}" in past, _clauses(past), _clauses(present), tuple(phrases.split("; ")))


CAUSES: dict[str, Cause] = {
    "rain": _cause(
        "es regnete stark | es stark regnete; es regnete heftig | es heftig regnete; "
        "es hat stark geregnet | es stark geregnet hat",
        "es regnet stark | es stark regnet; es regnet heftig | es heftig regnet",
        "wegen des starken Regens; aufgrund des starken Regens; wegen des heftigen Regens",
    ),
    "strike": _cause(
        "es wurde gestreikt | gestreikt wurde; ein Streik fand statt | ein Streik stattfand",
        "es wird gestreikt | gestreikt wird; ein Streik findet statt | ein Streik stattfindet",
        "wegen eines Streiks; aufgrund eines Streiks; streikbedingt",
    ),
    "no_time": _cause(
        "die Zeit fehlte | die Zeit fehlte; die Zeit reichte nicht | die Zeit nicht reichte; "
        "die Zeit war zu knapp | die Zeit zu knapp war",
        "die Zeit fehlt | die Zeit fehlt; die Zeit reicht nicht | die Zeit nicht reicht; "
        "die Zeit ist zu knapp | die Zeit zu knapp ist",
        "aus Zeitmangel; aus Zeitnot; wegen Zeitmangels; aus Mangel an Zeit",
    ),
    "no_money": _cause(
        "das Geld fehlte | das Geld fehlte; das Geld reichte nicht | das Geld nicht reichte; "
        "das Geld war zu knapp | das Geld zu knapp war",
        "das Geld fehlt | das Geld fehlt; das Geld reicht nicht | das Geld nicht reicht; "
        "das Geld ist zu knapp | das Geld zu knapp ist",
        "aus Geldmangel; wegen Geldmangels; aus Mangel an Geld",
    ),
    "illness": _cause(
        "{S} war/waren krank | {S} krank war/waren; {S} war/waren erkrankt | {S} erkrankt war/waren",
        "{S} ist/sind krank | {S} krank ist/sind; {S} ist/sind erkrankt | {S} erkrankt ist/sind",
        "krankheitsbedingt; aus Krankheitsgründen; wegen Krankheit",
    ),
    "curiosity": _cause(
        "{S} war/waren neugierig | {S} neugierig war/waren",
        "{S} ist/sind neugierig | {S} neugierig ist/sind",
        "aus Neugier; aus Neugierde",
    ),
    "boredom": _cause(
        "{S} langweilte/langweilten sich | {S} sich langweilte/langweilten; "
        "{S} hatte/hatten Langeweile | {S} Langeweile hatte/hatten",
        "{S} langweilt/langweilen sich | {S} sich langweilt/langweilen; "
        "{S} hat/haben Langeweile | {S} Langeweile hat/haben",
        "aus Langeweile; vor lauter Langeweile",
    ),
    "need_of_money": _cause(
        "{S} brauchte/brauchten Geld | {S} Geld brauchte/brauchten; "
        "{S} benötigte/benötigten Geld | {S} Geld benötigte/benötigten",
        "{S} braucht/brauchen Geld | {S} Geld braucht/brauchen; "
        "{S} benötigt/benötigen Geld | {S} Geld benötigt/benötigen",
        "aus Geldnot; aus finanzieller Not",
    ),
    "fear": _cause(
        "{S} hatte/hatten Angst | {S} Angst hatte/hatten; "
        "{S} fürchtete/fürchteten sich | {S} sich fürchtete/fürchteten",
        "{S} hat/haben Angst | {S} Angst hat/haben; {S} fürchtet/fürchten sich | {S} sich fürchtet/fürchten",
        "aus Angst; aus Furcht",
    ),
    "guests": _cause(
        "Besuch kam | Besuch kam; Gäste kamen | Gäste kamen; Gäste wurden erwartet | Gäste erwartet wurden",
        "Besuch kommt | Besuch kommt; Gäste kommen | Gäste kommen; "
        "Gäste werden erwartet | Gäste erwartet werden",
        "wegen des Besuchs; wegen der Gäste",
    ),
    "high_cost": _cause(
        "die Kosten waren zu hoch | die Kosten zu hoch waren",
        "die Kosten sind zu hoch | die Kosten zu hoch sind",
        "wegen der zu hohen Kosten; aufgrund der zu hohen Kosten; aus Kostengründen",
    ),
    "low_price": _cause(
        "der Preis war günstig | der Preis günstig war; der Preis war niedrig | der Preis niedrig war",
        "der Preis ist günstig | der Preis günstig ist; der Preis ist niedrig | der Preis niedrig ist",
        "wegen des günstigen Preises; aufgrund des günstigen Preises; wegen des niedrigen Preises",
    ),
    "complaints": _cause(
        "es gab Beschwerden | es Beschwerden gab; Beschwerden gingen ein | Beschwerden eingingen",
        "es gibt Beschwerden | es Beschwerden gibt; Beschwerden gehen ein | Beschwerden eingehen",
        "wegen der Beschwerden; aufgrund der Beschwerden; aufgrund von Beschwerden",
    ),
    "anniversary": _cause(
        "es gab ein Jubiläum | es ein Jubiläum gab; ein Jubiläum stand bevor | ein Jubiläum bevorstand",
        "es gibt ein Jubiläum | es ein Jubiläum gibt; ein Jubiläum steht bevor | ein Jubiläum bevorsteht",
        "wegen eines Jubiläums; anlässlich eines Jubiläums; aus Anlass eines Jubiläums",
    ),
    "heat": _cause(
        "es war heiß | es heiß war", "es ist heiß | es heiß ist", "wegen der Hitze; aufgrund der Hitze"
    ),
    "cold": _cause(
        "es war kalt | es kalt war", "es ist kalt | es kalt ist", "wegen der Kälte; aufgrund der Kälte"
    ),
}

# Some causes fit some objects only: nobody opens a parcel because it is hot.
CAUSE_OBJECTS: dict[str, tuple[str, ...]] = {
    "heat": ("door", "window"),
    "cold": ("door", "window"),
    "rain": (
        "party",
        "concert",
        "museum",
        "castle",
        "church",
        "monument",
        "exhibition",
        "fence",
        "wall",
        "gate",
        "house",
        "piano",
        "sofa",
        "wardrobe",
        "bridge",
        "tower",
        "school",
    ),
    "high_cost": ("offer", "proposal", "plan", "contract", "exhibition", "book", "novel"),
}
