"""The words of the embedded German world: nouns, determiners, adjectives and adverbials.

Data only. The verbs, with the nouns and adverbials that fit them, are in `verbs.py`; causes are in `causes.py`.
Alternatives within one entry are synonyms: the grammar may exchange them anywhere, so a word is listed only if it fits
every sentence in which its entry can occur. No word form belongs to two entries of the same kind; the parser depends
on this, and a test checks it.

Left out on purpose: persons as objects, so that "die Ärztin sieht die Lehrerin" cannot be ambiguous,
and possessives, whose reference changes in the passive.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """One noun. `weak` nouns take the genitive's form in the accusative and dative too (den Kunden)."""

    singular: str
    gender: str
    genitive: str
    plural: str
    weak: bool


def noun(entry: str) -> Noun:
    """Read "singular gender genitive plural"; gender w is a weak masculine, - is no plural."""
    singular, gender, genitive, plural = entry.split()
    return Noun(singular, "m" if gender == "w" else gender, genitive, plural, gender == "w")


def _nouns(table: dict[str, str]) -> dict[str, tuple[Noun, ...]]:
    return {name: tuple(noun(entry) for entry in entries.split(", ")) for name, entries in table.items()}


# fmt: off
AGENTS = _nouns({
    "doctor_m": "Arzt m Arztes Ärzte, Mediziner m Mediziners Mediziner",
    "doctor_f": "Ärztin f Ärztin Ärztinnen, Medizinerin f Medizinerin Medizinerinnen",
    "lawyer_m": "Anwalt m Anwalts Anwälte, Rechtsanwalt m Rechtsanwalts Rechtsanwälte",
    "lawyer_f": "Anwältin f Anwältin Anwältinnen, Rechtsanwältin f Rechtsanwältin Rechtsanwältinnen",
    "teacher_m": "Lehrer m Lehrers Lehrer",
    "teacher_f": "Lehrerin f Lehrerin Lehrerinnen",
    "boss_m": "Chef m Chefs Chefs",
    "boss_f": "Chefin f Chefin Chefinnen",
    "director_f": "Direktorin f Direktorin Direktorinnen",
    "student_m": "Student w Studenten Studenten",
    "student_f": "Studentin f Studentin Studentinnen",
    "journalist_m": "Journalist w Journalisten Journalisten, Reporter m Reporters Reporter",
    "journalist_f": "Journalistin f Journalistin Journalistinnen, Reporterin f Reporterin Reporterinnen",
    "author_m": "Autor m Autors Autoren, Schriftsteller m Schriftstellers Schriftsteller",
    "author_f": "Autorin f Autorin Autorinnen, Schriftstellerin f Schriftstellerin Schriftstellerinnen",
    "joiner_m": "Tischler m Tischlers Tischler, Schreiner m Schreiners Schreiner",
    "joiner_f": "Tischlerin f Tischlerin Tischlerinnen, Schreinerin f Schreinerin Schreinerinnen",
    "farmer_m": "Landwirt m Landwirts Landwirte, Bauer w Bauern Bauern",
    "farmer_f": "Landwirtin f Landwirtin Landwirtinnen, Bäuerin f Bäuerin Bäuerinnen",
    "neighbour_m": "Nachbar w Nachbarn Nachbarn",
    "neighbour_f": "Nachbarin f Nachbarin Nachbarinnen",
    "colleague_m": "Kollege w Kollegen Kollegen",
    "colleague_f": "Kollegin f Kollegin Kolleginnen",
    "mechanic_m": "Mechaniker m Mechanikers Mechaniker",
    "technician_f": "Technikerin f Technikerin Technikerinnen",
    "engineer_f": "Ingenieurin f Ingenieurin Ingenieurinnen",
    "architect_m": "Architekt w Architekten Architekten",
    "merchant_m": "Händler m Händlers Händler, Kaufmann m Kaufmanns Kaufleute",
    "merchant_f": "Händlerin f Händlerin Händlerinnen, Kauffrau f Kauffrau Kauffrauen",
    "professor_m": "Professor m Professors Professoren, Hochschullehrer m Hochschullehrers Hochschullehrer",
    "professor_f": "Professorin f Professorin Professorinnen, "
                   "Hochschullehrerin f Hochschullehrerin Hochschullehrerinnen",
    "grandmother": "Großmutter f Großmutter Großmütter, Oma f Oma Omas",
    "grandfather": "Großvater m Großvaters Großväter, Opa m Opas Opas",
    "cook_m": "Koch m Kochs Köche",
    "cook_f": "Köchin f Köchin Köchinnen",
    "caretaker_m": "Hausmeister m Hausmeisters Hausmeister, Hauswart m Hauswarts Hauswarte",
    "mayor_f": "Bürgermeisterin f Bürgermeisterin Bürgermeisterinnen",
    "customer_m": "Kunde w Kunden Kunden",
    "customer_f": "Kundin f Kundin Kundinnen",
    "company": "Firma f Firma Firmen, Unternehmen n Unternehmens Unternehmen",
    "authority": "Behörde f Behörde Behörden, Amt n Amtes Ämter",
    "club": "Verein m Vereins Vereine, Klub m Klubs Klubs",
})

ORGANISATIONS = ("company", "authority", "club")
PERSONS = tuple(agent for agent in AGENTS if agent not in ORGANISATIONS)

# One is known to everybody here: no plural, no "ein".
UNIQUE_AGENTS = frozenset({
    "boss_m", "boss_f", "director_f", "grandmother", "grandfather", "caretaker_m", "mayor_f", "authority",
})

OBJECTS = _nouns({
    # written things
    "letter": "Brief m Briefes Briefe, Schreiben n Schreibens Schreiben",
    "report": "Bericht m Berichts Berichte",
    "article": "Artikel m Artikels Artikel, Beitrag m Beitrags Beiträge",
    "contract": "Vertrag m Vertrags Verträge",
    "invoice": "Rechnung f Rechnung Rechnungen",
    "book": "Buch n Buches Bücher",
    "novel": "Roman m Romans Romane",
    "poem": "Gedicht n Gedichts Gedichte",
    "message": "Nachricht f Nachricht Nachrichten, Mitteilung f Mitteilung Mitteilungen",
    "application": "Antrag m Antrags Anträge, Gesuch n Gesuchs Gesuche",
    "form": "Formular n Formulars Formulare, Vordruck m Vordrucks Vordrucke",
    "proposal": "Vorschlag m Vorschlags Vorschläge",
    "offer": "Angebot n Angebots Angebote, Offerte f Offerte Offerten",
    "plan": "Plan m Plans Pläne, Vorhaben n Vorhabens Vorhaben",
    "invitation": "Einladung f Einladung Einladungen",
    "result": "Ergebnis n Ergebnisses Ergebnisse, Resultat n Resultats Resultate",
    "method": "Verfahren n Verfahrens Verfahren, Methode f Methode Methoden",
    "rule": "Regel f Regel Regeln, Vorschrift f Vorschrift Vorschriften",
    "rent": "Miete f Miete -",
    "fine": "Strafe f Strafe Strafen, Geldstrafe f Geldstrafe Geldstrafen",
    # goods
    "parcel": "Paket n Pakets Pakete",
    "car": "Auto n Autos Autos, Wagen m Wagens Wagen",
    "bicycle": "Fahrrad n Fahrrads Fahrräder, Rad n Rades Räder",
    "computer": "Computer m Computers Computer, Rechner m Rechners Rechner",
    "television": "Fernseher m Fernsehers Fernseher, Fernsehgerät n Fernsehgeräts Fernsehgeräte",
    "phone": "Handy n Handys Handys, Mobiltelefon n Mobiltelefons Mobiltelefone",
    "washing_machine": "Waschmaschine f Waschmaschine Waschmaschinen",
    "heating": "Heizung f Heizung -, Heizungsanlage f Heizungsanlage -",
    "camera": "Kamera f Kamera Kameras, Fotoapparat m Fotoapparats Fotoapparate",
    "piano": "Klavier n Klaviers Klaviere, Piano n Pianos Pianos",
    "painting": "Gemälde n Gemäldes Gemälde, Bild n Bildes Bilder",
    "sofa": "Sofa n Sofas Sofas, Couch f Couch Couchs",
    "wardrobe": "Schrank m Schranks Schränke",
    "table": "Tisch m Tisches Tische",
    "shelf": "Regal n Regals Regale",
    "watch": "Uhr f Uhr Uhren",
    "ring": "Ring m Rings Ringe",
    "key": "Schlüssel m Schlüssels Schlüssel",
    "purse": "Geldbörse f Geldbörse Geldbörsen, Portemonnaie n Portemonnaies Portemonnaies, "
             "Geldbeutel m Geldbeutels Geldbeutel",
    "umbrella": "Schirm m Schirms Schirme, Regenschirm m Regenschirms Regenschirme",
    "suitcase": "Koffer m Koffers Koffer",
    # food
    "soup": "Suppe f Suppe Suppen",
    "meal": "Essen n Essens -, Mahlzeit f Mahlzeit -",
    "stew": "Eintopf m Eintopfs Eintöpfe",
    # rooms and buildings
    "kitchen": "Küche f Küche Küchen",
    "bathroom": "Bad n Bades Bäder, Badezimmer n Badezimmers Badezimmer",
    "room": "Zimmer n Zimmers Zimmer, Raum m Raumes Räume",
    "stairs": "Treppe f Treppe Treppen",
    "window": "Fenster n Fensters Fenster",
    "door": "Tür f Tür Türen",
    "gate": "Tor n Tores Tore",
    "fence": "Zaun m Zauns Zäune",
    "wall": "Mauer f Mauer Mauern",
    "house": "Haus n Hauses Häuser, Gebäude n Gebäudes Gebäude",
    "bridge": "Brücke f Brücke Brücken",
    "tower": "Turm m Turmes Türme",
    "school": "Schule f Schule Schulen",
    "church": "Kirche f Kirche Kirchen, Gotteshaus n Gotteshauses Gotteshäuser",
    "monument": "Denkmal n Denkmals Denkmäler, Monument n Monuments Monumente",
    "museum": "Museum n Museums Museen",
    "castle": "Schloss n Schlosses Schlösser",
    # events
    "exhibition": "Ausstellung f Ausstellung Ausstellungen",
    "party": "Fest n Festes Feste, Feier f Feier Feiern",
    "concert": "Konzert n Konzerts Konzerte",
    "conference": "Konferenz f Konferenz Konferenzen, Tagung f Tagung Tagungen",
    "meeting": "Sitzung f Sitzung Sitzungen, Besprechung f Besprechung Besprechungen",
    "appointment": "Termin m Termins Termine",
    "exam": "Prüfung f Prüfung Prüfungen, Examen n Examens Examen",
})

# Adjectives as stems that take an ending at once (teuer -> teur-).
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "new": ("neu",),
    "old": ("alt",),
    "expensive": ("teur", "kostspielig"),
    "cheap": ("günstig", "preiswert"),
    "valuable": ("wertvoll", "kostbar"),
    "strange": ("seltsam", "merkwürdig", "sonderbar"),
    "extensive": ("umfangreich", "ausführlich"),
    "complicated": ("kompliziert", "schwierig"),
    "delicious": ("lecker", "köstlich", "schmackhaft"),
    "famous": ("berühmt", "bekannt"),
    "huge": ("riesig", "gewaltig"),
    "broken": ("kaputt", "defekt"),
    "dirty": ("schmutzig", "verschmutzt", "dreckig"),
    "unpaid": ("offen", "unbezahlt", "ausstehend"),
    "heavy": ("schwer",),
}

OBJECT_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "letter": ("strange",), "message": ("strange",), "proposal": ("new", "strange", "complicated"),
    "offer": ("new", "cheap", "strange"), "plan": ("new", "complicated"), "report": ("new", "extensive"),
    "article": ("new", "extensive", "strange"), "contract": ("new", "complicated", "extensive"),
    "book": ("new", "old", "strange"), "novel": ("new", "strange"), "poem": ("new", "strange"),
    "application": ("new", "complicated"), "form": ("new", "complicated"), "invoice": ("old",),
    "result": ("new", "strange"), "method": ("new", "complicated"), "rule": ("new", "complicated"),
    "car": ("new", "old", "expensive", "cheap"), "bicycle": ("new", "old", "expensive", "cheap"),
    "computer": ("new", "old", "expensive", "cheap"), "television": ("new", "old", "expensive", "cheap"),
    "phone": ("new", "old", "expensive", "cheap"), "washing_machine": ("new", "old"),
    "heating": ("new", "old"),
    "camera": ("new", "old", "expensive", "cheap"), "piano": ("new", "old", "expensive"),
    "painting": ("old", "valuable", "strange"), "sofa": ("new", "old", "expensive", "cheap"),
    "wardrobe": ("new", "old", "heavy"), "table": ("new", "heavy"), "shelf": ("new",),
    "watch": ("old", "valuable", "expensive"), "ring": ("old", "valuable"), "key": ("old",),
    "purse": ("old", "expensive"), "umbrella": ("old",), "suitcase": ("old", "heavy"),
    "soup": ("delicious",), "meal": ("delicious",), "stew": ("delicious",),
    "house": ("new", "old", "expensive"), "bridge": ("new", "huge"), "tower": ("new", "huge"),
    "school": ("new", "huge"), "church": ("famous", "old"), "monument": ("famous", "huge"),
    "museum": ("famous", "new"), "castle": ("famous", "old"), "exhibition": ("new",),
    "exam": ("complicated",), "door": ("old",), "gate": ("old",),
    "fence": ("old",), "wall": ("old",),
}

# Times, by the tense they go with. "frequency" needs the present tense and something that repeats.
TIMES: dict[str, dict[str, tuple[str, ...]]] = {
    "past": {
        "yesterday": ("gestern", "am gestrigen Tag"),
        "two_days_ago": ("vorgestern", "vor zwei Tagen"),
        "this_morning": ("heute Morgen", "heute früh", "am heutigen Morgen"),
        "last_week": ("letzte Woche", "vorige Woche", "vergangene Woche", "in der letzten Woche",
                      "in der vergangenen Woche"),
        "last_month": ("letzten Monat", "vorigen Monat", "im letzten Monat", "im vergangenen Monat"),
        "last_year": ("letztes Jahr", "voriges Jahr", "im letzten Jahr", "im vergangenen Jahr"),
        "recently": ("kürzlich", "neulich", "vor Kurzem", "vor kurzer Zeit", "unlängst"),
    },
    "present": {
        "now": ("momentan", "derzeit", "zurzeit", "gegenwärtig", "im Moment", "im Augenblick"),
    },
    "frequency": {
        "daily": ("jeden Tag", "täglich", "Tag für Tag"),
        "weekly": ("jede Woche", "wöchentlich", "Woche für Woche"),
        "often": ("oft", "häufig", "des Öfteren"),
        "sometimes": ("manchmal", "gelegentlich", "ab und zu", "hin und wieder", "von Zeit zu Zeit"),
        "rarely": ("selten", "nur selten"),
    },
    "future": {
        "tomorrow": ("morgen", "am morgigen Tag"),
        "in_two_days": ("übermorgen", "in zwei Tagen"),
        "tonight": ("heute Abend", "am heutigen Abend"),
        "next_week": ("nächste Woche", "kommende Woche", "in der nächsten Woche", "in der kommenden Woche"),
        "next_month": ("nächsten Monat", "kommenden Monat", "im nächsten Monat", "im kommenden Monat"),
        "next_year": ("nächstes Jahr", "kommendes Jahr", "im nächsten Jahr", "im kommenden Jahr"),
        "soon": ("bald", "demnächst", "in Kürze", "in nächster Zeit"),
    },
}

FAR_TIMES = frozenset({"last_week", "last_month", "last_year", "next_week", "next_month", "next_year"})

NEAR_TIMES = frozenset({"yesterday", "two_days_ago", "this_morning", "last_week", "tomorrow", "in_two_days",
                        "tonight", "next_week"})

MANNERS: dict[str, tuple[str, ...]] = {
    "carefully": ("sorgfältig", "gründlich", "mit großer Sorgfalt", "gewissenhaft"),
    "quickly": ("schnell", "rasch", "zügig"),
    "secretly": ("heimlich", "im Geheimen", "in aller Heimlichkeit"),
    "unaided": ("ohne Hilfe", "ohne fremde Hilfe", "selbstständig", "eigenständig"),
    "free_of_charge": ("kostenlos", "unentgeltlich", "gratis"),
    "cautiously": ("vorsichtig", "behutsam", "mit großer Vorsicht"),
    "voluntarily": ("freiwillig", "aus freien Stücken"),
    "at_once": ("sofort", "umgehend", "unverzüglich", "auf der Stelle"),
    "in_detail": ("ausführlich", "eingehend", "in allen Einzelheiten"),
    "politely": ("höflich", "auf höfliche Weise", "in höflicher Form"),
    "firmly": ("entschieden", "mit Nachdruck", "nachdrücklich"),
    "punctually": ("pünktlich", "fristgerecht", "termingerecht"),
    "without_reason": ("grundlos", "ohne Grund"),
    "together": ("gemeinsam", "zusammen"),
}

PLACES: dict[str, tuple[str, ...]] = {
    "city": ("in der Innenstadt", "im Stadtzentrum", "in der Stadtmitte"),
    "home": ("zu Hause", "daheim"),
    "office": ("im Büro", "am Arbeitsplatz"),
    "workshop": ("in der Werkstatt",),
    "internet": ("im Internet", "online", "im Netz"),
    "abroad": ("im Ausland", "in einem fremden Land"),
    "nearby": ("in der Nähe", "in der näheren Umgebung"),
    "woods": ("im Wald",),
    "cellar": ("im Keller", "im Untergeschoss"),
    "at_conference": ("auf einem Kongress", "bei einem Kongress"),
}

# A heating is repaired where it is.
IMPOSSIBLE_PLACES = frozenset({("workshop", "heating"), ("workshop", "washing_machine")})

# Determiners of objects, by number. Endings are in `inflection.py`.
QUANTITIES: dict[str, tuple[str, ...]] = {
    "two": ("zwei",),
    "some": ("einige", "mehrere", "ein paar"),
    "many": ("viele", "zahlreiche"),
    "all": ("alle", "sämtliche"),
}
# fmt: on
