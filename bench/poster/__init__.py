"""`python -m bench.poster`: trains what the 2021 paper's poster reports, and compares.

`plan` lists the paper's rows and the trainings of each, `earlier` finds runs that were trained
before, `tables` writes the tables, `plot` draws the figure.
"""
