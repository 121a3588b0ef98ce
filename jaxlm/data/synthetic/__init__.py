"""Draws tasks whose answers are known: each module draws one kind of row, as a `Batch`.

Every function takes a numpy generator and returns rows whose weights are 1 where the target is an
answer and 0 elsewhere. Ids below a task's own are explained in its module.
"""
