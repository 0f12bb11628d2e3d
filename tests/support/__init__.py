"""What tests share: small models, slow references, child processes, and graphs of every kind."""
