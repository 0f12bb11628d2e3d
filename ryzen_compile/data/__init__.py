"""Input data for export, calibration, comparison and evaluation: real samples or synthetic inputs from a seed.

`synthetic` generates inputs, `sources` reads samples, `loading` resolves the value of `--data`, `validation` checks inputs
against an interface, `reshaping` changes samples to requested shapes, and `documents` reads documents of token ids.
"""
