"""The pipeline of passes: parse, order, check the rules, run and verify."""
