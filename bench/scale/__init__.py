"""`python -m bench.scale`: what sparsify_, DensityConstraint and prune cost as models grow.

`models` names the models and their budgets, `measure` does one in a process of its own, `memory`
and `counts` are its instruments, `table` and `plot` write what came out.
"""
