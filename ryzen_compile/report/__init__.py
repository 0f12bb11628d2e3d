"""Reports as text: packages, comparisons, evaluations and build previews; `--json` prints the records themselves."""
