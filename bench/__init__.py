"""What ghost costs: steps with it and steps without, taking turns in one process.

`nox -s bench` runs this; `nox -s bench -- --list` says which cases there are. To add one, write a
`Case` beside those of its subject, or a module with a list of them and a line in `registry.py`.
"""
