"""Closed-form heal: what is left of each output projection, or the scale of each expert that stays, is refitted to what
the dense layer gave.

`stream.heal` fits, `edits.heal_edits` turns a finished heal into edits (and needs no torch).
"""
