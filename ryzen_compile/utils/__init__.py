"""The ground: records with a JSON form, files that appear whole, locks between processes, callables of user scripts."""
