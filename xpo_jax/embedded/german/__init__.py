"""A small German world: meanings, their sentences, and the recogniser that tells whether two agree.

`grammar.random_meaning` draws a meaning, `grammar.realise` says it in one of its many ways,
`parser.parse` reads it back and `parser.same_meaning` is the gate of the paraphrase judge.
`corpus` makes prompts and fine-tuning pairs. Needs the standard library only.
"""
