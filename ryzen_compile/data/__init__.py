"""Data: the feeds that export, calibration, comparison and evaluation share, real or made by a seed.

`synthetic` makes feeds, `sources` reads them, `named` finds them by what `--data` says, `check` holds them to an interface and
`fitting` brings them to the shapes that are asked for.
"""
