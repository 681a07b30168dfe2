"""`python -m bench.zoo`: models that others wrote, gated, half closed, pruned and compared.

`models` names them, `measure` does one in a process of its own, `table` writes what came out.
"""
