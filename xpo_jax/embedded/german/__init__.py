"""A small German world: meanings, their sentences, and a recogniser that decides whether two sentences agree.

`grammar.random_meaning` draws a meaning, `grammar.realise` expresses it in one of its many ways, `parser.parse` reads
it back, and `parser.same_meaning` is the gate of the paraphrase judge. `corpus` makes prompts and fine-tuning pairs.
Read meaning, lexicon and verbs, then grammar and orders, then parser. Needs the standard library only.
"""
