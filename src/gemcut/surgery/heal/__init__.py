"""Closed-form heal of head cuts: what is left of each output projection is refitted to what the dense layer gave.

`stream.heal` and `stored.heal_stored` fit, `edits.heal_edits` turns a finished heal into edits (and needs no torch).
"""
