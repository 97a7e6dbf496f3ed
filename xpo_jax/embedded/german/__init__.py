"""A small German grammar: meanings, their sentences, and a parser that decides whether two sentences mean the same.

`meaning.random_meaning` draws a meaning, `grammar.realise` writes one of its sentences, and `parser.parse` recovers the
meaning; `parser.difference` is the embedded gate of the paraphrase judge. Needs only the standard library.
Read meaning.py and grammar.py first, then parser.py.

meaning.py     what a sentence means, apart from words and word order, and how to draw a meaning
grammar.py     a meaning -> all of its sentences
parser.py      a sentence -> its meaning; the difference between two sentences
orders.py      word order: which sequences of constituents make a sentence
brackets.py    the finite verb and the end of the clause
inflection.py  noun phrases in their cases, verbs in their forms
valency.py     the types of a verb and of its forms
lexicon.py     nouns, determiners, adjectives and adverbials
verbs.py       the verbs, and what goes with each
causes.py      the causes, as clauses and as phrases
corpus.py      prompts and fine-tuning pairs
"""
