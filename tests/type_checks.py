"""The run-time type checker of the tests, which conftest.py applies to the boundary functions."""

from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated, as type checkers do.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
