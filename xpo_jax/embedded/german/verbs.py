"""The verbs of the embedded German world, and what goes with each: the selectional restrictions.

Data only. Every verb is transitive with a person or an organisation as agent and a thing as object,
forms the passive, and takes "haben". Alternatives are synonyms for every object listed.
"""

from __future__ import annotations

from xpo_jax.embedded.german.lexicon import PERSONS, noun
from xpo_jax.embedded.german.valency import Form, Nominal, Verb, form


def _verb(
    forms: str,
    agents: tuple[str, ...],
    objects: str,
    *,
    nominal: Nominal | None = None,
    manners: str = "",
    places: str = "",
    reasons: str = "",
    obstacles: str = "",
    adjectives: str = "",
    habit: str = "",
    habit_of_one: bool = False,
    durative: bool = False,
    plans: bool = True,
    group: bool = False,
    near: bool = False,
    slow: bool = False,
    creates: bool = False,
) -> Verb:
    return Verb(
        tuple(form(entry) for entry in forms.split(", ")),
        agents,
        tuple(objects.split()),
        nominal,
        tuple(manners.split()),
        tuple(places.split()),
        tuple(reasons.split()),
        tuple(obstacles.split()),
        tuple(adjectives.split()),
        habit,
        habit_of_one,
        durative,
        plans,
        group,
        near,
        slow,
        creates,
    )


CARRY_OUT = form("durch|führen führt führte durchgeführt")
UNDERTAKE = form("vor|nehmen nimmt nahm vorgenommen")


def _nominal(nouns: str, *support: Form) -> Nominal:
    return Nominal(tuple(noun(entry) for entry in nouns.split(", ")), support)


MANAGERS = ("boss_m", "boss_f", "director_f", "mayor_f")
LEARNED = ("teacher_m", "teacher_f", "professor_m", "professor_f")
LAWYERS = ("lawyer_m", "lawyer_f")
COLLEAGUES = ("colleague_m", "colleague_f")
HANDY = (
    "mechanic_m",
    "technician_f",
    "engineer_f",
    "caretaker_m",
    "neighbour_m",
    "neighbour_f",
    "colleague_m",
    "grandfather",
    "student_m",
    "farmer_m",
    "farmer_f",
    "joiner_m",
    "joiner_f",
)
WRITERS = ("author_m", "author_f", "journalist_m", "journalist_f", "professor_m", "professor_f")
HOUSEHOLD = tuple(agent for agent in PERSONS if agent not in MANAGERS)
GOODS = "car bicycle computer television phone piano painting sofa house camera watch"

# fmt: off
VERBS: dict[str, Verb] = {
    "buy": _verb(
        "kaufen kauft kaufte gekauft, erwerben erwirbt erwarb erworben",
        (*PERSONS, "company", "club"),
        GOODS, manners="secretly", places="internet city abroad", reasons="low_price", obstacles="no_money",
        habit="rare",
    ),
    "sell": _verb(
        "verkaufen verkauft verkaufte verkauft, veräußern veräußert veräußerte veräußert",
        (*PERSONS, "company", "club"),
        GOODS, manners="secretly quickly", places="internet abroad", reasons="need_of_money", obstacles="",
        habit="rare",
    ),
    "repair": _verb(
        "reparieren repariert reparierte repariert, instand+setzen setzt setzte instand+gesetzt",
        (*HANDY, "company"),
        "car bicycle computer television washing_machine heating camera watch phone",
        nominal=_nominal("Reparatur f Reparatur -", CARRY_OUT, UNDERTAKE),
        manners="carefully quickly unaided free_of_charge together", places="workshop", reasons="complaints",
        obstacles="no_time no_money illness", adjectives="broken", habit="daily", durative=True,
    ),
    "check": _verb(
        "prüfen prüft prüfte geprüft, überprüfen überprüft überprüfte überprüft, "
        "kontrollieren kontrolliert kontrollierte kontrolliert",
        (*LAWYERS, *MANAGERS, *COLLEAGUES, "technician_f", "engineer_f", "professor_m", "professor_f",
         "architect_m", "authority", "company"),
        "invoice contract report application form result",
        nominal=_nominal("Überprüfung f Überprüfung -, Kontrolle f Kontrolle -", CARRY_OUT, UNDERTAKE),
        manners="carefully quickly together at_once", places="office", reasons="complaints",
        obstacles="no_time illness strike", habit="daily", durative=True,
    ),
    "reject": _verb(
        "ab|lehnen lehnt lehnte abgelehnt, zurück|weisen weist wies zurückgewiesen",
        (*PERSONS, "company", "authority", "club"),
        "proposal offer application plan", manners="politely firmly at_once without_reason",
        reasons="high_cost no_time", habit="rare",
    ),
    "accept": _verb(
        "an|nehmen nimmt nahm angenommen, akzeptieren akzeptiert akzeptierte akzeptiert",
        (*PERSONS, "company", "club"),
        "proposal offer invitation", manners="at_once voluntarily", reasons="need_of_money", habit="rare",
    ),
    "read": _verb(
        "lesen liest las gelesen, durch|lesen liest las durchgelesen",
        PERSONS,
        "book letter report article contract message poem novel", manners="carefully quickly secretly",
        places="home office", reasons="curiosity boredom", obstacles="no_time illness", habit="daily",
        durative=True,
    ),
    "write": _verb(
        "schreiben schreibt schrieb geschrieben, verfassen verfasst verfasste verfasst",
        PERSONS,
        "letter report article poem message invitation", manners="quickly unaided secretly",
        places="home office", reasons="boredom", obstacles="no_time illness", habit="rare", durative=True,
    ),
    "cook": _verb(
        "kochen kocht kochte gekocht, zu|bereiten bereitet bereitete zubereitet",
        HOUSEHOLD,
        "soup meal stew", manners="quickly unaided together", places="home", reasons="guests boredom",
        obstacles="no_time illness", habit="daily", habit_of_one=True, durative=True, near=True,
    ),
    "clean": _verb(
        "putzen putzt putzte geputzt, reinigen reinigt reinigte gereinigt, "
        "säubern säubert säuberte gesäubert",
        HOUSEHOLD,
        "kitchen bathroom room stairs window",
        nominal=_nominal("Reinigung f Reinigung -", CARRY_OUT, UNDERTAKE),
        manners="carefully quickly unaided voluntarily together", reasons="guests boredom",
        obstacles="no_time illness", adjectives="dirty", habit="daily", habit_of_one=True, durative=True,
        near=True,
    ),
    "send": _verb(
        "ab|schicken schickt schickte abgeschickt, ab|senden sendet sandte abgesandt, "
        "verschicken verschickt verschickte verschickt, versenden versendet versandte versandt",
        (*PERSONS, "company", "authority", "club"),
        "letter parcel invoice invitation message form application contract", manners="at_once punctually",
        obstacles="no_time illness strike", habit="daily",
    ),
    "find": _verb(
        "finden findet fand gefunden, entdecken entdeckt entdeckte entdeckt",
        PERSONS,
        "key ring purse watch suitcase umbrella camera phone", places="woods city home cellar", plans=False,
    ),
    "build": _verb(
        "bauen baut baute gebaut, errichten errichtet errichtete errichtet, "
        "erbauen erbaut erbaute erbaut",
        ("architect_m", "engineer_f", "company", "authority"),
        "house bridge tower wall school church monument", places="city nearby abroad",
        obstacles="no_money rain strike", habit="rare", durative=True, slow=True, creates=True,
    ),
    "organise": _verb(
        "organisieren organisiert organisierte organisiert, "
        "veranstalten veranstaltet veranstaltete veranstaltet, "
        "aus|richten richtet richtete ausgerichtet",
        (*PERSONS, "company", "club"),
        "party concert conference exhibition", manners="unaided voluntarily together",
        places="city abroad nearby", reasons="anniversary", obstacles="no_money no_time illness",
        habit="rare", durative=True,
    ),
    "postpone": _verb(
        "verschieben verschiebt verschob verschoben, verlegen verlegt verlegte verlegt",
        (*MANAGERS, *LEARNED, *LAWYERS, "doctor_m", "doctor_f", "company", "authority", "club"),
        "meeting appointment party concert conference exam", manners="without_reason at_once",
        reasons="illness rain strike no_time", habit="rare",
    ),
    "visit": _verb(
        "besuchen besucht besuchte besucht, besichtigen besichtigt besichtigte besichtigt",
        PERSONS,
        "museum castle exhibition church monument", manners="together secretly", places="nearby abroad city",
        reasons="curiosity boredom", obstacles="no_time rain illness strike", habit="rare",
        habit_of_one=True, durative=True,
    ),
    "explain": _verb(
        "erklären erklärt erklärte erklärt, erläutern erläutert erläuterte erläutert",
        (*MANAGERS, *LEARNED, *LAWYERS, *COLLEAGUES, "engineer_f", "architect_m", "doctor_m", "doctor_f",
         "technician_f"),
        "plan proposal contract rule method result", manners="in_detail quickly",
        places="office at_conference", obstacles="no_time illness", habit="rare", durative=True,
    ),
    "sign": _verb(
        "unterschreiben unterschreibt unterschrieb unterschrieben, "
        "unterzeichnen unterzeichnet unterzeichnete unterzeichnet",
        PERSONS,
        "contract letter application form", manners="at_once voluntarily secretly", places="office abroad",
        reasons="need_of_money", obstacles="high_cost illness", habit="rare",
    ),
    "open": _verb(
        "öffnen öffnet öffnete geöffnet, auf|machen macht machte aufgemacht",
        PERSONS,
        "door window parcel letter suitcase gate", manners="cautiously at_once secretly",
        reasons="curiosity heat", obstacles="fear cold", near=True,
    ),
    "close": _verb(
        "schließen schließt schloss geschlossen, zu|machen macht machte zugemacht",
        PERSONS,
        "door window suitcase gate", manners="cautiously at_once", reasons="cold fear", obstacles="heat",
        near=True,
    ),
    "pay": _verb(
        "bezahlen bezahlt bezahlte bezahlt, begleichen begleicht beglich beglichen, "
        "zahlen zahlt zahlte gezahlt",
        (*PERSONS, "company", "club"),
        "invoice rent fine", manners="punctually at_once voluntarily", obstacles="no_money illness",
        adjectives="unpaid",
    ),
    "transport": _verb(
        "transportieren transportiert transportierte transportiert, "
        "befördern befördert beförderte befördert",
        ("company", "neighbour_m", "neighbour_f", "student_m", "merchant_m", "merchant_f", "farmer_m",
         "farmer_f", "mechanic_m", "caretaker_m", "joiner_m", "joiner_f"),
        "piano parcel wardrobe sofa table suitcase washing_machine",
        nominal=_nominal("Transport m Transports -", CARRY_OUT), manners="cautiously free_of_charge quickly",
        obstacles="rain strike illness", adjectives="heavy", habit="daily", durative=True,
    ),
    "paint": _verb(
        "streichen streicht strich gestrichen, an|streichen streicht strich angestrichen",
        HOUSEHOLD,
        "fence door wall gate house window", manners="carefully quickly unaided free_of_charge together",
        reasons="boredom", obstacles="rain no_time illness", durative=True,
    ),
    "present": _verb(
        "vor|stellen stellt stellte vorgestellt, präsentieren präsentiert präsentierte präsentiert",
        (*WRITERS, *MANAGERS, "engineer_f", "architect_m", "company"),
        "plan book report result method novel", manners="in_detail together", places="abroad at_conference",
        obstacles="illness no_time", habit="rare",
    ),
    "make": _verb(
        "her|stellen stellt stellte hergestellt, an|fertigen fertigt fertigte angefertigt, "
        "fertigen fertigt fertigte gefertigt",
        ("joiner_m", "joiner_f", "company", "grandfather"),
        "table wardrobe shelf", manners="quickly unaided", places="workshop abroad",
        obstacles="no_time illness strike", habit="rare", durative=True, creates=True,
    ),
    "discuss": _verb(
        "besprechen bespricht besprach besprochen, diskutieren diskutiert diskutierte diskutiert, "
        "erörtern erörtert erörterte erörtert",
        (*LAWYERS, *LEARNED, *COLLEAGUES, *WRITERS, "neighbour_m", "neighbour_f", "student_m", "student_f",
         "engineer_f", "architect_m", "doctor_m", "doctor_f"),
        "plan proposal report offer method result article contract", manners="in_detail together",
        places="office at_conference", reasons="complaints", obstacles="no_time illness strike",
        habit="rare", durative=True, group=True,
    ),
    "change": _verb(
        "ändern ändert änderte geändert, ab|ändern ändert änderte abgeändert",
        (*MANAGERS, *LAWYERS, "architect_m", "engineer_f", "company", "authority", "club"),
        "plan contract application proposal rule", nominal=_nominal("Änderung f Änderung -", UNDERTAKE),
        manners="secretly at_once without_reason", reasons="high_cost complaints", obstacles="no_time",
        habit="rare",
    ),
    "evaluate": _verb(
        "bewerten bewertet bewertete bewertet, beurteilen beurteilt beurteilte beurteilt",
        (*LEARNED, *MANAGERS, *COLLEAGUES, "journalist_m", "journalist_f", "engineer_f", "authority"),
        "report proposal result application offer plan novel",
        nominal=_nominal("Bewertung f Bewertung -, Beurteilung f Beurteilung -", UNDERTAKE),
        manners="carefully quickly together", places="office", reasons="complaints",
        obstacles="no_time illness strike", habit="rare", durative=True,
    ),
    "publish": _verb(
        "veröffentlichen veröffentlicht veröffentlichte veröffentlicht, "
        "publizieren publiziert publizierte publiziert",
        (*WRITERS, "company", "club"),
        "book novel article report poem result", manners="at_once together", places="internet abroad",
        reasons="need_of_money", obstacles="high_cost no_money illness", habit="rare", creates=True,
    ),
    "hide": _verb(
        "verstecken versteckt versteckte versteckt, verbergen verbirgt verbarg verborgen",
        PERSONS,
        "key ring letter purse painting", manners="quickly together", places="home woods cellar",
        reasons="fear", near=True,
    ),
}
# fmt: on
