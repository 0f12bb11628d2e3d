"""Input data for export, calibration, comparison and evaluation: real samples or synthetic inputs from a seed.

`synthetic` generates inputs, `sources` reads samples, `loading` resolves the value of `--data`, `validation` checks inputs
against an interface, and `reshaping` changes samples to requested shapes.
"""
