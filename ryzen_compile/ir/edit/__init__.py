"""Graph edits: transactions, insertion, replacement and removal of nodes, and conversion of element types."""
